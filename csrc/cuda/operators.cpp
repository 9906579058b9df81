// The CUDA implementations of torch.ops.imcl_fast.*: tensors become plain descriptions, and
// kernels are launched on torch's current stream. Nothing here waits for the device.
#include "../operators.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "consistency.h"
#include "dependence.h"
#include "launch.h"
#include "layers.h"

#if !defined(IMCL_CUDA_ON_CPU)
// Weak: a torch without CUDA doesn't have it, and loads this library for its CPU kernels.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace imcl::cuda {
namespace {

// The device of a call's tensors, current for as long as this lives, and its current stream.
// In the tests the device is the CPU (IMCL_CUDA_ON_CPU), without a stream.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()) {
#if !defined(IMCL_CUDA_ON_CPU)
    STD_TORCH_CHECK(x.is_cuda(), "expected CUDA tensors");
    guard_.emplace(index_);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
#endif
  }

  cudaStream_t stream() const { return stream_; }

  void check(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.get_device_index() == index_, name, ": expected all tensors on one device");
#if !defined(IMCL_CUDA_ON_CPU)
    STD_TORCH_CHECK(x.is_cuda(), name, ": expected a CUDA tensor");
#endif
  }

  int processors() const {
    int device = 0, count = 0;
    throw_if(cudaGetDevice(&device));
    throw_if(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  }

  static void throw_if(cudaError_t error) {
    // What is told now is not told again, by a call that went well.
    if (error != cudaSuccess) (void)cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "imcl_fast: CUDA: ", cudaGetErrorString(error));
  }

 private:
  int32_t index_;
  cudaStream_t stream_ = nullptr;
#if !defined(IMCL_CUDA_ON_CPU)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// Working memory of a call: tickets, 0 at first, and numbers behind them, on 16 bytes.
struct Workspace {
  int64_t before;  // the numbers, in doubles
  Tensor memory;

  Workspace(int64_t doubles, const Tensor& like, const Device& device, int64_t tickets = 1)
      : before(divide_up(tickets, 4) * 2),
        memory(allocate({before + doubles}, ScalarType::Double, like)) {
    const auto bytes = static_cast<std::size_t>(tickets) * sizeof(unsigned);
    Device::throw_if(cudaMemsetAsync(ticket(), 0, bytes, device.stream()));
  }
  unsigned* ticket() const { return static_cast<unsigned*>(memory.mutable_data_ptr()); }
  double* doubles() const { return static_cast<double*>(memory.mutable_data_ptr()) + before; }
};

// Launches a kernel on the layers of one dtype.
template <class Launcher, class Call, class Type>
void launch(Launcher* launcher, const Call& call, const Type& type, const Device& device) {
  Device::throw_if(launcher(&call, type.layers.data(), static_cast<int64_t>(type.layers.size()),
                            type.dimensions.data(), device.stream()));
}

void check_samples(const std::vector<Tensor>& xs, const Tensor& grams, const Device& device) {
  for (const Tensor& x : xs) {
    device.check(x, "xs");
    STD_TORCH_CHECK(
        x.dim() > 0 && x.size(0) == xs[0].size(0) && accumulation_type(x) == grams.scalar_type(),
        "xs: expected as many samples in each, and all float64 or none");
  }
}

}  // namespace

// ---- the pairwise cosine penalty ----

std::tuple<Tensor, std::vector<Tensor>> pairwise_forward(const std::vector<Tensor>& xs,
                                                         int64_t penalty, bool center, double eps,
                                                         bool batched, int64_t precision,
                                                         bool keep) {
  STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one tensor");
  const Device device(xs[0]);
  PairwiseCall call{};
  for (const Tensor& x : xs) {
    device.check(x, "xs");
    call.is_double = call.is_double || x.scalar_type() == ScalarType::Double;
  }
  call.settings = settings_of(penalty, center, eps, precision);
  call.layers = static_cast<int64_t>(xs.size());
  const std::vector<TypedLayers> types = layers_by_dtype(xs, nullptr, call.settings, batched);
  for (const TypedLayers& type : types) call.programs += type.forward_programs;

  const Tensor loss = allocate({}, call.is_double ? ScalarType::Double : ScalarType::Float, xs[0]);
  call.loss = loss.mutable_data_ptr();
  if (call.programs == 0)  // nobody will write it
    Device::throw_if(cudaMemsetAsync(call.loss, 0, loss.element_size(), device.stream()));
  const Workspace workspace(call.programs, xs[0], device);
  call.partials = workspace.doubles();
  call.ticket = workspace.ticket();
  std::vector<Tensor> state;
  for (const TypedLayers& type : types) {
    const Tensor& first = *type.first;
    call.dtype = dtype_of(first, "xs");
    if (keep)
      call.state = state.emplace_back(allocate({type.state_size}, accumulation_type(first), first))
                       .mutable_data_ptr();
    launch(imcl_cuda_pairwise_forward, call, type, device);
    call.first_program += type.forward_programs;
  }
  return {loss, state};
}

