// Shares the columns of all representations out to the threads, in one go: a sample has so many
// features that a Gram is a sum of partials. They are added in order, whoever made them.
#include "dependence.h"

#include <algorithm>

#include "scratch.h"

namespace imcl {
namespace {

// Columns of a task: all partials together are smaller than the representation.
int64_t columns_of_task(const Representation& s) { return std::max<int64_t>(2048, 4 * s.x.rows); }

struct Task {
  const Representation* representation;
  int64_t first, count;
  char* partial;
};

std::vector<Task> tasks_of(const std::vector<Representation>& all) {
  std::vector<Task> tasks;
  for (const Representation& s : all) {
    const int64_t step = columns_of_task(s);
    for (int64_t first = 0; first < s.x.columns; first += step)
      tasks.push_back({&s, first, std::min(step, s.x.columns - first), nullptr});
  }
  return tasks;
}

}  // namespace

void gram_forward(const DependenceKernels& kernels, const std::vector<Representation>& all,
                  const Parallel& parallel) {
  std::vector<Task> tasks = tasks_of(all);
  int64_t bytes = 0;
  for (const Task& task : tasks) bytes += kernels.partial_size(*task.representation);
  Scratch scratch;
  char* next = scratch.get<char>(bytes);
  for (Task& task : tasks) {
    task.partial = next;
    next += kernels.partial_size(*task.representation);
  }
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    kernels.partial(*task.representation, task.first, task.count, task.partial);
  });
  std::vector<const Task*> first(all.size(), nullptr);
  std::vector<int64_t> count(all.size(), 0);
  for (const Task& task : tasks) {
    const auto i = static_cast<std::size_t>(task.representation - all.data());
    if (count[i]++ == 0) first[i] = &task;
  }
  parallel(static_cast<int64_t>(all.size()), [&](int64_t i) {
    const auto index = static_cast<std::size_t>(i);
    kernels.finish(all[index], first[index] ? first[index]->partial : nullptr, count[index]);
  });
}

void gram_backward(const DependenceKernels& kernels, const std::vector<Representation>& all,
                   const Parallel& parallel) {
  const std::vector<Task> tasks = tasks_of(all);
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    kernels.product(*task.representation, task.first, task.count);
  });
}

}  // namespace imcl
