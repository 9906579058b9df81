#include "tensors.h"

#include <algorithm>
#include <array>

namespace imcl {
namespace {

// As kept_type() has it.
ScalarType kept_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Half ? ScalarType::Float : logits.scalar_type();
}

// Empty, shaped and strided like x, in its kept_type.
Tensor empty_gradient(const Tensor& x) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(std::optional<ScalarType>(kept_type(x))),
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

// The dimensions of the samples of logits (B, K) or (h, *samples, K): the first, and how many.
int64_t first_sample(const Tensor& z) { return z.dim() == 2 ? 0 : 1; }
int64_t sample_dimensions(const Tensor& z) { return z.dim() - 1 - first_sample(z); }

// Makes of the dimensions of the samples as few axes as the strides of all tensors allow.
class Collapse {
 public:
  Collapse(const Tensor& z) : first_(first_sample(z)) {
    for (int64_t d = 0; d < sample_dimensions(z); ++d) sizes_.push_back(z.size(first_ + d));
    together_.assign(sizes_.size(), true);
  }

  // x has the samples from this dimension on.
  void see(const Tensor& x, int64_t first) {
    int64_t expected = 0;
    bool seen = false;
    for (std::size_t d = sizes_.size(); d-- > 0;) {
      if (sizes_[d] == 1) continue;
      const int64_t stride = x.stride(first + static_cast<int64_t>(d));
      if (seen && stride != expected) together_[d] = false;
      seen = true;
      expected = stride * sizes_[d];
    }
  }

  SampleAxes samples() const {
    SampleAxes samples{0, {}};
    walk([&](std::size_t d, bool begins) {
      if (begins) samples.sizes[samples.axes++] = 1;
      samples.sizes[samples.axes - 1] *= sizes_[d];
    });
    return samples;
  }

  Strides strides(const Tensor& x, int64_t first) const {
    Strides strides{};
    int axis = -1;
    walk([&](std::size_t d, bool begins) {
      if (begins) ++axis;
      if (sizes_[d] != 1) strides.of[axis] = x.stride(first + static_cast<int64_t>(d));
    });
    return strides;
  }

 private:
  // together_[d]: d runs on into the next dimension that is larger than 1.
  template <class Body>
  void walk(const Body& body) const {
    int axes = 0;
    bool begins = true;
    for (std::size_t d = 0; d < sizes_.size(); ++d) {
      STD_TORCH_CHECK(!begins || ++axes <= kMostAxes, "logits: expected at most ", kMostAxes,
                      " dimensions of samples that don't collapse");
      body(d, begins);
      begins = sizes_[d] != 1 && !together_[d];
    }
  }

  int64_t first_;
  std::vector<int64_t> sizes_;
  std::vector<bool> together_;
};

// The heads of all stacks (B, K) or (h, *samples, K), and of their gradients unless those are
// null.
std::vector<Head> heads_of(const std::vector<Tensor>& logits, const Gradients* gradients,
                           const Collapse& collapse, const std::vector<double>& ce_weight,
                           const std::vector<double>& kl_weight) {
  std::vector<Head> heads;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const Tensor& z = logits[i];
    // Where head h of a tensor begins, in bytes.
    const auto begin = [](const Tensor& x, int64_t h) {
      return (x.dim() > 2 ? h * x.stride(0) : 0) * static_cast<int64_t>(x.element_size());
    };
    for (int64_t h = 0; h < (z.dim() > 2 ? z.size(0) : 1); ++h) {
      STD_TORCH_CHECK(heads.size() < ce_weight.size() && heads.size() < kl_weight.size(),
                      "ce_weight, kl_weight: expected one value per head");
      Head head{};
      head.z = static_cast<const char*>(z.const_data_ptr()) + begin(z, h);
      head.z_sample = collapse.strides(z, first_sample(z));
      head.z_class = z.stride(z.dim() - 1);
      head.ce_weight = ce_weight[heads.size()];
      head.kl_weight = kl_weight[heads.size()];
      if (gradients) {
        const Tensor& dz = gradients->tensors[gradients->stacked ? 0 : i];
        const int64_t index = gradients->stacked ? static_cast<int64_t>(heads.size()) : h;
        head.dz = static_cast<char*>(dz.mutable_data_ptr()) + begin(dz, index);
        head.dz_sample = collapse.strides(dz, first_sample(dz));
        head.dz_class = dz.stride(dz.dim() - 1);
      }
      heads.push_back(head);
    }
  }
  STD_TORCH_CHECK(heads.size() == ce_weight.size() && heads.size() == kl_weight.size(),
                  "ce_weight, kl_weight: expected one value per head");
  return heads;
}

// Whether x has the samples of the logits z, and `more` dimensions behind them.
bool has_samples_of(const Tensor& x, const Tensor& z, int64_t more) {
  if (x.dim() != sample_dimensions(z) + more) return false;
  for (int64_t d = 0; d < sample_dimensions(z); ++d)
    if (x.size(d) != z.size(first_sample(z) + d)) return false;
  return true;
}

