#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace imcl {

#define IMCL_DECLARE(isa)                              \
  namespace isa {                                      \
  extern const PairwiseKernels pairwise_kernels;       \
  extern const ConsistencyKernels consistency_kernels; \
  }
#define IMCL_LEVEL(isa, supported) \
  IsaLevel { #isa, supported, &isa::pairwise_kernels, &isa::consistency_kernels }

#if defined(__x86_64__)
IMCL_DECLARE(avx512bf16)
IMCL_DECLARE(avx512)
IMCL_DECLARE(avx2)
#endif
IMCL_DECLARE(baseline)

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
        IMCL_LEVEL(avx512bf16, bf16),
        IMCL_LEVEL(avx512, avx512),
        IMCL_LEVEL(avx2, avx2),
        IMCL_LEVEL(baseline, true),
    };
  }();
#else
  static const std::vector<IsaLevel> levels = {IMCL_LEVEL(baseline, true)};
#endif
  return levels;
}

const IsaLevel& chosen_isa() {
  static const IsaLevel& chosen = []() -> const IsaLevel& {
    const char* wanted = std::getenv("IMCL_FAST_ISA");
    std::string usable;
    for (const IsaLevel& level : isa_levels()) {
      if (!level.supported) continue;
      if (!wanted || !*wanted || std::string(wanted) == level.name) return level;
      usable += std::string(usable.empty() ? "" : ", ") + level.name;
    }
    throw std::runtime_error("IMCL_FAST_ISA: expected one of " + usable + ", got \"" + wanted +
                             "\"");
  }();
  return chosen;
}

}  // namespace imcl
