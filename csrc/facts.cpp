#include "facts.h"

#include <exception>
#include <stdexcept>
#include <thread>

#include "cpu/isa.h"

#if !defined(IMCL_CUDA_ARCHITECTURES)
#define IMCL_CUDA_ARCHITECTURES ""
#define IMCL_CUDA_PTX ""
#define IMCL_NVCC ""
#endif

namespace imcl {
namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string result;
  for (const std::string& name : names) result += (result.empty() ? "" : ",") + name;
  return result;
}

}  // namespace

std::vector<std::string> isa_names(bool only_supported) {
  std::vector<std::string> result;
  for (const IsaLevel& level : isa_levels())
    if (level.supported || !only_supported) result.emplace_back(level.name);
  return result;
}

std::string fact(const std::string& name) {
  if (name == "compiler") return __VERSION__;
  if (name == "isa_compiled") return joined(isa_names(false));
  if (name == "isa_levels") return joined(isa_names(true));
  if (name == "isa_chosen") return isa_levels()[chosen_isa()].name;
  if (name == "hardware_threads") return std::to_string(std::thread::hardware_concurrency());
  if (name == "cuda_architectures") return IMCL_CUDA_ARCHITECTURES;
  if (name == "cuda_ptx") return IMCL_CUDA_PTX;
  if (name == "nvcc") return IMCL_NVCC;
  throw std::runtime_error("no fact is called " + name);
}

}  // namespace imcl

const char* imcl_fast_fact(const char* name) {
  thread_local std::string text;
  try {
    text = imcl::fact(name);
  } catch (const std::exception& error) {
    text = std::string("!") + error.what();
  }
  return text.c_str();
}
