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

double at(DType dtype, const void* x, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(x)[i]
                                  : static_cast<double>(static_cast<const float*>(x)[i]);
}

// The factor of all of a sample's loss; 0 if it doesn't count.
double share_of(const Consistency& problem, int64_t sample) {
  const Labels& labels = problem.labels;
  if (labels.target && labels.target[sample * labels.target_stride] == labels.ignore_index)
    return 0;
  if (!labels.sample_weight) return 1;
  return at(problem.dtype, labels.sample_weight, sample * labels.sample_weight_stride);
}

// The weight of a sample's label in the mean of the cross entropies.
double label_weight(const Consistency& problem, int64_t sample) {
  const Labels& labels = problem.labels;
  if (!labels.target || !labels.weight) return 1;
  const int64_t y = labels.target[sample * labels.target_stride];
  if (y < 0 || y >= problem.classes) return 0;
  return at(problem.dtype, labels.weight, y * labels.weight_stride);
}

double inverse(double total) { return total == 0 ? 0 : 1 / total; }

// A term may be infinite; what has no weight is left out.
double weighted(double weight, double term) { return weight == 0 ? 0.0 : weight * term; }

}  // namespace

void consistency(const ConsistencyKernels& kernels, const Consistency& problem, Reduction reduction,
                 double* per_sample, double* terms, const Parallel& parallel) {
  const auto heads = static_cast<int64_t>(problem.heads.size());
  std::vector<double> shares(static_cast<std::size_t>(problem.batch));
  double of_cross_entropy = 0, of_kl = 0;  // what their means are divided by
  for (int64_t b = 0; b < problem.batch; ++b) {
    const double share = shares[static_cast<std::size_t>(b)] = share_of(problem, b);
    if (share == 0) continue;
    of_cross_entropy += share * label_weight(problem, b);
    of_kl += share;
  }
  const Scale mean = {inverse(of_cross_entropy), inverse(of_kl)}, one = {1, 1};
  const Scale loss_scale = reduction == Reduction::kMean ? mean : one;
  const Scale term_scale = reduction == Reduction::kSum ? one : mean;

  std::vector<double> each(static_cast<std::size_t>(2 * heads * problem.batch));
  const int64_t logits = std::max<int64_t>(1, problem.classes * heads);
  const int64_t step = std::max<int64_t>(1, kTask / logits);
  const auto task = [&](int64_t i) {
    for (int64_t b = i * step; b < std::min((i + 1) * step, problem.batch); ++b) {
      double* cross_entropy = each.data() + b * 2 * heads;
      const double share = shares[static_cast<std::size_t>(b)];
      if (share != 0) {
        kernels.sample(problem, b, {share * loss_scale.cross_entropy, share * loss_scale.kl},
                       cross_entropy, cross_entropy + heads);
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
    const double share = shares[static_cast<std::size_t>(b)];
    for (int64_t h = 0; h < heads; ++h) {
      const Head& head = problem.heads[static_cast<std::size_t>(h)];
      const double ce = share * each[static_cast<std::size_t>(b * 2 * heads + h)];
      const double kl = share * each[static_cast<std::size_t>((b * 2 + 1) * heads + h)];
      per_sample[b] += weighted(head.ce_weight, ce * loss_scale.cross_entropy) +
                       weighted(head.kl_weight, kl * loss_scale.kl);
      terms[h] += ce * term_scale.cross_entropy;
      terms[heads + h] += kl * term_scale.kl;
    }
  }
}

}  // namespace imcl
