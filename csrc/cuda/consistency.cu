// Collaborative consistency, value and gradient, in one launch.
//
// loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h/T), q_h = softmax(t_h)
// dz_h = ce_h (softmax(z_h) sum(y) - y) + kl_h T (p_h - q_h)
//
// with t_h, what teachers learn that aren't detached, and P, Q, V and W of pairwise ones as in
// docs/math.md, "Collaborative consistency". Labels y are an index, smoothed or not, or soft: any
// number for each class, class weights included.
//
// Other divergences, of the same teachers, stand in consistency_divergences.h; a mixture has none:
// it is ce_h KL(y || m) + kl_h KL(p_h || m), m = beta y + (1 - beta) sum_h kl_h p_h / sum_h kl_h.
//
// A team of threads, a warp or a block, takes a sample at a time, and the groups of heads in
// turn. It takes the classes in chunks of all heads of the group together, read once into
// shared memory, where every thread sees only what it has read itself: no barrier stands
// between reading and using them. Maxima and sums run along from chunk to chunk (online softmax).
// Up to some thousand classes that is one chunk, still there when the gradient is made of it;
// beyond that a second pass reads the chunks again (a third with "pairwise" teachers).
#include <algorithm>

#include "consistency.h"
#include "consistency_work.h"
#include "numbers.h"
#include "reduction.h"

