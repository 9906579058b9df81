// Collaborative consistency on the CPU: its kernel and its reduction.
#pragma once

#include <cstdint>

#include "types.h"

namespace imcl {

// Factors of a sample's cross entropies and divergences in what is differentiated.
struct Scale {
  double cross_entropy, kl;
};

// The per-ISA kernel, for one sample that counts: the unweighted cross entropy and T^2 KL of
// every head, and its rows of the gradient, times scale.
struct ConsistencyKernels {
  void (*sample)(const Consistency&, int64_t sample, Scale scale, double* cross_entropy,
                 double* kl);
};

// Weighted loss of every sample (batch,), reduced only by the factor of `reduction`, and the
// terms (2, heads); writes all gradients.
void consistency(const ConsistencyKernels&, const Consistency&, Reduction, double* per_sample,
                 double* terms, const Parallel&);

}  // namespace imcl
