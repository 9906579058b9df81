// The CPU implementations of torch.ops.imcl_fast.*: tensors become plain descriptions.
#include "../operators.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "dispatch.h"
#include "isa.h"

namespace imcl::cpu {
namespace {

// Work is handed out one index at a time: tasks differ in cost.
void run_parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  const int64_t threads =
      std::min<int64_t>(count, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (threads <= 1) return one_thread().run(count, body, context);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i, context);
  });
}

Parallel parallel() { return {static_cast<int>(torch::stable::get_num_threads()), run_parallel}; }

Kernels chosen_kernels() { return kernels_of(chosen_isa()); }

void check_device(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": expected a CPU tensor");
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
  using Dimensions = std::vector<int64_t>;

  // These dimensions of x as one axis, the last running fastest.
  Axis of(const Tensor& x, const Dimensions& dimensions) {
    const auto sizes = x.sizes(), strides = x.strides();
    int64_t stride = 1, expected = 0, count = 1;
    bool seen = false, collapses = true;
    for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
      count *= sizes[*d];
      if (sizes[*d] == 1) continue;
      if (!seen) stride = strides[*d];
      else if (strides[*d] != expected) collapses = false;
      seen = true;
      expected = strides[*d] * sizes[*d];
    }
    if (collapses) return {stride, nullptr};
    std::vector<int64_t>& table = tables_.emplace_back(static_cast<std::size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, offset = 0;
      for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
        offset += rest % sizes[*d] * strides[*d];
        rest /= sizes[*d];
      }
      table[static_cast<std::size_t>(i)] = offset;
    }
    return {0, table.data()};
  }

 private:
  std::deque<std::vector<int64_t>> tables_;
};

// ---- the pairwise cosine penalty ----

// The dimensions of a row, from the one that is the slowest in memory to the fastest: a cosine
// doesn't care for their order, and a channels_last weight then has dense rows as well.
Axes::Dimensions columns_of(const Tensor& x, bool batched) {
  Axes::Dimensions columns;
  for (int64_t d = batched ? 2 : 1; d < x.dim(); ++d) columns.push_back(d);
  const auto strides = x.strides();
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return columns;
}

// But for the scale.
Matrices matrices_of(const Tensor& x, bool batched, Axes& axes) {
  STD_TORCH_CHECK(x.dim() >= (batched ? 2 : 1), "xs: expected (B, N, *) or (N, *)");
  Matrices m{};
  const int64_t row = batched ? 1 : 0;
  check_device(x, "xs");
  m.dtype = dtype_of(x, "xs");
  m.batch = batched ? x.size(0) : 1;
  m.rows = x.size(row);
  m.columns = 1;
  for (int64_t d = row + 1; d < x.dim(); ++d) m.columns *= x.size(d);
  m.x = x.const_data_ptr();
  m.batch_axis = batched ? axes.of(x, {0}) : Axis{0, nullptr};
  m.row_axis = axes.of(x, {row});
  m.column_axis = axes.of(x, columns_of(x, batched));
  return m;
}

// Where each layer's state lies: behind one another in one tensor for each accumulation type,
// in order of appearance, every one at the start of a cache line.
class States {
 public:
  explicit States(const PairwiseSettings& settings) : settings_(settings) {}

  void add(const Matrices& m) {
    constexpr int64_t kLine = 16;  // elements
    const auto same = [&](const Store& store) { return store.wide == wide(m); };
    auto store = std::find_if(stores_.begin(), stores_.end(), same);
    if (store == stores_.end()) store = stores_.insert(store, Store{wide(m), 0});
    const int64_t size = m.batch * state_size(settings_, m.rows, m.columns);
    places_.push_back({store - stores_.begin(), store->size});
    store->size += (size + kLine - 1) / kLine * kLine;
  }

  std::vector<Tensor> allocated(const Tensor& like) const {
    std::vector<Tensor> tensors;
    for (const Store& store : stores_) {
      tensors.push_back(
          allocate({store.size}, store.wide ? ScalarType::Double : ScalarType::Float, like));
      advised(tensors.back());
    }
    return tensors;
  }

  void check(const std::vector<Tensor>& tensors) const {
    bool same = tensors.size() == stores_.size();
    for (std::size_t i = 0; same && i < stores_.size(); ++i) {
      same = tensors[i].numel() == stores_[i].size &&
             (tensors[i].scalar_type() == ScalarType::Double) == stores_[i].wide;
    }
    STD_TORCH_CHECK(same, "state: expected the state that pairwise_forward returned");
  }