namespace imcl {
namespace {

// Bytes of shared memory: what a block may take at most, which every GPU from sm_80 on has;
// what it takes where the classes don't fit into that; and what a launch has for the asking.
constexpr std::size_t kOneChunk = std::size_t{96} << 10, kManyChunks = std::size_t{32} << 10;
constexpr std::size_t kGranted = std::size_t{47} << 10;
constexpr int kMostThreads = 256;

// Factors of the cross entropies and of the divergences.
struct Means {
  double cross_entropy, kl;
};

__device__ inline double inverse(double total) { return total == 0 ? 0 : 1 / total; }

// 1 / the weights that their means are divided by, for every thread of the block.
template <class A>
__device__ Means means(const ConsistencyArguments& in) {
  const Labels& labels = in.labels;
  if (!labels.target && !labels.sample_weight) {
    const double mean = inverse(static_cast<double>(in.batch));
    return {mean, mean};
  }
  IMCL_SHARED(of_warps, double[2 * kMostThreads / 32]);
  double cross_entropy = 0, kl = 0;
  for (int64_t b = threadIdx.x; b < in.batch; b += blockDim.x) {
    const auto share = static_cast<double>(share_of<A>(in, b));
    if (share == 0) continue;
    kl += share;
    cross_entropy += share * static_cast<double>(label_weight<A>(in, b));
  }
  cross_entropy = warp_sum(cross_entropy);
  kl = warp_sum(kl);
  if (threadIdx.x % warpSize == 0) {
    of_warps[threadIdx.x / warpSize * 2] = cross_entropy;
    of_warps[threadIdx.x / warpSize * 2 + 1] = kl;
  }
  __syncthreads();
  cross_entropy = kl = 0;
  for (unsigned w = 0; w < blockDim.x / warpSize; ++w) {
    cross_entropy += of_warps[w * 2];
    kl += of_warps[w * 2 + 1];
  }
  return {inverse(cross_entropy), inverse(kl)};
}

// Blocks that a multiprocessor is to hold at once: as many as need no register spilled.
template <class T, bool kGeneral>
constexpr int kBlocks = sizeof(T) <= 4 && !kGeneral ? 2 : 1;

// What is most often asked for takes fewer registers by itself: see Work.
template <class T, bool kGeneral>
__global__ void __launch_bounds__(kMostThreads, (kBlocks<T, kGeneral>))
    consistency_kernel(IMCL_PARAMETER(ConsistencyArguments) in, bool warps) {
  using A = Acc<T>;
  IMCL_DYNAMIC_SHARED(memory, unsigned char);
  const Means mean = in.reduction == Reduction::kSum ? Means{1, 1} : means<A>(in);
  const Means loss_scale = in.reduction == Reduction::kMean ? mean : Means{1, 1};

  const Team team(warps);
  Work<T, kGeneral> work(in, team, memory);
  const int64_t teams = int64_t{gridDim.x} * team.count;
  for (int64_t b = int64_t{blockIdx.x} * team.count + team.index; b < in.batch; b += teams)
    work.sample(b, static_cast<A>(loss_scale.cross_entropy), static_cast<A>(loss_scale.kl));
  __syncthreads();

  const int terms = 2 * in.head_count;
  const Layout<T> layout(in.head_count, in.largest_group, team.size, in.packs);
  for (int i = static_cast<int>(threadIdx.x); i < terms; i += static_cast<int>(blockDim.x)) {
    double sum = 0;
    for (int t = 0; t < team.count; ++t)
      sum +=
          reinterpret_cast<const double*>(memory + layout.bytes() * static_cast<std::size_t>(t))[i];
    in.partials[int64_t{i} * gridDim.x + blockIdx.x] = sum;
  }
  if (!draws_last_ticket(in.ticket, gridDim.x)) return;
  auto* totals = reinterpret_cast<double*>(memory);  // (2, heads), over the first team's terms
  for (int i = static_cast<int>(threadIdx.x) / warpSize; i < terms;
       i += static_cast<int>(blockDim.x) / warpSize) {
    const double sum = total(in.partials + int64_t{i} * gridDim.x, gridDim.x);
    if (threadIdx.x % warpSize == 0) {
      totals[i] = sum;
      static_cast<A*>(in.terms)[i] =
          static_cast<A>(sum * (i < in.head_count ? mean.cross_entropy : mean.kl));
    }
  }
  if (in.reduction == Reduction::kNone) return;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double loss = 0;
  for (int g = 0; g < in.group_count; ++g) {
    const Group& group = in.groups[g];
    for (int64_t h = group.first; h < group.first + group.size; ++h)
      loss += times(in.heads[h].ce_weight, totals[h] * loss_scale.cross_entropy) +
              times(in.heads[h].kl_weight, totals[in.head_count + h] * loss_scale.kl);
  }
  *static_cast<A*>(in.loss) = static_cast<A>(loss);
}

template <class T, bool kGeneral>
cudaError_t launch(const ConsistencyArguments& arguments, const ConsistencyPlan& plan,
                   cudaStream_t stream) {
  const auto kernel = consistency_kernel<T, kGeneral>;
  if (plan.shared_bytes > kGranted) {
    // As much as any plan has, for the limit is the device's: another thread's launch may be next.
    const std::size_t most = std::max(plan.shared_bytes, kOneChunk);
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error != cudaSuccess) return error;
  }
  IMCL_LAUNCH(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream)(arguments, plan.warps);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const ConsistencyArguments& arguments, const ConsistencyPlan& plan,
                   cudaStream_t stream) {
  return arguments.general ? launch<T, true>(arguments, plan, stream)
                           : launch<T, false>(arguments, plan, stream);
}

template <class T>
ConsistencyPlan plan_of(ConsistencyArguments& in, int processors) {
  constexpr int kPack = Pack<T>::kSize;
  const auto on_16 = [&](const void* base, const Strides& strides, int64_t step, std::size_t size) {
    bool all = step == 1 && reinterpret_cast<std::uintptr_t>(base) % 16 == 0;
    for (int axis = 0; axis < in.samples.axes; ++axis)
      all = all && strides.of[axis] * static_cast<int64_t>(size) % 16 == 0;
    return all;
  };
  in.packed = in.classes % kPack == 0 && !in.binary;
  for (int h = 0; h < in.head_count; ++h) {
    const Head& head = in.heads[h];
    in.packed = in.packed && on_16(head.z, head.z_sample, head.z_class, sizeof(T)) &&
                (!in.gradient || on_16(head.dz, head.dz_sample, head.dz_class, sizeof(Kept<T>)));
  }

  const auto bytes = [&](int threads, int64_t packs) {
    return Layout<T>(in.head_count, in.largest_group, threads, static_cast<int>(packs)).bytes();
  };
  const auto packs_of = [&](int threads) {
    return std::max<int64_t>(1, (in.classes + threads * kPack - 1) / (threads * kPack));
  };
  // One pack for each thread, as far as that goes.
  int threads = 32;
  while (threads < kMostThreads && packs_of(threads) > 1) threads *= 2;
  while (threads > 32 && bytes(threads, 1) > kOneChunk) threads /= 2;  // there are many heads
  int64_t packs = packs_of(threads);
  if (bytes(threads, packs) > kOneChunk)
    for (packs = 1; bytes(threads, packs + 1) <= kManyChunks;) ++packs;
  in.packs = static_cast<int>(packs);
  in.chunks =
      static_cast<int>((in.classes + threads * kPack * packs - 1) / (threads * kPack * packs));

  ConsistencyPlan plan{};
  plan.warps = threads == 32;
  int teams = 1;
  if (plan.warps)  // several to a block, but not when that leaves processors idle
    while (teams < 8 && in.batch > teams * int64_t{processors} &&
           bytes(32, packs) * static_cast<std::size_t>(2 * teams) <= kManyChunks)
      teams *= 2;
  plan.threads = threads * teams;
  plan.shared_bytes = bytes(threads, packs) * static_cast<std::size_t>(teams);
  // As many blocks as run at once, each with its share of the samples.
  const auto fit = static_cast<int64_t>(
      std::min<std::size_t>((std::size_t{200} << 10) / (plan.shared_bytes + 1024),
                            2048 / static_cast<std::size_t>(plan.threads)));
  const int64_t wanted = (in.batch + teams - 1) / teams;
  plan.blocks = static_cast<int>(
      std::clamp<int64_t>(wanted, 1, processors * std::clamp<int64_t>(fit, 1, 16)));
  return plan;
}

}  // namespace

