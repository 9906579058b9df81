// Shares the samples out to the threads and reduces their losses in order, so that the
// result doesn't depend on the threads.
#include "consistency.h"

#include <algorithm>

namespace imcl {
namespace {

constexpr int64_t kTask = 16384;  // logits a task is worth

template <class Acc>
void clear_row(const Head& head, int64_t sample, int64_t classes) {
  Acc* row = static_cast<Acc*>(head.dz) + sample * head.dz_row;
  for (int64_t k = 0; k < classes; ++k) row[k * head.dz_class] = 0;
}

void clear_gradient(const Consistency& problem, int64_t sample) {
  for (const Head& head : problem.heads) {
    if (!head.dz) continue;
    if (problem.dtype == DType::kFloat64) clear_row<double>(head, sample, problem.classes);
    else clear_row<float>(head, sample, problem.classes);
  }
}

// A term may be infinite; what has no weight is left out.
double weighted(double weight, double term) { return weight == 0 ? 0.0 : weight * term; }

}  // namespace

void consistency(const ConsistencyKernels& kernels, const Consistency& problem, Reduction reduction,
                 double* per_sample, double* terms, const Parallel& parallel) {
  const auto heads = static_cast<int64_t>(problem.heads.size());
  int64_t count = 0;
  for (int64_t b = 0; b < problem.batch; ++b) count += counts(problem, b);
  const double mean = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
  const double loss_scale = reduction == Reduction::kMean ? mean : 1.0;
  const double term_scale = reduction == Reduction::kSum ? 1.0 : mean;

  std::vector<double> each(static_cast<std::size_t>(2 * heads * problem.batch));
  const int64_t logits = std::max<int64_t>(1, problem.classes * heads);
  const int64_t step = std::max<int64_t>(1, kTask / logits);
  const auto task = [&](int64_t i) {
    for (int64_t b = i * step; b < std::min((i + 1) * step, problem.batch); ++b) {
      double* cross_entropy = each.data() + b * 2 * heads;
      if (counts(problem, b)) {
        kernels.sample(problem, b, loss_scale, cross_entropy, cross_entropy + heads);
      } else {
        clear_gradient(problem, b);
      }
    }
  };
  const int64_t tasks = (problem.batch + step - 1) / step;
  if (tasks > 1) parallel(tasks, task);
  else if (tasks == 1) task(0);

  std::fill_n(terms, 2 * heads, 0.0);
  for (int64_t b = 0; b < problem.batch; ++b) {
    per_sample[b] = 0;
    for (int64_t h = 0; h < heads; ++h) {
      const Head& head = problem.heads[static_cast<std::size_t>(h)];
      const double ce = each[static_cast<std::size_t>(b * 2 * heads + h)];
      const double kl = each[static_cast<std::size_t>((b * 2 + 1) * heads + h)];
      per_sample[b] += (weighted(head.ce_weight, ce) + weighted(head.kl_weight, kl)) * loss_scale;
      terms[h] += ce * term_scale;
      terms[heads + h] += kl * term_scale;
    }
  }
}

}  // namespace imcl
