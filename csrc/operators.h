// The implementations of torch.ops.imcl_fast.*, one set for each device: they turn tensors
// into plain descriptions and call that device's kernels. csrc/registration.cpp registers them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "torch_stable.h"

namespace imcl {

using torch::stable::Tensor;

// (xs, penalty, center, eps, batched, precision, keep) -> (loss, state)
using PairwiseForward = std::tuple<Tensor, std::vector<Tensor>>(const std::vector<Tensor>&, int64_t,
                                                                bool, double, bool, int64_t, bool);
// (grad, xs, state, penalty, center, eps, batched, precision) -> dxs
using PairwiseBackward = std::vector<Tensor>(const Tensor&, const std::vector<Tensor>&,
                                             const std::vector<Tensor>&, int64_t, bool, double,
                                             bool, int64_t);
// (logits, target, weight, sample_weight, ce_weight, kl_weight, groups, temperature, teacher,
// detach, divergence, beta, label_smoothing, ignore_index, binary, reduction, keep)
// -> (loss, terms, gradients)
using ConsistencyForward = std::tuple<Tensor, Tensor, std::vector<Tensor>>(
    const std::vector<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const std::vector<double>&, const std::vector<double>&,
    const std::vector<int64_t>&, const std::vector<double>&, const std::vector<int64_t>&,
    const std::vector<bool>&, const std::vector<int64_t>&, const std::vector<double>&, double,
    int64_t, bool, int64_t, bool);

// (xs, scale) -> (grams, means)
using GramForward = std::tuple<Tensor, std::vector<Tensor>>(const std::vector<Tensor>&,
                                                            const std::vector<double>&);
// (s, xs, means) -> dxs
using GramBackward = std::vector<Tensor>(const Tensor&, const std::vector<Tensor>&,
                                         const std::vector<Tensor>&);

namespace cpu {
PairwiseForward pairwise_forward;
PairwiseBackward pairwise_backward;
ConsistencyForward consistency;
GramForward gram_forward;
GramBackward gram_backward;
}  // namespace cpu

namespace cuda {
PairwiseForward pairwise_forward;
PairwiseBackward pairwise_backward;
ConsistencyForward consistency;
GramForward gram_forward;
GramBackward gram_backward;
}  // namespace cuda

}  // namespace imcl
