#include "dispatch.h"

namespace imcl {

#define IMCL_DECLARE(isa)                              \
  namespace isa {                                      \
  extern const PairwiseKernels pairwise_kernels;       \
  extern const ConsistencyKernels consistency_kernels; \
  extern const DependenceKernels dependence_kernels;   \
  }
#define IMCL_KERNELS(isa) {&isa::pairwise_kernels, IMCL_UNROUNDED(isa)}
#define IMCL_UNROUNDED(isa) &isa::consistency_kernels, &isa::dependence_kernels

#if defined(__x86_64__)
namespace amx {  // a matrix unit has nothing to do in the others
extern const PairwiseKernels pairwise_kernels;
}
IMCL_DECLARE(avx512bf16)
IMCL_DECLARE(avx512)
IMCL_DECLARE(avx2)
#endif
IMCL_DECLARE(baseline)

Kernels kernels_of(std::size_t level) {
  static const Kernels kernels[] = {
#if defined(__x86_64__)
#if defined(IMCL_MATRIX_UNIT_STAND_IN)
      {&amx::pairwise_kernels, IMCL_UNROUNDED(baseline)},
#else
      {&amx::pairwise_kernels, IMCL_UNROUNDED(avx512bf16)},
#endif
      IMCL_KERNELS(avx512bf16),
      IMCL_KERNELS(avx512),
      IMCL_KERNELS(avx2),
#endif
      IMCL_KERNELS(baseline),
  };
  return kernels[level];
}

}  // namespace imcl