ConsistencyArguments consistency_arguments(const Consistency& problem, Reduction reduction) {
  ConsistencyArguments arguments{};
  std::copy(problem.heads.begin(), problem.heads.end(), arguments.heads);
  std::copy(problem.groups.begin(), problem.groups.end(), arguments.groups);
  arguments.head_count = static_cast<int>(problem.heads.size());
  arguments.group_count = static_cast<int>(problem.groups.size());
  arguments.binary = problem.binary;
  arguments.general = problem.binary || problem.labels.soft() || problem.samples.axes > 1;
  for (const Group& group : problem.groups) {
    const bool mixture = group.divergence == Divergence::kMixture;  // its label counts as a head
    arguments.largest_group =
        std::max(arguments.largest_group, static_cast<int>(group.size) + (mixture ? 1 : 0));
    arguments.general = arguments.general || group.divergence != Divergence::kKl;
  }
  arguments.batch = problem.batch;
  arguments.classes = problem.classes;
  arguments.samples = problem.samples;
  arguments.labels = problem.labels;
  arguments.reduction = reduction;
  arguments.gradient = problem.heads.front().dz != nullptr;
  return arguments;
}

ConsistencyPlan consistency_plan(DType dtype, ConsistencyArguments& arguments, int processors) {
  return with_type(dtype, [&](auto* z) {
    return plan_of<std::remove_pointer_t<decltype(z)>>(arguments, processors);
  });
}

}  // namespace imcl

extern "C" cudaError_t imcl_cuda_consistency(imcl::DType dtype,
                                             const imcl::ConsistencyArguments* arguments,
                                             const imcl::ConsistencyPlan* plan,
                                             cudaStream_t stream) {
  return imcl::with_type(dtype, [&](auto* z) {
    return imcl::launch<std::remove_pointer_t<decltype(z)>>(*arguments, *plan, stream);
  });
}
