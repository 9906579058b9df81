// Shares the samples out to the threads and reduces their losses in order, so that the
// result doesn't depend on the threads.
#include "consistency.h"

#include <algorithm>
#include <limits>

namespace imcl {
namespace {

constexpr int64_t kTask = 16384;  // logits a task is worth

template <class Work>
void each_sample(const Consistency& problem, const Parallel& parallel, const Work& work) {
  const int64_t logits =
      std::max<int64_t>(1, problem.classes * static_cast<int64_t>(problem.heads.size()));
  const int64_t step = std::max<int64_t>(1, kTask / logits);
  const int64_t tasks = (problem.batch + step - 1) / step;
  const auto run = [&](int64_t task) {
    for (int64_t b = task * step; b < std::min((task + 1) * step, problem.batch); ++b) work(b);
  };
  if (tasks > 1) {
    parallel(tasks, run);
  } else if (tasks == 1) {
    run(0);
  }
}

int64_t element_size(const Consistency& problem) {
  return problem.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
}

}  // namespace

int64_t consistency_forward(const ConsistencyKernels& kernels, const Consistency& problem,
                            void* stats, double* per_sample, double* terms,
                            const Parallel& parallel) {
  const auto heads = static_cast<int64_t>(problem.heads.size());
  const int64_t stats_size = heads * kStatsPerHead * element_size(problem);
  std::vector<double> each(static_cast<std::size_t>(2 * heads * problem.batch));
  each_sample(problem, parallel, [&](int64_t b) {
    if (!problem.counts(b)) return;
    double* cross_entropy = each.data() + b * 2 * heads;
    kernels.forward(problem, b, static_cast<char*>(stats) + b * stats_size, cross_entropy,
                    cross_entropy + heads);
  });
  int64_t count = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    count += problem.counts(b);
    per_sample[b] = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const Head& head = problem.heads[static_cast<std::size_t>(h)];
      const double *ce = each.data() + b * 2 * heads + h, *kl = ce + heads;
      per_sample[b] += head.ce_weight * *ce + head.kl_weight * *kl;
      terms[h] += *ce;
      terms[heads + h] += *kl;
    }
  }
  return count;
}

void consistency_backward(const ConsistencyKernels& kernels, const Consistency& problem,
                          const void* stats, const double* scale, const Parallel& parallel) {
  const int64_t stats_size =
      static_cast<int64_t>(problem.heads.size()) * kStatsPerHead * element_size(problem);
  each_sample(problem, parallel, [&](int64_t b) {
    kernels.backward(problem, b, static_cast<const char*>(stats) + b * stats_size, scale[b]);
  });
}

}  // namespace imcl
