// The ISA levels compiled in, and the one this process uses.
#pragma once

#include <vector>

namespace imcl {

struct IsaLevel {
  const char* name;
  bool supported;  // by this CPU
  bool pays;       // is quicker on it than the next one
};

// Every level compiled in, best first.
const std::vector<IsaLevel>& isa_levels();

// Index of the best supported level that pays, or of the one the environment variable IMCL_FAST_ISA
// names. Throws std::runtime_error if that one isn't there or not supported.
std::size_t chosen_isa();

}  // namespace imcl