// The labels of the logits z, but for their smoothing and ignored index.
Labels labels_of(const Tensor& z, int64_t classes, const Collapse& collapse,
                 const std::optional<Tensor>& target, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& sample_weight) {
  Labels labels{};
  const ScalarType acc = accumulation_type(z);
  if (target && target->scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(has_samples_of(*target, z, 0), "target: expected an index for each sample");
    labels.target = static_cast<const int64_t*>(target->const_data_ptr());
    labels.target_sample = collapse.strides(*target, 0);
  } else if (target) {
    STD_TORCH_CHECK(target->scalar_type() == acc && has_samples_of(*target, z, 1) &&
                        target->size(target->dim() - 1) == classes,
                    "target: expected int64, or (*samples, K) in the dtype of the loss");
    labels.probabilities = target->const_data_ptr();
    labels.probability_sample = collapse.strides(*target, 0);
    labels.probability_class = target->stride(target->dim() - 1);
  }
  if (weight) {
    STD_TORCH_CHECK(
        weight->scalar_type() == acc && weight->dim() == 1 && weight->size(0) == classes,
        "weight: expected (K,) in the dtype of the loss");
    labels.weight = weight->const_data_ptr();
    labels.weight_stride = weight->stride(0);
  }
  if (sample_weight) {
    STD_TORCH_CHECK(sample_weight->scalar_type() == acc && has_samples_of(*sample_weight, z, 0),
                    "sample_weight: expected a number for each sample in the dtype of the loss");
    labels.sample_weight = sample_weight->const_data_ptr();
    labels.weight_sample = collapse.strides(*sample_weight, 0);
  }
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
    std::vector<int64_t> sizes{heads};
    for (int64_t d = first_sample(logits[0]); d < logits[0].dim(); ++d)
      sizes.push_back(logits[0].size(d));
    tensors.push_back(
        torch::stable::new_empty(logits[0], {sizes.data(), sizes.size()}, kept_type(logits[0])));
  } else {
    for (const Tensor& z : logits) tensors.push_back(empty_gradient(z));
  }
}

void check_logits(const std::vector<Tensor>& logits) {
  STD_TORCH_CHECK(!logits.empty() && logits[0].dim() >= 2,
                  "logits: expected at least one tensor (B, K) or (h, *samples, K)");
  const Tensor& first = logits[0];
  const DType dtype = dtype_of(first, "logits");
  for (const Tensor& z : logits) {
    bool same = z.dim() >= 2 && sample_dimensions(z) == sample_dimensions(first);
    for (int64_t d = 0; same && d <= sample_dimensions(z); ++d)
      same = z.size(first_sample(z) + d) == first.size(first_sample(first) + d);
    STD_TORCH_CHECK(same && z.size(z.dim() - 1) > 0,
                    "logits: expected (B, K) or (h, *samples, K) of the same samples and K > 0");
    STD_TORCH_CHECK(dtype_of(z, "logits") == dtype, "logits: expected one dtype");
  }
}

std::vector<int64_t> samples_of(const Tensor& z) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < sample_dimensions(z); ++d) sizes.push_back(z.size(first_sample(z) + d));
  return sizes;
}

Consistency consistency_of(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                           const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& sample_weight, const Gradients* gradients,
                           const std::vector<double>& ce_weight,
                           const std::vector<double>& kl_weight, const std::vector<int64_t>& groups,
                           const std::vector<double>& temperature,
                           const std::vector<int64_t>& teacher, const std::vector<bool>& detach,
                           const std::vector<int64_t>& divergence, const std::vector<double>& beta,
                           double label_smoothing, int64_t ignore_index, bool binary) {
  Consistency problem{};
  problem.dtype = dtype_of(logits[0], "logits");
  problem.batch = 1;
  for (const int64_t size : samples_of(logits[0])) problem.batch *= size;
  problem.classes = logits[0].size(logits[0].dim() - 1);
  problem.binary = binary;
  if (binary) {
    STD_TORCH_CHECK(problem.classes == 1, "logits: expected one class of two, (*samples, 1)");
    STD_TORCH_CHECK(!weight && (!target || target->scalar_type() != ScalarType::Long),
                    "target, weight: expected probabilities of two classes, and no weights");
    problem.classes = 2;
  }
  Collapse collapse(logits[0]);
  for (const Tensor& z : logits) collapse.see(z, first_sample(z));
  if (gradients)
    for (const Tensor& dz : gradients->tensors) collapse.see(dz, first_sample(dz));
  for (const auto* x : {&target, &sample_weight}) {
    if (!*x) continue;
    STD_TORCH_CHECK((*x)->dim() >= sample_dimensions(logits[0]),
                    "target, sample_weight: expected one for each sample");
    collapse.see(**x, 0);
  }
  problem.samples = collapse.samples();
  problem.heads = heads_of(logits, gradients, collapse, ce_weight, kl_weight);
  STD_TORCH_CHECK(temperature.size() == groups.size() && teacher.size() == groups.size() &&
                      detach.size() == groups.size() && divergence.size() == groups.size() &&
                      beta.size() == groups.size(),
                  "temperature, teacher, detach, divergence, beta: expected one value per group");
  int64_t first = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    STD_TORCH_CHECK(groups[g] > 0, "groups: expected positive sizes");
    problem.groups.push_back({first, groups[g], temperature[g], static_cast<Teacher>(teacher[g]),
                              detach[g], static_cast<Divergence>(divergence[g]), beta[g]});
    STD_TORCH_CHECK(problem.groups.back().divergence != Divergence::kMixture ||
                        (target && !weight && temperature[g] == 1),
                    "divergence: expected a target, no weight and T = 1 for a mixture");
    first += groups[g];
  }
  STD_TORCH_CHECK(first == static_cast<int64_t>(problem.heads.size()),
                  "groups: expected sizes that sum to the number of heads");
  problem.labels = labels_of(logits[0], problem.classes, collapse, target, weight, sample_weight);
  problem.labels.smoothing = label_smoothing;
  problem.labels.ignore_index = ignore_index;
  return problem;
}

}  // namespace imcl
