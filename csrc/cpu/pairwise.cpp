// Shares the matrices of all layers out to the threads: a large matrix is worked on by
// all threads together, small ones are taken one per thread, the costliest first.
#include "pairwise.h"

#include <algorithm>

namespace imcl {
namespace {

constexpr double kTask = 2e5;  // multiply-adds below which a task takes several matrices

double cost(const Matrices& m, Penalty penalty) {
  const double n = static_cast<double>(m.rows), d = static_cast<double>(m.columns);
  switch (form_of(penalty, m.rows, m.columns)) {
    case Form::kPrimal: return n * n * d;
    case Form::kDual: return n * d * d;
    default: return n * d;
  }
}

struct Task {
  const Matrices* matrices;
  int64_t first, last;
  double cost;
};

// Calls body(matrices, index, parallel) for every matrix, either with all threads or
// with the calling one only.
template <class Body>
void schedule(const std::vector<Matrices>& layers, Penalty penalty, const Parallel& parallel,
              const Body& body) {
  const Parallel serial = one_thread();
  std::vector<Task> tasks;
  for (const Matrices& m : layers) {
    const double each = cost(m, penalty);
    if (parallel.threads > 1 && each > kShared && m.batch < 4 * parallel.threads) {
      for (int64_t b = 0; b < m.batch; ++b) body(m, b, parallel);
      continue;
    }
    const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kTask / (each + 1)));
    for (int64_t b = 0; b < m.batch; b += step) {
      const int64_t last = std::min(b + step, m.batch);
      tasks.push_back({&m, b, last, each * static_cast<double>(last - b)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const auto run = [&](int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    for (int64_t b = task.first; b < task.last; ++b) body(*task.matrices, b, serial);
  };
  (tasks.size() > 1 ? parallel : serial)(static_cast<int64_t>(tasks.size()), run);
}

}  // namespace

double pairwise_forward(const PairwiseKernels& kernels, const std::vector<Matrices>& layers,
                        const PairwiseSettings& settings, const Parallel& parallel) {
  // One slot per matrix, added in order: the sum doesn't depend on the threads.
  std::vector<int64_t> first(layers.size());
  int64_t total = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    first[i] = total;
    total += layers[i].batch;
  }
  std::vector<double> losses(static_cast<std::size_t>(total));
  schedule(
      layers, settings.penalty, parallel, [&](const Matrices& m, int64_t b, const Parallel& inner) {
        const auto layer = static_cast<std::size_t>(&m - layers.data());
        losses[static_cast<std::size_t>(first[layer] + b)] = kernels.forward(m, b, settings, inner);
      });
  double loss = 0;
  for (double each : losses) loss += each;
  return loss;
}

void pairwise_backward(const PairwiseKernels& kernels, const std::vector<Matrices>& layers,
                       const PairwiseSettings& settings, double grad, const Parallel& parallel) {
  schedule(layers, settings.penalty, parallel,
           [&](const Matrices& m, int64_t b, const Parallel& inner) {
             kernels.backward(m, b, settings, grad, inner);
           });
}

}  // namespace imcl
