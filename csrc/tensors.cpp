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

// Without the dispatcher, which costs as much as the allocation.
Tensor strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype,
               const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, to<int32_t>(from(dtype)),
                                                  device_type, device_index, &tensor));
  return Tensor(tensor);
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
  std::array<int64_t, 4> strides{};
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "allocate: expected 4 dimensions at most");
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes.begin()[d]) strides[d] = stride;
  return strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), dtype, like);
}

Tensor allocate_like(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  return strided(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type(), x);
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
                           const Gradients* gradients, const std::vector<double>& ce_weight,
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
  if (target) {
    STD_TORCH_CHECK(target->scalar_type() == ScalarType::Long && target->dim() == 1 &&
                        target->size(0) == problem.batch,
                    "target: expected int64 of shape (B,)");
    problem.target = static_cast<const int64_t*>(target->const_data_ptr());
    problem.target_stride = target->stride(0);
  }
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  return problem;
}

}  // namespace imcl
