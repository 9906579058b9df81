// Collaborative consistency on the CPU: its kernel and its reduction.
#pragma once

#include <cstdint>

#include "types.h"

namespace imcl {

// One sample after the other, without a division for each.
class Walk {
 public:
  IMCL_INLINE Walk(const SampleAxes& samples, int64_t sample) : samples_(samples) {
    for (int axis = samples.axes - 1; axis > 0; --axis) {
      at_.of[axis] = sample % samples.sizes[axis];
      sample /= samples.sizes[axis];
    }
    at_.of[0] = sample;
  }
  IMCL_INLINE void next() {
    int axis = samples_.axes - 1;
    for (; axis > 0 && ++at_.of[axis] == samples_.sizes[axis]; --axis) at_.of[axis] = 0;
    if (axis == 0) ++at_.of[0];
  }
  IMCL_INLINE int64_t offset(const Strides& strides) const {
    int64_t offset = at_.of[0] * strides.of[0];
    for (int axis = 1; axis < samples_.axes; ++axis) offset += at_.of[axis] * strides.of[axis];
    return offset;
  }

 private:
  const SampleAxes& samples_;
  Strides at_;  // indices
};

// The factors of a sample: of all its terms, 0 if it doesn't count; and, times that, of its cross
// entropies and divergences in what is differentiated.
struct Scale {
  double share, cross_entropy, kl;
};

// What is to be done for the heads of a group.
struct Roles {
  bool mixture;      // of the label and the heads, each to the mixture of all: no teacher
  bool kl;           // there is a divergence
  bool pairwise;     // all other heads teach
  bool taught;       // a head has one teacher
  bool own_teacher;  // of its own, and not the one of all
  bool other;        // the divergence isn't KL(q || p)
  bool labelled;     // there are cross entropies
  bool soft;         // labels are a number for each class
  bool summed;       // labels are of more than one class
  bool squared;      // T is 2, where exp(z) is exp(z/T)^2: one exponential serves both
  bool plain;        // exp(z) is taken by itself
  int64_t untaught;  // the head that is its own teacher; -1: none

  IMCL_INLINE Roles(const Labels& labels, const Group& group)
      : mixture(group.divergence == Divergence::kMixture),
        kl(group.size > 1 || mixture),
        pairwise(kl && !mixture && group.teacher == Teacher::kPairwise),
        taught(kl && !mixture && !pairwise),
        own_teacher(taught && group.teacher == Teacher::kOthers),
        other(kl && group.divergence != Divergence::kKl),
        labelled(labels.any() && !mixture),
        soft(labels.soft() || mixture),
        summed(labelled && (soft || labels.smoothing > 0)),
        squared(kl && group.temperature == 2),
        plain(labelled && !squared),
        untaught(group.teacher == Teacher::kFinal ? group.size - 1 : -1) {}

  IMCL_INLINE bool has_kl(int64_t h) const { return kl && h != untaught; }
  // Which teacher head h has.
  IMCL_INLINE int64_t teacher_of(int64_t h) const { return own_teacher ? h : 0; }
};

// A term may be infinite; what has no weight is left out.
IMCL_INLINE double weighted(double weight, double term) {
  return weight == 0 ? 0.0 : weight * term;
}

// The per-ISA kernels.
struct ConsistencyKernels {
  // The unweighted cross entropy and T^2 KL of every head of a sample that counts, and its rows
  // of the gradient.
  void (*sample)(const Consistency&, int64_t sample, Scale scale, double* cross_entropy,
                 double* kl);
  // As many samples as samples() is to be called with at a time; 0 where sample() is quicker.
  int64_t (*block)(const Consistency&);
  // Of count samples from the first on, whether they count or not: adds their terms, times their
  // shares, to sums (2, heads), and their weighted sum to losses (count,) unless that is null.
  void (*samples)(const Consistency&, int64_t first, int64_t count, const Scale* scales,
                  double* sums, double* losses);
};

// The loss, the terms (2, heads) and, unless `losses` is null, every sample's weighted loss
// (batch,), without the factor of a mean; writes all gradients.
double consistency(const ConsistencyKernels&, const Consistency&, Reduction, double* losses,
                   double* terms, const Parallel&);

}  // namespace imcl
