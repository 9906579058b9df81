// Gram matrices of the samples of a batch and their gradients, on the CPU: what the dependence
// between representations (HSIC, CKA) needs of them; the rest is done on the small Grams.
#pragma once

#include <cstdint>
#include <vector>

#include "pairwise.h"

namespace imcl {

// One representation: samples are the rows of a single matrix. All pointers are to numbers of the
// accumulation type.
struct Representation {
  Matrices x;  // its scale is the Gram's
  void* mean;  // (columns): of each column over the samples
  void* gram;  // (rows, rows)
};

// The per-ISA kernels, serial. A partial and a product are of columns [first, first + count).
struct DependenceKernels {
  // Bytes of the Gram of some of the columns, in whole panels.
  int64_t (*partial_size)(const Representation&);
  // partial = X_c X_c^T of these columns, their upper panels; fills their means.
  void (*partial)(const Representation&, int64_t first, int64_t count, void* partial);
  // gram = scale * the sum of so many partials, one after the other.
  void (*finish)(const Representation&, const void* partials, int64_t count);
  // dx = S X_c in these columns, for the symmetric S that lies in gram.
  void (*product)(const Representation&, int64_t first, int64_t count);
};

// Fills every gram and mean.
void gram_forward(const DependenceKernels&, const std::vector<Representation>&, const Parallel&);

// Every dx.
void gram_backward(const DependenceKernels&, const std::vector<Representation>&, const Parallel&);

}  // namespace imcl
