// The operators torch.ops.imcl_fast.*: their schemas, and the CPU implementations that
// turn tensors into plain descriptions and call csrc/cpu. Stable ABI only, so that one
// build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <atomic>
#include <deque>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work is handed out one index at a time: tasks differ in cost.
void run_parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  const int64_t threads =
      std::min<int64_t>(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, context);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i, context);
  });
}

imcl::Parallel parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()), run_parallel};
}

imcl::Kernels chosen_kernels() { return imcl::kernels_of(imcl::chosen_isa()); }

imcl::DType dtype_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor");
  switch (x.scalar_type()) {
    case ScalarType::Float: return imcl::DType::kFloat32;
    case ScalarType::Double: return imcl::DType::kFloat64;
    case ScalarType::BFloat16: return imcl::DType::kBFloat16;
    case ScalarType::Half: return imcl::DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected a floating-point tensor");
  }
}

ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

void write(const Tensor& out, int64_t index, double value) {
  if (out.scalar_type() == ScalarType::Double) {
    static_cast<double*>(out.mutable_data_ptr())[index] = value;
  } else {
    static_cast<float*>(out.mutable_data_ptr())[index] = static_cast<float>(value);
  }
}

double read(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) return *static_cast<const double*>(x.const_data_ptr());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "grad: expected float32 or float64, the dtype of the loss");
  return static_cast<double>(*static_cast<const float*>(x.const_data_ptr()));
}

// Asks for huge pages for memory about to be written. The CPU allocator returns large
// tensors to the system and gets them back page by page, at 2 microseconds each.
void* advised(const Tensor& x) {
  void* data = x.mutable_data_ptr();
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (last > first + kHuge)  // advice: nothing is lost if the system can't follow it
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return data;
}

// Axes of strided tensors; keeps the offset tables of those that don't collapse.
class Axes {
 public:
  // Dimensions [first, last) of x as one axis, the last running fastest.
  imcl::Axis of(const Tensor& x, int64_t first, int64_t last) {
    const auto sizes = x.sizes(), strides = x.strides();
    int64_t stride = 1, expected = 0, count = 1;
    bool seen = false, collapses = true;
    for (int64_t d = last - 1; d >= first; --d) {
      count *= sizes[d];
      if (sizes[d] == 1) continue;
      if (!seen) stride = strides[d];
      else if (strides[d] != expected) collapses = false;
      seen = true;
      expected = strides[d] * sizes[d];
    }
    if (collapses) return {stride, nullptr};
    std::vector<int64_t>& table = tables_.emplace_back(static_cast<std::size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, offset = 0;
      for (int64_t d = last - 1; d >= first; --d) {
        offset += rest % sizes[d] * strides[d];
        rest /= sizes[d];
      }
      table[static_cast<std::size_t>(i)] = offset;
    }
    return {0, table.data()};
  }

 private:
  std::deque<std::vector<int64_t>> tables_;
};

// ---- the pairwise cosine penalty ----

imcl::PairwiseSettings settings_of(int64_t penalty, bool center, double eps, int64_t precision) {
  return {static_cast<imcl::Penalty>(penalty), center, eps,
          static_cast<imcl::Precision>(precision)};
}

imcl::Matrices matrices_of(const Tensor& x, bool batched, std::size_t layers, Axes& axes) {
  STD_TORCH_CHECK(x.dim() >= (batched ? 2 : 1), "xs: expected (B, N, *) or (N, *)");
  imcl::Matrices m{};
  const int64_t row = batched ? 1 : 0;
  m.dtype = dtype_of(x, "xs");
  m.batch = batched ? x.size(0) : 1;
  m.rows = x.size(row);
  m.columns = 1;
  for (int64_t d = row + 1; d < x.dim(); ++d) m.columns *= x.size(d);
  m.x = x.const_data_ptr();
  m.batch_axis = batched ? axes.of(x, 0, 1) : imcl::Axis{0, nullptr};
  m.row_axis = axes.of(x, row, row + 1);
  m.column_axis = axes.of(x, row + 1, x.dim());
  const double pairs = static_cast<double>(m.rows) * static_cast<double>(m.rows - 1);
  m.scale = 1.0 / (static_cast<double>(layers) *
                   static_cast<double>(std::max<int64_t>(m.batch, 1)) * std::max(pairs, 1.0));
  return m;
}

