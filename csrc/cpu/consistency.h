// Collaborative consistency on the CPU: its problem, its kernel and its reduction.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace imcl {

enum class Teacher { kOthers, kMean, kFinal, kPairwise };
enum class Reduction { kMean, kSum, kNone };

// One head: its logits (batch, classes), and where the gradient goes (null: nowhere).
struct Head {
  const void* z;
  int64_t z_row, z_class;  // strides
  void* dz;                // in the accumulation type
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

// The per-ISA kernel, for one sample that counts: the unweighted cross entropy and T^2 KL of
// every head, and its rows of the gradient, times scale.
struct ConsistencyKernels {
  void (*sample)(const Consistency&, int64_t sample, double scale, double* cross_entropy,
                 double* kl);
};

// Weighted loss of every sample (batch,), reduced only by the factor of `reduction`, and the
// terms (2, heads); writes all gradients.
void consistency(const ConsistencyKernels&, const Consistency&, Reduction, double* per_sample,
                 double* terms, const Parallel&);

}  // namespace imcl