  void point(std::vector<Matrices>& layers, const std::vector<Tensor>& tensors) const {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const Tensor& tensor = tensors[static_cast<std::size_t>(places_[i].store)];
      const auto offset = places_[i].begin * static_cast<int64_t>(tensor.element_size());
      layers[i].state = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + offset;
    }
  }

 private:
  struct Store {
    bool wide;
    int64_t size;
  };
  struct Place {
    std::ptrdiff_t store;
    int64_t begin;
  };

  static bool wide(const Matrices& m) { return m.dtype == DType::kFloat64; }

  PairwiseSettings settings_;
  std::vector<Store> stores_;
  std::vector<Place> places_;
};

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> pairwise_forward(const std::vector<Tensor>& xs,
                                                         int64_t penalty, bool center, double eps,
                                                         bool batched, int64_t precision,
                                                         bool keep) {
  STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one tensor");
  const PairwiseSettings settings = settings_of(penalty, center, eps, precision);
  Axes axes;
  std::vector<Matrices> layers;
  layers.reserve(xs.size());
  States states(settings);
  ScalarType loss_type = ScalarType::Float;
  for (const Tensor& x : xs) {
    Matrices& m = layers.emplace_back(matrices_of(x, batched, axes));
    m.scale = scale_of(xs.size(), m.batch, m.rows);
    states.add(m);
    if (m.dtype == DType::kFloat64) loss_type = ScalarType::Double;
  }
  std::vector<Tensor> state;
  if (keep) {
    state = states.allocated(xs[0]);
    states.point(layers, state);
  }
  const Tensor loss = allocate({}, loss_type, xs[0]);
  write(loss, 0, imcl::pairwise_forward(*chosen_kernels().pairwise, layers, settings, parallel()));
  return {loss, state};
}

std::vector<Tensor> pairwise_backward(const Tensor& grad, const std::vector<Tensor>& xs,
                                      const std::vector<Tensor>& state, int64_t penalty,
                                      bool center, double eps, bool batched, int64_t precision) {
  const PairwiseSettings settings = settings_of(penalty, center, eps, precision);
  Axes axes;
  std::vector<Matrices> layers;
  layers.reserve(xs.size());
  States states(settings);
  std::vector<Tensor> gradients;
  gradients.reserve(xs.size());
  for (const Tensor& x : xs) {
    Matrices& m = layers.emplace_back(matrices_of(x, batched, axes));
    m.scale = scale_of(xs.size(), m.batch, m.rows);
    states.add(m);
    const Tensor& dx = gradients.emplace_back(allocate_like(x));
    m.dx = advised(dx);
    if (x.is_contiguous()) {
      m.dx_batch_axis = m.batch_axis;
      m.dx_row_axis = m.row_axis;
      m.dx_column_axis = m.column_axis;
      continue;
    }
    m.dx_batch_axis = batched ? axes.of(dx, {0}) : Axis{0, nullptr};
    m.dx_row_axis = axes.of(dx, {batched ? 1 : 0});
    m.dx_column_axis = axes.of(dx, columns_of(x, batched));
  }
  states.check(state);
  states.point(layers, state);
  imcl::pairwise_backward(*chosen_kernels().pairwise, layers, settings, read(grad), parallel());
  return gradients;
}

// ---- collaborative consistency ----