std::tuple<Tensor, std::vector<Tensor>> pairwise_forward(const std::vector<Tensor>& xs,
                                                         int64_t penalty, bool center, double eps,
                                                         bool batched, int64_t precision,
                                                         bool keep) {
  STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one tensor");
  const imcl::PairwiseSettings settings = settings_of(penalty, center, eps, precision);
  Axes axes;
  std::vector<imcl::Matrices> problems;
  std::vector<Tensor> state;
  ScalarType loss_type = ScalarType::Float;
  for (const Tensor& x : xs) {
    imcl::Matrices m = matrices_of(x, batched, xs.size(), axes);
    if (m.dtype == imcl::DType::kFloat64) loss_type = ScalarType::Double;
    if (keep) {
      state.push_back(allocate({m.batch, imcl::state_size(settings, m.rows, m.columns)},
                               accumulation_type(x), x));
      m.state = advised(state.back());
    }
    problems.push_back(m);
  }
  const Tensor loss = allocate({}, loss_type, xs[0]);
  write(loss, 0,
        imcl::pairwise_forward(*chosen_kernels().pairwise, problems, settings, parallel()));
  return {loss, state};
}

std::vector<Tensor> pairwise_backward(const Tensor& grad, const std::vector<Tensor>& xs,
                                      const std::vector<Tensor>& state, int64_t penalty,
                                      bool center, double eps, bool batched, int64_t precision) {
  STD_TORCH_CHECK(state.size() == xs.size(), "state: expected one tensor per tensor of xs");
  const imcl::PairwiseSettings settings = settings_of(penalty, center, eps, precision);
  Axes axes;
  std::vector<imcl::Matrices> problems;
  std::vector<Tensor> gradients;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    imcl::Matrices m = matrices_of(xs[i], batched, xs.size(), axes);
    const Tensor& dx = gradients.emplace_back(torch::stable::empty_like(xs[i]));
    const int64_t row = batched ? 1 : 0;
    m.dx = advised(dx);
    m.dx_batch_axis = batched ? axes.of(dx, 0, 1) : imcl::Axis{0, nullptr};
    m.dx_row_axis = axes.of(dx, row, row + 1);
    m.dx_column_axis = axes.of(dx, row + 1, dx.dim());
    m.state = const_cast<void*>(state[i].const_data_ptr());
    STD_TORCH_CHECK(state[i].numel() == m.batch * imcl::state_size(settings, m.rows, m.columns),
                    "state: expected the state that pairwise_forward returned");
    problems.push_back(m);
  }
  imcl::pairwise_backward(*chosen_kernels().pairwise, problems, settings, read(grad), parallel());
  return gradients;
}

// ---- collaborative consistency ----

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

// Gradients of the logits: one (H, B, K) if all of them are contiguous, so that scaling it is
// one operation; else one for each, strided as it is.
struct Gradients {
  bool stacked = true;
  std::vector<Tensor> tensors;

  Gradients(const std::vector<Tensor>& logits, int64_t heads) {
    for (const Tensor& z : logits) stacked = stacked && z.is_contiguous();
    if (stacked) {
      const int64_t row = logits[0].dim() - 2;
      tensors.push_back(allocate({heads, logits[0].size(row), logits[0].size(row + 1)},
                                 accumulation_type(logits[0]), logits[0]));
    } else {
      for (const Tensor& z : logits) tensors.push_back(empty_gradient(z));
    }
    for (const Tensor& gradient : tensors) advised(gradient);
  }
};

