#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace imcl {

#if defined(__x86_64__)
namespace {

// Whether this process may use the tiles of AMX with bfloat16. The system saves them for those
// processes only that have asked. Its level is one of avx512bf16 and more.
bool has_matrix_unit([[maybe_unused]] bool avx512bf16) {
#if defined(IMCL_MATRIX_UNIT_STAND_IN)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // leaf 7, EDX
  if (!avx512bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBFloat16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Conversions of float16, whose name __builtin_cpu_supports of clang 14 doesn't know.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Whether products of bfloat16 pairs are quicker than those of float32: on a Xeon they were not,
// 82 ms for the kernels of a ResNet-18 against 63; on a Zen 4 46 against 76.
bool has_quick_pairs() { return __builtin_cpu_is("amd"); }

}  // namespace
#endif

const std::vector<IsaLevel>& isa_levels() {
#if defined(__x86_64__)
  static const std::vector<IsaLevel> levels = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return std::vector<IsaLevel>{{"amx", has_matrix_unit(bf16), true},
                                 {"avx512bf16", bf16, has_quick_pairs()},
                                 {"avx512", avx512, true},
                                 {"avx2", avx2, true},
                                 {"baseline", true, true}};
  }();
#else
  static const std::vector<IsaLevel> levels = {{"baseline", true, true}};
#endif
  return levels;
}

std::size_t chosen_isa() {
  static const std::size_t chosen = [] {
    const char* wanted = std::getenv("IMCL_FAST_ISA");
    const std::vector<IsaLevel>& levels = isa_levels();
    std::string usable;
    const bool named = wanted && *wanted;
    for (std::size_t i = 0; i < levels.size(); ++i) {
      if (!levels[i].supported) continue;
      if (named ? std::string(wanted) == levels[i].name : levels[i].pays) return i;
      usable += std::string(usable.empty() ? "" : ", ") + levels[i].name;
    }
    throw std::runtime_error("IMCL_FAST_ISA: expected one of " + usable + ", got \"" + wanted +
                             "\"");
  }();
  return chosen;
}

}  // namespace imcl
