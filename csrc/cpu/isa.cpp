#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace imcl {

const std::vector<IsaLevel>& isa_levels() {
#if defined(__x86_64__)
  static const std::vector<IsaLevel> levels = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return std::vector<IsaLevel>{
        {"avx512bf16", bf16}, {"avx512", avx512}, {"avx2", avx2}, {"baseline", true}};
  }();
#else
  static const std::vector<IsaLevel> levels = {{"baseline", true}};
#endif
  return levels;
}

std::size_t chosen_isa() {
  static const std::size_t chosen = [] {
    const char* wanted = std::getenv("IMCL_FAST_ISA");
    const std::vector<IsaLevel>& levels = isa_levels();
    std::string usable;
    for (std::size_t i = 0; i < levels.size(); ++i) {
      if (!levels[i].supported) continue;
      if (!wanted || !*wanted || std::string(wanted) == levels[i].name) return i;
      usable += std::string(usable.empty() ? "" : ", ") + levels[i].name;
    }
    throw std::runtime_error("IMCL_FAST_ISA: expected one of " + usable + ", got \"" + wanted +
                             "\"");
  }();
  return chosen;
}

}  // namespace imcl