std::vector<Tensor> pairwise_backward(const Tensor& grad, const std::vector<Tensor>& xs,
                                      const std::vector<Tensor>& state, int64_t penalty,
                                      bool center, double eps, bool batched, int64_t precision) {
  STD_TORCH_CHECK(!xs.empty(), "xs: expected at least one tensor");
  const Device device(xs[0]);
  device.check(grad, "grad");
  STD_TORCH_CHECK(grad.numel() == 1 && (grad.scalar_type() == ScalarType::Double ||
                                        grad.scalar_type() == ScalarType::Float),
                  "grad: expected one float32 or float64, as the loss is");
  std::vector<Tensor> gradients;
  for (const Tensor& x : xs) {
    device.check(x, "xs");
    gradients.push_back(allocate_like(x));
  }
  PairwiseCall call{};
  call.settings = settings_of(penalty, center, eps, precision);
  call.layers = static_cast<int64_t>(xs.size());
  call.is_double = grad.scalar_type() == ScalarType::Double;
  call.grad = grad.const_data_ptr();
  const std::vector<TypedLayers> types = layers_by_dtype(xs, &gradients, call.settings, batched);
  STD_TORCH_CHECK(state.size() == types.size(), "state: expected one tensor per dtype of xs");
  for (std::size_t i = 0; i < types.size(); ++i) {
    const TypedLayers& type = types[i];
    const Tensor& first = *type.first;
    device.check(state[i], "state");
    STD_TORCH_CHECK(
        state[i].numel() == type.state_size && state[i].scalar_type() == accumulation_type(first),
        "state: expected the state that pairwise_forward returned");
    call.dtype = dtype_of(first, "xs");
    call.state = const_cast<void*>(state[i].const_data_ptr());  // read only
    launch(imcl_cuda_pairwise_backward, call, type, device);
  }
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
  const Device device(logits[0]);
  for (const Tensor& z : logits) device.check(z, "logits");
  if (target) device.check(*target, "target");
  if (weight) device.check(*weight, "weight");
  if (sample_weight) device.check(*sample_weight, "sample_weight");
  const auto heads = static_cast<int64_t>(ce_weight.size());
  STD_TORCH_CHECK(heads <= kMostHeads, "logits: expected at most ", kMostHeads,
                  " heads for the CUDA kernel, got ", heads,
                  "; pass impl=\"triton\" or impl=\"torch\"");

  std::optional<Gradients> gradients;
  if (keep) gradients.emplace(logits, heads);
  const Consistency problem =
      consistency_of(logits, target, weight, sample_weight, gradients ? &*gradients : nullptr,
                     ce_weight, kl_weight, groups, temperature, teacher, detach, divergence, beta,
                     label_smoothing, ignore_index, binary);
  STD_TORCH_CHECK(problem.classes <= int64_t{1} << 30,
                  "logits: expected at most 2^30 classes, got ", problem.classes);
  ConsistencyArguments arguments =
      consistency_arguments(problem, static_cast<Reduction>(reduction));
  const ConsistencyPlan plan = consistency_plan(problem.dtype, arguments, device.processors());

  const ScalarType dtype = accumulation_type(logits[0]);
  const std::vector<int64_t> samples = samples_of(logits[0]);
  const Tensor loss =
      arguments.reduction == Reduction::kNone
          ? torch::stable::new_empty(logits[0], {samples.data(), samples.size()}, dtype)
          : allocate({}, dtype, logits[0]);
  const Tensor terms = allocate({2, heads}, dtype, logits[0]);
  const Workspace workspace(2 * heads * plan.blocks, logits[0], device);
  arguments.loss = loss.mutable_data_ptr();
  arguments.terms = terms.mutable_data_ptr();
  arguments.partials = workspace.doubles();
  arguments.ticket = workspace.ticket();
  Device::throw_if(imcl_cuda_consistency(problem.dtype, &arguments, &plan, device.stream()));
  return {loss, terms, gradients ? gradients->tensors : std::vector<Tensor>{}};
}

