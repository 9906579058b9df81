// The kernels of one ISA level; csrc/cpu/isa.h says which levels there are.
#pragma once

#include <cstddef>

#include "consistency.h"
#include "dependence.h"
#include "pairwise.h"

namespace imcl {

struct Kernels {
  const PairwiseKernels* pairwise;
  const ConsistencyKernels* consistency;
  const DependenceKernels* dependence;
};

// Of the level with that index in isa_levels().
Kernels kernels_of(std::size_t level);

}  // namespace imcl