// The heads of all blocks (B, K) or (h, B, K), and of their gradients unless those are null.
std::vector<imcl::Head> heads_of(const std::vector<Tensor>& logits, const Gradients* gradients,
                                 const std::vector<double>& ce_weight,
                                 const std::vector<double>& kl_weight) {
  std::vector<imcl::Head> heads;
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
      imcl::Head head{};
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

std::tuple<Tensor, Tensor, std::vector<Tensor>> consistency(
    const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
    const std::vector<double>& ce_weight, const std::vector<double>& kl_weight,
    const std::vector<int64_t>& groups, const std::vector<double>& temperature,
    const std::vector<int64_t>& teacher, const std::vector<bool>& detach, double label_smoothing,
    int64_t ignore_index, int64_t reduction, bool keep) {
  STD_TORCH_CHECK(!logits.empty() && (logits[0].dim() == 2 || logits[0].dim() == 3),
                  "logits: expected at least one tensor (B, K) or (h, B, K)");
  imcl::Consistency problem{};
  problem.dtype = dtype_of(logits[0], "logits");
  problem.batch = logits[0].size(logits[0].dim() - 2);
  problem.classes = logits[0].size(logits[0].dim() - 1);
  for (const Tensor& z : logits) {
    STD_TORCH_CHECK((z.dim() == 2 || z.dim() == 3) && z.size(z.dim() - 2) == problem.batch &&
                        z.size(z.dim() - 1) == problem.classes && problem.classes > 0,
                    "logits: expected (B, K) or (h, B, K) of one B and K > 0");
    STD_TORCH_CHECK(dtype_of(z, "logits") == problem.dtype, "logits: expected one dtype");
  }
  std::optional<Gradients> gradients;
  if (keep) gradients.emplace(logits, static_cast<int64_t>(ce_weight.size()));
  problem.heads = heads_of(logits, gradients ? &*gradients : nullptr, ce_weight, kl_weight);
  const auto heads = static_cast<int64_t>(problem.heads.size());
  STD_TORCH_CHECK(temperature.size() == groups.size() && teacher.size() == groups.size() &&
                      detach.size() == groups.size(),
                  "temperature, teacher, detach: expected one value per group");
  int64_t first = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    STD_TORCH_CHECK(groups[g] > 0, "groups: expected positive sizes");
    problem.groups.push_back(
        {first, groups[g], temperature[g], static_cast<imcl::Teacher>(teacher[g]), detach[g]});
    first += groups[g];
  }
  STD_TORCH_CHECK(first == heads, "groups: expected sizes that sum to the number of heads");
  if (target) {
    STD_TORCH_CHECK(target->is_cpu() && target->scalar_type() == ScalarType::Long &&
                        target->dim() == 1 && target->size(0) == problem.batch,
                    "target: expected int64 of shape (B,) on the CPU");
    problem.target = static_cast<const int64_t*>(target->const_data_ptr());
    problem.target_stride = target->stride(0);
  }
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;

  const auto mode = static_cast<imcl::Reduction>(reduction);
  std::vector<double> per_sample(static_cast<std::size_t>(problem.batch));
  std::vector<double> sums(static_cast<std::size_t>(2 * heads));
  imcl::consistency(*chosen_kernels().consistency, problem, mode, per_sample.data(), sums.data(),
                    parallel());

  const std::vector<Tensor> kept = gradients ? gradients->tensors : std::vector<Tensor>{};
  const ScalarType dtype = accumulation_type(logits[0]);
  const Tensor terms = allocate({2, heads}, dtype, logits[0]);
  for (int64_t i = 0; i < 2 * heads; ++i) write(terms, i, sums[static_cast<std::size_t>(i)]);
  if (mode == imcl::Reduction::kNone) {
    const Tensor loss = allocate({problem.batch}, dtype, logits[0]);
    for (int64_t b = 0; b < problem.batch; ++b)
      write(loss, b, per_sample[static_cast<std::size_t>(b)]);
    return {loss, terms, kept};
  }
  double total = 0;
  for (double each : per_sample) total += each;
  const Tensor loss = allocate({}, dtype, logits[0]);
  write(loss, 0, total);
  return {loss, terms, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY(imcl_fast, m) {
  m.def(
      "pairwise_forward(Tensor[] xs, int penalty, bool center, float eps, bool batched, "
      "int precision, bool keep) -> (Tensor, Tensor[])");
  m.def(
      "pairwise_backward(Tensor grad, Tensor[] xs, Tensor[] state, int penalty, bool center, "
      "float eps, bool batched, int precision) -> Tensor[]");
  m.def(
      "consistency(Tensor[] logits, Tensor? target, float[] ce_weight, float[] kl_weight, "
      "int[] groups, float[] temperature, int[] teacher, bool[] detach, float label_smoothing, "
      "int ignore_index, int reduction, bool keep) -> (Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(imcl_fast, CPU, m) {
  m.impl("pairwise_forward", TORCH_BOX(&pairwise_forward));
  m.impl("pairwise_backward", TORCH_BOX(&pairwise_backward));
  m.impl("consistency", TORCH_BOX(&consistency));
}