// ---- Grams of samples ----

std::tuple<Tensor, std::vector<Tensor>> gram_forward(const std::vector<Tensor>& xs,
                                                     const std::vector<double>& scale) {
  STD_TORCH_CHECK(!xs.empty() && xs[0].dim() > 0, "xs: expected at least one tensor (B, *)");
  STD_TORCH_CHECK(scale.size() == xs.size(), "scale: expected one number per tensor of xs");
  const Device device(xs[0]);
  const int64_t rows = xs[0].size(0);
  const Tensor grams =
      allocate({static_cast<int64_t>(xs.size()), rows, rows}, accumulation_type(xs[0]), xs[0]);
  check_samples(xs, grams, device);
  DependenceCall call{};
  call.grams = grams_layer(grams);
  call.grams.dx = grams.mutable_data_ptr();
  std::vector<Tensor> means;
  for (const TypedGramLayers& type : gram_layers_by_dtype(xs, nullptr, &scale)) {
    const Tensor& first = *type.first;
    call.dtype = dtype_of(first, "xs");
    call.means = means.emplace_back(allocate({type.state_size}, accumulation_type(first), first))
                     .mutable_data_ptr();
    call.span = span_of(type.layers, gram_tiles(rows), kBlocksAtOnce * device.processors());
    int64_t programs = 0;
    bool divided = false;
    for (const Layer& layer : type.layers) {
      programs += gram_programs(layer, call.span);
      divided = divided || gram_parts(layer.columns, call.span) > 1;
    }
    std::optional<Workspace> workspace;
    if (divided) {
      const int64_t of_tile = kTile * kTile * static_cast<int64_t>(grams.element_size());
      workspace.emplace(programs * (of_tile / static_cast<int64_t>(sizeof(double))), first, device,
                        programs);
      call.partials = workspace->doubles();
      call.tickets = workspace->ticket();
    }
    launch(imcl_cuda_gram_forward, call, type, device);
  }
  return {grams, means};
}

std::vector<Tensor> gram_backward(const Tensor& s, const std::vector<Tensor>& xs,
                                  const std::vector<Tensor>& means) {
  STD_TORCH_CHECK(!xs.empty() && xs[0].dim() > 0, "xs: expected at least one tensor (B, *)");
  const Device device(xs[0]);
  device.check(s, "s");
  const int64_t rows = xs[0].size(0);
  STD_TORCH_CHECK(s.dim() == 3 && s.size(0) == static_cast<int64_t>(xs.size()) &&
                      s.size(1) == rows && s.size(2) == rows && s.is_contiguous(),
                  "s: expected (n, B, B), contiguous, for n tensors (B, *)");
  check_samples(xs, s, device);
  std::vector<Tensor> gradients;
  for (const Tensor& x : xs) gradients.push_back(allocate_like(x));
  DependenceCall call{};
  call.grams = grams_layer(s);
  const auto types = gram_layers_by_dtype(xs, &gradients, nullptr);
  STD_TORCH_CHECK(means.size() == types.size(), "means: expected one tensor per dtype of xs");
  for (std::size_t i = 0; i < types.size(); ++i) {
    const TypedGramLayers& type = types[i];
    device.check(means[i], "means");
    STD_TORCH_CHECK(means[i].numel() == type.state_size &&
                        means[i].scalar_type() == accumulation_type(*type.first),
                    "means: expected what gram_forward returned");
    call.dtype = dtype_of(*type.first, "xs");
    call.means = const_cast<void*>(means[i].const_data_ptr());  // read only
    call.span = span_of(type.layers, divide_up(rows, kTile), kBlocksAtOnce * device.processors());
    launch(imcl_cuda_gram_backward, call, type, device);
  }
  return gradients;
}

}  // namespace imcl::cuda
