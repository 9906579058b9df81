// Collaborative consistency on the CPU: its problem and its two functions.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace imcl {

enum class Teacher { kOthers, kMean, kFinal, kPairwise };
enum class Reduction { kMean, kSum, kNone };

// Values kept per sample and head for the backward (imcl_fast/operators.py):
enum Stat { kMax, kLogSum, kLogSumT, kTeacherMax, kTeacherLogSum, kKL, kStatsPerHead };

// One head: logits (batch, classes), and their gradient in the backward.
struct Head {
  const void* z;
  int64_t z_row, z_class;  // strides
  void* dz;
  int64_t dz_row, dz_class;
  double ce_weight, kl_weight;
};

// Consecutive heads that teach one another.
struct Group {
  int64_t first, size;
  double temperature;
  Teacher teacher;
  bool detach;
};

struct Consistency {
  DType dtype;
  int64_t batch, classes;
  std::vector<Head> heads;
  std::vector<Group> groups;
  const int64_t* target;  // (batch,), or null: no cross entropy
  int64_t target_stride;
  double label_smoothing;
  int64_t ignore_index;

  bool counts(int64_t sample) const {
    return !target || target[sample * target_stride] != ignore_index;
  }
};

// The per-ISA kernels, for one sample. `stats` is (heads, kStatsPerHead) of that sample
// in the accumulation type; `cross_entropy` and `kl` are (heads,), T^2 included in kl.
struct ConsistencyKernels {
  void (*forward)(const Consistency&, int64_t sample, void* stats, double* cross_entropy,
                  double* kl);
  void (*backward)(const Consistency&, int64_t sample, const void* stats, double scale);
};

// Per-sample losses (batch,) and terms (2, heads), both summed over nothing and the
// samples that count; `stats` is (batch, heads, kStatsPerHead). Returns how many count.
int64_t consistency_forward(const ConsistencyKernels&, const Consistency&, void* stats,
                            double* per_sample, double* terms, const Parallel&);

// Every dz, each sample scaled by scale[sample * scale_stride] (times 1/count, if mean).
void consistency_backward(const ConsistencyKernels&, const Consistency&, const void* stats,
                          const double* scale, const Parallel&);

}  // namespace imcl
