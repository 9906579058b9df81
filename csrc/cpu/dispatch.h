// The ISA levels compiled in, and the one this process uses.
#pragma once

#include <vector>

#include "consistency.h"
#include "pairwise.h"

namespace imcl {

struct IsaLevel {
  const char* name;
  bool supported;  // by this CPU
  const PairwiseKernels* pairwise;
  const ConsistencyKernels* consistency;
};

// Every level compiled in, best first.
const std::vector<IsaLevel>& isa_levels();

// The best supported level, or the one the environment variable IMCL_FAST_ISA names.
// Throws std::runtime_error if that one isn't there or not supported.
const IsaLevel& chosen_isa();

}  // namespace imcl
