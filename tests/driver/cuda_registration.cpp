// The CUDA operators, whose kernels run on the CPU here, as torch.ops.imcl_fast_emulated.*;
// tests/cuda_emulation.py has copied the schemas.
#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(imcl_fast_emulated, CPU, m) {
  m.impl("pairwise", TORCH_BOX(&imcl::cuda::pairwise_forward));
  m.impl("pairwise_backward", TORCH_BOX(&imcl::cuda::pairwise_backward));
  m.impl("consistency", TORCH_BOX(&imcl::cuda::consistency));
  m.impl("gram_forward", TORCH_BOX(&imcl::cuda::gram_forward));
  m.impl("gram_backward", TORCH_BOX(&imcl::cuda::gram_backward));
}