std::tuple<Tensor, Tensor, std::vector<Tensor>> consistency(
    const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& sample_weight,
    const std::vector<double>& ce_weight, const std::vector<double>& kl_weight,
    const std::vector<int64_t>& groups, const std::vector<double>& temperature,
    const std::vector<int64_t>& teacher, const std::vector<bool>& detach,
    const std::vector<int64_t>& divergence, const std::vector<double>& beta, double label_smoothing,
    int64_t ignore_index, bool binary, int64_t reduction, bool keep) {
  check_logits(logits);
  for (const Tensor& z : logits) check_device(z, "logits");
  if (target) check_device(*target, "target");
  if (weight) check_device(*weight, "weight");
  if (sample_weight) check_device(*sample_weight, "sample_weight");
  std::optional<Gradients> gradients;
  if (keep) {
    gradients.emplace(logits, static_cast<int64_t>(ce_weight.size()));
    for (const Tensor& gradient : gradients->tensors) advised(gradient);
  }
  const Consistency problem =
      consistency_of(logits, target, weight, sample_weight, gradients ? &*gradients : nullptr,
                     ce_weight, kl_weight, groups, temperature, teacher, detach, divergence, beta,
                     label_smoothing, ignore_index, binary);
  const auto heads = static_cast<int64_t>(problem.heads.size());
  const auto mode = static_cast<Reduction>(reduction);
  const bool each = mode == Reduction::kNone;
  std::vector<double> losses(static_cast<std::size_t>(each ? problem.batch : 0));
  std::vector<double> sums(static_cast<std::size_t>(2 * heads));
  const double total = imcl::consistency(*chosen_kernels().consistency, problem, mode,
                                         each ? losses.data() : nullptr, sums.data(), parallel());

  const std::vector<Tensor> kept = gradients ? gradients->tensors : std::vector<Tensor>{};
  const ScalarType dtype = accumulation_type(logits[0]);
  const Tensor terms = allocate({2, heads}, dtype, logits[0]);
  for (int64_t i = 0; i < 2 * heads; ++i) write(terms, i, sums[static_cast<std::size_t>(i)]);
  if (each) {
    const std::vector<int64_t> sizes = samples_of(logits[0]);
    const Tensor loss = torch::stable::new_empty(logits[0], {sizes.data(), sizes.size()}, dtype);
    for (int64_t b = 0; b < problem.batch; ++b) write(loss, b, losses[static_cast<std::size_t>(b)]);
    return {loss, terms, kept};
  }
  const Tensor loss = allocate({}, dtype, logits[0]);
  write(loss, 0, total);
  return {loss, terms, kept};
}

// ---- Grams of samples ----

namespace {

// The samples of xs, whose Grams, or what takes their place, lie one after the other in grams.
std::vector<Representation> representations_of(const std::vector<Tensor>& xs, const Tensor& grams,
                                               Axes& axes) {
  std::vector<Representation> all;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    Representation s{};
    s.x = matrices_of(xs[i], false, axes);
    STD_TORCH_CHECK(s.x.rows == xs[0].size(0) && accumulation_type(xs[i]) == grams.scalar_type(),
                    "xs: expected as many samples in each, and all float64 or none");
    const auto offset = static_cast<int64_t>(i) * s.x.rows * s.x.rows;
    s.gram = const_cast<char*>(static_cast<const char*>(grams.const_data_ptr())) +
             offset * static_cast<int64_t>(grams.element_size());
    all.push_back(s);
  }
  return all;
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> gram_forward(const std::vector<Tensor>& xs,
                                                     const std::vector<double>& scale) {
  STD_TORCH_CHECK(!xs.empty() && xs[0].dim() > 0, "xs: expected at least one tensor (B, *)");
  STD_TORCH_CHECK(scale.size() == xs.size(), "scale: expected one number per tensor of xs");
  const ScalarType dtype = accumulation_type(xs[0]);
  const int64_t rows = xs[0].size(0);
  const Tensor grams = allocate({static_cast<int64_t>(xs.size()), rows, rows}, dtype, xs[0]);
  Axes axes;
  std::vector<Representation> all = representations_of(xs, grams, axes);
  std::vector<Tensor> means;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    all[i].x.scale = scale[i];
    all[i].mean = means.emplace_back(allocate({all[i].x.columns}, dtype, xs[0])).mutable_data_ptr();
  }
  imcl::gram_forward(*chosen_kernels().dependence, all, parallel());
  return {grams, means};
}

std::vector<Tensor> gram_backward(const Tensor& s, const std::vector<Tensor>& xs,
                                  const std::vector<Tensor>& means) {
  STD_TORCH_CHECK(!xs.empty() && means.size() == xs.size() && s.is_contiguous() &&
                      s.numel() == static_cast<int64_t>(xs.size()) * xs[0].size(0) * xs[0].size(0),
                  "s: expected (n, B, B), contiguous, for n tensors (B, *) and their means");
  Axes axes;
  std::vector<Representation> all = representations_of(xs, s, axes);
  std::vector<Tensor> gradients;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const Tensor& dx = gradients.emplace_back(torch::stable::empty_like(xs[i]));
    Matrices& m = all[i].x;
    m.dx = advised(dx);
    m.dx_row_axis = axes.of(dx, {0});
    m.dx_column_axis = axes.of(dx, columns_of(xs[i], false));
    STD_TORCH_CHECK(means[i].numel() == m.columns && means[i].scalar_type() == s.scalar_type(),
                    "means: expected what gram_forward returned");
    all[i].mean = const_cast<void*>(means[i].const_data_ptr());
  }
  imcl::gram_backward(*chosen_kernels().dependence, all, parallel());
  return gradients;
}

}  // namespace imcl::cpu
