// The operators torch.ops.imcl_fast.*: their schemas, and which function serves which device.
// Stable ABI only, so that one build serves every torch from 2.11 on.
#include "operators.h"

// The overloads' name, LAYOUT of imcl_fast/schemas.py, which says why there is one.
#define IMCL_LAYOUT ".v4"

STABLE_TORCH_LIBRARY(imcl_fast, m) {
  m.def("pairwise" IMCL_LAYOUT
        "(Tensor[] xs, int penalty, bool center, float eps, bool batched, "
        "int precision, bool keep) -> (Tensor, Tensor[])");
  m.def("pairwise_backward" IMCL_LAYOUT
        "(Tensor grad, Tensor[] xs, Tensor[] state, int penalty, bool center, "
        "float eps, bool batched, int precision) -> Tensor[]");
  m.def("consistency" IMCL_LAYOUT
        "(Tensor[] logits, Tensor? target, Tensor? weight, Tensor? sample_weight, "
        "float[] ce_weight, float[] kl_weight, int[] groups, float[] temperature, int[] teacher, "
        "bool[] detach, int[] divergence, float[] beta, float label_smoothing, int ignore_index, "
        "bool binary, int reduction, bool keep) -> (Tensor, Tensor, Tensor[])");
  m.def("gram_forward" IMCL_LAYOUT "(Tensor[] xs, float[] scale) -> (Tensor, Tensor[])");
  m.def("gram_backward" IMCL_LAYOUT "(Tensor s, Tensor[] xs, Tensor[] means) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(imcl_fast, CPU, m) {
  m.impl("pairwise" IMCL_LAYOUT, TORCH_BOX(&imcl::cpu::pairwise_forward));
  m.impl("pairwise_backward" IMCL_LAYOUT, TORCH_BOX(&imcl::cpu::pairwise_backward));
  m.impl("consistency" IMCL_LAYOUT, TORCH_BOX(&imcl::cpu::consistency));
  m.impl("gram_forward" IMCL_LAYOUT, TORCH_BOX(&imcl::cpu::gram_forward));
  m.impl("gram_backward" IMCL_LAYOUT, TORCH_BOX(&imcl::cpu::gram_backward));
}

#if defined(IMCL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(imcl_fast, CUDA, m) {
  m.impl("pairwise" IMCL_LAYOUT, TORCH_BOX(&imcl::cuda::pairwise_forward));
  m.impl("pairwise_backward" IMCL_LAYOUT, TORCH_BOX(&imcl::cuda::pairwise_backward));
  m.impl("consistency" IMCL_LAYOUT, TORCH_BOX(&imcl::cuda::consistency));
  m.impl("gram_forward" IMCL_LAYOUT, TORCH_BOX(&imcl::cuda::gram_forward));
  m.impl("gram_backward" IMCL_LAYOUT, TORCH_BOX(&imcl::cuda::gram_backward));
}
#endif
