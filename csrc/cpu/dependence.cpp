// Shares the columns of all representations out to the threads, in one go: a sample has so many
// features that a Gram is made of parts. Parts are added in order, whoever made them.
#include "dependence.h"

#include <algorithm>

#include "scratch.h"

namespace imcl {
namespace {

// Columns of a task: with their rows they stay in the second-level cache, and all parts together
// are smaller than the representation.
int64_t columns_of_task(const Samples& s) { return std::max<int64_t>(1024, 4 * s.x.rows); }

struct Task {
  const Samples* samples;
  int64_t first, count;
  char* part;
};

std::vector<Task> tasks_of(const std::vector<Samples>& all) {
  std::vector<Task> tasks;
  for (const Samples& s : all) {
    const int64_t step = columns_of_task(s);
    for (int64_t first = 0; first < s.x.columns; first += step)
      tasks.push_back({&s, first, std::min(step, s.x.columns - first), nullptr});
  }
  return tasks;
}

}  // namespace

void gram_forward(const DependenceKernels& kernels, const std::vector<Samples>& all,
                  const Parallel& parallel) {
  std::vector<Task> tasks = tasks_of(all);
  int64_t bytes = 0;
  for (const Task& task : tasks) bytes += kernels.part_size(*task.samples);
  Scratch scratch;
  char* next = scratch.get<char>(bytes);
  for (Task& task : tasks) {
    task.part = next;
    next += kernels.part_size(*task.samples);
  }
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    kernels.part(*task.samples, task.first, task.count, task.part);
  });
  std::vector<const Task*> first(all.size(), nullptr);
  std::vector<int64_t> count(all.size(), 0);
  for (const Task& task : tasks) {
    const auto i = static_cast<std::size_t>(task.samples - all.data());
    if (count[i]++ == 0) first[i] = &task;
  }
  parallel(static_cast<int64_t>(all.size()), [&](int64_t i) {
    const auto index = static_cast<std::size_t>(i);
    kernels.finish(all[index], first[index] ? first[index]->part : nullptr, count[index]);
  });
}

void gram_backward(const DependenceKernels& kernels, const std::vector<Samples>& all,
                   const Parallel& parallel) {
  const std::vector<Task> tasks = tasks_of(all);
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    kernels.product(*task.samples, task.first, task.count);
  });
}

}  // namespace imcl
