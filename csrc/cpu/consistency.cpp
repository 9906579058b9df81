// Shares the samples out to the threads and reduces their losses in order, so that the
// result doesn't depend on the threads.
#include "consistency.h"

#include <algorithm>
#include <type_traits>

#include "scratch.h"

namespace imcl {
namespace {

constexpr int64_t kTask = 16384;     // logits a task is worth
constexpr int64_t kCounted = 65536;  // samples that a task weighs

double at(DType dtype, const void* x, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(x)[i]
                                  : static_cast<double>(static_cast<const float*>(x)[i]);
}

// The factor of all of a sample's loss; 0 if it doesn't count.
double share_of(const Consistency& problem, const Walk& sample) {
  const Labels& labels = problem.labels;
  if (labels.target && labels.target[sample.offset(labels.target_sample)] == labels.ignore_index)
    return 0;
  if (!labels.sample_weight) return 1;
  return at(problem.dtype, labels.sample_weight, sample.offset(labels.weight_sample));
}

// The weight of a sample's label in the mean of the cross entropies.
double label_weight(const Consistency& problem, const Walk& sample) {
  const Labels& labels = problem.labels;
  if (!labels.target || !labels.weight) return 1;
  const int64_t y = labels.target[sample.offset(labels.target_sample)];
  if (y < 0 || y >= problem.classes) return 0;
  return at(problem.dtype, labels.weight, y * labels.weight_stride);
}

struct Weights {
  double cross_entropy = 0, kl = 0;
};

// Calls task(i) for i in [0, count).
template <class Task>
void each(int64_t count, const Parallel& parallel, const Task& task) {
  if (count > 1) parallel(count, task);
  else if (count == 1) task(0);
}

// What the means are divided by.
Weights weights_of(const Consistency& problem, const Parallel& parallel) {
  const Labels& labels = problem.labels;
  const auto all = static_cast<double>(problem.batch);
  if (!labels.target && !labels.sample_weight) return {all, all};
  const int64_t tasks = (problem.batch + kCounted - 1) / kCounted;
  std::vector<Weights> partials(static_cast<std::size_t>(tasks));
  each(tasks, parallel, [&](int64_t i) {
    Weights sum;
    Walk sample(problem.samples, i * kCounted);
    for (int64_t b = i * kCounted; b < std::min((i + 1) * kCounted, problem.batch); ++b) {
      const double share = share_of(problem, sample);
      if (share != 0) {
        sum.cross_entropy += share * label_weight(problem, sample);
        sum.kl += share;
      }
      sample.next();
    }
    partials[static_cast<std::size_t>(i)] = sum;
  });
  Weights sum;
  for (const Weights& partial : partials) {
    sum.cross_entropy += partial.cross_entropy;
    sum.kl += partial.kl;
  }
  return sum;
}

double inverse(double total) { return total == 0 ? 0 : 1 / total; }

template <class Kept>
void clear_row(const Head& head, const Walk& sample, int64_t classes) {
  Kept* row = static_cast<Kept*>(head.dz) + sample.offset(head.dz_sample);
  for (int64_t k = 0; k < classes; ++k) row[k * head.dz_class] = {};
}

void clear_gradient(const Consistency& problem, const Walk& sample) {
  for (const Head& head : problem.heads) {
    if (!head.dz) continue;
    with_type(kept_type(problem.dtype), [&](auto* kept) {
      clear_row<std::remove_pointer_t<decltype(kept)>>(head, sample, problem.classes);
    });
  }
}

// As ConsistencyKernels::samples, one by one.
void one_by_one(const ConsistencyKernels& kernels, const Consistency& problem, int64_t first,
                int64_t count, const Scale* scales, double* sums, double* losses) {
  const auto heads = static_cast<int64_t>(problem.heads.size());
  Scratch scratch;
  double* terms = scratch.get<double>(2 * heads);
  Walk sample(problem.samples, first);
  for (int64_t i = 0; i < count; ++i) {
    if (scales[i].share == 0) {
      clear_gradient(problem, sample);
    } else {
      kernels.sample(problem, first + i, scales[i], terms, terms + heads);
      for (int64_t h = 0; h < heads; ++h) {
        const Head& head = problem.heads[static_cast<std::size_t>(h)];
        const double ce = scales[i].share * terms[h], kl = scales[i].share * terms[heads + h];
        sums[h] += ce;
        sums[heads + h] += kl;
        if (losses) losses[i] += weighted(head.ce_weight, ce) + weighted(head.kl_weight, kl);
      }
    }
    sample.next();
  }
}

}  // namespace

double consistency(const ConsistencyKernels& kernels, const Consistency& problem,
                   Reduction reduction, double* losses, double* terms, const Parallel& parallel) {
  const auto heads = static_cast<int64_t>(problem.heads.size());
  const Weights weights = weights_of(problem, parallel);
  const Weights mean = {inverse(weights.cross_entropy), inverse(weights.kl)}, one = {1, 1};
  const Weights loss_scale = reduction == Reduction::kMean ? mean : one;
  const Weights term_scale = reduction == Reduction::kSum ? one : mean;

  const int64_t logits = std::max<int64_t>(1, problem.classes * heads);
  const int64_t block = kernels.block(problem), unit = std::max<int64_t>(block, 1);
  const int64_t step = std::max<int64_t>(1, kTask / (logits * unit)) * unit;
  const int64_t tasks = (problem.batch + step - 1) / step;
  std::vector<double> sums(static_cast<std::size_t>(tasks * 2 * heads));
  if (losses) std::fill_n(losses, problem.batch, 0.0);
  each(tasks, parallel, [&](int64_t i) {
    Scratch scratch;
    const int64_t first = i * step, count = std::min(step, problem.batch - first);
    Scale* scales = scratch.get<Scale>(count);
    Walk sample(problem.samples, first);
    for (int64_t b = 0; b < count; ++b) {
      const double share = share_of(problem, sample);
      scales[b] = {share, share * loss_scale.cross_entropy, share * loss_scale.kl};
      sample.next();
    }
    double* of_task = sums.data() + i * 2 * heads;
    double* of_losses = losses ? losses + first : nullptr;
    if (!block) return one_by_one(kernels, problem, first, count, scales, of_task, of_losses);
    for (int64_t b = 0; b < count; b += block)
      kernels.samples(problem, first + b, std::min(block, count - b), scales + b, of_task,
                      of_losses ? of_losses + b : nullptr);
  });

  std::fill_n(terms, 2 * heads, 0.0);
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j < 2 * heads; ++j)
      terms[j] += sums[static_cast<std::size_t>(i * 2 * heads + j)];
  double loss = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const Head& head = problem.heads[static_cast<std::size_t>(h)];
    loss += weighted(head.ce_weight, terms[h] * loss_scale.cross_entropy) +
            weighted(head.kl_weight, terms[heads + h] * loss_scale.kl);
    terms[h] *= term_scale.cross_entropy;
    terms[heads + h] *= term_scale.kl;
  }
  return loss;
}

}  // namespace imcl
