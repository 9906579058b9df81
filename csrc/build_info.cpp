// imcl_fast._build_info: how the extension was built, and what it chose at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"

#if !defined(IMCL_CUDA_ARCHITECTURES)
#define IMCL_CUDA_ARCHITECTURES ""
#define IMCL_CUDA_PTX ""
#define IMCL_NVCC ""
#endif

namespace {

std::vector<std::string> names(bool only_supported) {
  std::vector<std::string> result;
  for (const imcl::IsaLevel& level : imcl::isa_levels())
    if (level.supported || !only_supported) result.emplace_back(level.name);
  return result;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled extension was built, and what it chose at run time.";
  m.def("compiler", [] { return std::string(__VERSION__); }, "Version of the C++ compiler.");
  m.def("isa_compiled", [] { return names(false); }, "ISA levels compiled in, best first.");
  m.def("isa_levels", [] { return names(true); }, "Those of them this CPU can run.");
  m.def(
      "isa_chosen", [] { return std::string(imcl::isa_levels()[imcl::chosen_isa()].name); },
      "The level in use: the best, or the one IMCL_FAST_ISA names.");
  m.def(
      "hardware_threads", [] { return std::thread::hardware_concurrency(); },
      "Hardware threads of this machine.");
  m.def(
      "cuda_architectures", [] { return std::string(IMCL_CUDA_ARCHITECTURES); },
      "CUDA architectures compiled in, separated by semicolons (80;90a); empty if none.");
  m.def(
      "cuda_ptx", [] { return std::string(IMCL_CUDA_PTX); },
      "Those of them that are there as PTX too, which later GPUs run as well.");
  m.def("nvcc", [] { return std::string(IMCL_NVCC); }, "Version of nvcc; empty if none.");
}
