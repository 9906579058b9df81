// Tensors as both devices' operators make and read them. Stable ABI only, so that one build
// serves every torch from 2.11 on.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "problem.h"
#include "torch_stable.h"

namespace imcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x, const char* name);

ScalarType accumulation_type(const Tensor& x);

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like);

// Empty, shaped and strided like x and of its dtype, as torch.empty_like.
Tensor allocate_like(const Tensor& x);

PairwiseSettings settings_of(int64_t penalty, bool center, double eps, int64_t precision);

// 1 / (layers * batch * rows * (rows - 1)), the factor of every term of the penalty.
double scale_of(std::size_t layers, int64_t batch, int64_t rows);

// Sizes of the dimensions of the samples: (B,), or those of dense logits.
std::vector<int64_t> samples_of(const Tensor& z);

// Gradients of the logits: one (H, *samples, K) if all of them are contiguous, so that scaling it
// is one operation; else one for each, strided as it is.
struct Gradients {
  bool stacked = true;
  std::vector<Tensor> tensors;

  Gradients(const std::vector<Tensor>& logits, int64_t heads);
};

// Throws unless they are (B, K) or (h, *samples, K) of the same samples, K and dtype.
void check_logits(const std::vector<Tensor>& logits);

// The arguments of the operator, checked but for the logits and for devices. Without gradients
// their pointers are null.
Consistency consistency_of(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                           const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& sample_weight, const Gradients* gradients,
                           const std::vector<double>& ce_weight,
                           const std::vector<double>& kl_weight, const std::vector<int64_t>& groups,
                           const std::vector<double>& temperature,
                           const std::vector<int64_t>& teacher, const std::vector<bool>& detach,
                           const std::vector<int64_t>& divergence, const std::vector<double>& beta,
                           double label_smoothing, int64_t ignore_index, bool binary);

}  // namespace imcl
