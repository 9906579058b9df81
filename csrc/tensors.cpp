#include "tensors.h"

#include <algorithm>
#include <array>

namespace imcl {
namespace {

// Empty, shaped and strided like x, in the accumulation type.
Tensor empty_gradient(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(accumulation_type(x))),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The heads of all blocks (B, K) or (h, B, K), and of their gradients unless those are null.
std::vector<Head> heads_of(const std::vector<Tensor>& logits, const Gradients* gradients,
                           const std::vector<double>& ce_weight,
                           const std::vector<double>& kl_weight) {
  std::vector<Head> heads;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const Tensor& z = logits[i];
    const int64_t row = z.dim() - 2;
    // Where head h of a tensor begins, in bytes.
    const auto begin = [](const Tensor& x, int64_t h) {
      return (x.dim() == 3 ? h * x.stride(0) : 0) * static_cast<int64_t>(x.element_size());
    };
    for (int64_t h = 0; h < (row == 1 ? z.size(0) : 1); ++h) {
      STD_TORCH_CHECK(heads.size() < ce_weight.size() && heads.size() < kl_weight.size(),
                      "ce_weight, kl_weight: expected one value per head");
      Head head{};
      head.z = static_cast<const char*>(z.const_data_ptr()) + begin(z, h);
      head.z_row = z.stride(row);
      head.z_class = z.stride(row + 1);
      head.ce_weight = ce_weight[heads.size()];
      head.kl_weight = kl_weight[heads.size()];
      if (gradients) {
        const Tensor& dz = gradients->tensors[gradients->stacked ? 0 : i];
        const int64_t index = gradients->stacked ? static_cast<int64_t>(heads.size()) : h;
        head.dz = static_cast<char*>(dz.mutable_data_ptr()) + begin(dz, index);
        head.dz_row = dz.stride(dz.dim() - 2);
        head.dz_class = dz.stride(dz.dim() - 1);
      }
      heads.push_back(head);
    }
  }
  STD_TORCH_CHECK(heads.size() == ce_weight.size() && heads.size() == kl_weight.size(),
                  "ce_weight, kl_weight: expected one value per head");
  return heads;
}

// The labels of a problem whose sizes are known, but for their smoothing and ignored index.
Labels labels_of(const Consistency& problem, ScalarType acc, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& weight, const std::optional<Tensor>& sample_weight) {
  Labels labels{};
  if (target && target->scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(target->dim() == 1 && target->size(0) == problem.batch,
                    "target: expected indices of shape (B,)");
    labels.target = static_cast<const int64_t*>(target->const_data_ptr());
    labels.target_stride = target->stride(0);
  } else if (target) {
    STD_TORCH_CHECK(target->scalar_type() == acc && target->dim() == 2 &&
                        target->size(0) == problem.batch && target->size(1) == problem.classes,
                    "target: expected int64, or (B, K) in the dtype of the loss");
    labels.probabilities = target->const_data_ptr();
    labels.probability_row = target->stride(0);
    labels.probability_class = target->stride(1);
  }
  const auto weights = [&](const std::optional<Tensor>& from, int64_t size, const char* name,
                           const void*& data, int64_t& stride) {
    if (!from) return;
    STD_TORCH_CHECK(from->scalar_type() == acc && from->dim() == 1 && from->size(0) == size, name,
                    ": expected ", size, " numbers in the dtype of the loss");
    data = from->const_data_ptr();
    stride = from->stride(0);
  };
  weights(weight, problem.classes, "weight", labels.weight, labels.weight_stride);
  weights(sample_weight, problem.batch, "sample_weight", labels.sample_weight,
          labels.sample_weight_stride);
  return labels;
}

}  // namespace

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected a floating-point tensor");
  }
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

PairwiseSettings settings_of(int64_t penalty, bool center, double eps, int64_t precision) {
  return {static_cast<Penalty>(penalty), center, eps, static_cast<Precision>(precision)};
}

double scale_of(std::size_t layers, int64_t batch, int64_t rows) {
  const double pairs = static_cast<double>(rows) * static_cast<double>(rows - 1);
  return 1.0 / (static_cast<double>(layers) * static_cast<double>(std::max<int64_t>(batch, 1)) *
                std::max(pairs, 1.0));
}

Gradients::Gradients(const std::vector<Tensor>& logits, int64_t heads) {
  for (const Tensor& z : logits) stacked = stacked && z.is_contiguous();
  if (stacked) {
    const int64_t row = logits[0].dim() - 2;
    tensors.push_back(allocate({heads, logits[0].size(row), logits[0].size(row + 1)},
                               accumulation_type(logits[0]), logits[0]));
  } else {
    for (const Tensor& z : logits) tensors.push_back(empty_gradient(z));
  }
}

void check_logits(const std::vector<Tensor>& logits) {
  STD_TORCH_CHECK(!logits.empty() && (logits[0].dim() == 2 || logits[0].dim() == 3),
                  "logits: expected at least one tensor (B, K) or (h, B, K)");
  const int64_t batch = logits[0].size(logits[0].dim() - 2);
  const int64_t classes = logits[0].size(logits[0].dim() - 1);
  const DType dtype = dtype_of(logits[0], "logits");
  for (const Tensor& z : logits) {
    STD_TORCH_CHECK((z.dim() == 2 || z.dim() == 3) && z.size(z.dim() - 2) == batch &&
                        z.size(z.dim() - 1) == classes && classes > 0,
                    "logits: expected (B, K) or (h, B, K) of one B and K > 0");
    STD_TORCH_CHECK(dtype_of(z, "logits") == dtype, "logits: expected one dtype");
  }
}

Consistency consistency_of(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                           const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& sample_weight, const Gradients* gradients, const std::vector<double>& ce_weight,
                           const std::vector<double>& kl_weight, const std::vector<int64_t>& groups,
                           const std::vector<double>& temperature,
                           const std::vector<int64_t>& teacher, const std::vector<bool>& detach,
                           double label_smoothing, int64_t ignore_index) {
  Consistency problem{};
  problem.dtype = dtype_of(logits[0], "logits");
  problem.batch = logits[0].size(logits[0].dim() - 2);
  problem.classes = logits[0].size(logits[0].dim() - 1);
  problem.heads = heads_of(logits, gradients, ce_weight, kl_weight);
  STD_TORCH_CHECK(temperature.size() == groups.size() && teacher.size() == groups.size() &&
                      detach.size() == groups.size(),
                  "temperature, teacher, detach: expected one value per group");
  int64_t first = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    STD_TORCH_CHECK(groups[g] > 0, "groups: expected positive sizes");
    problem.groups.push_back(
        {first, groups[g], temperature[g], static_cast<Teacher>(teacher[g]), detach[g]});
    first += groups[g];
  }
  STD_TORCH_CHECK(first == static_cast<int64_t>(problem.heads.size()),
                  "groups: expected sizes that sum to the number of heads");
  problem.labels = labels_of(problem, accumulation_type(logits[0]), target, weight, sample_weight);
  problem.labels.smoothing = label_smoothing;
  problem.labels.ignore_index = ignore_index;
  return problem;
}

}  // namespace imcl
