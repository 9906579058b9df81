// How the half of a symmetric matrix is kept that the other half repeats.
//
// Blocks of kSymmetricBlock rows, one behind the other, each without the columns before its own
// first row, which earlier blocks have as rows:
//
//   a a a a a
//   a a a a a
//       b b b     (of blocks of two)
//       b b b
//           c
//
// Any vector of lanes that begins at a multiple of their number lies in one block, so that all
// ISA levels read and write whole vectors of the same layout.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace imcl {

inline constexpr int64_t kSymmetricBlock = 16;

// The first column that row i has.
IMCL_INLINE int64_t symmetric_first(int64_t i) { return i / kSymmetricBlock * kSymmetricBlock; }

// How many numbers the rows before row i have, of n by n; i may be n.
IMCL_INLINE int64_t symmetric_size(int64_t n, int64_t i) {
  const int64_t first = symmetric_first(i);
  return first / 2 * (2 * n - first + kSymmetricBlock) + (i - first) * (n - first);
}

// Where column 0 of row i would be, if it had one: column j of it is at symmetric_row(n, i) + j.
IMCL_INLINE int64_t symmetric_row(int64_t n, int64_t i) {
  return symmetric_size(n, i) - symmetric_first(i);
}

}  // namespace imcl
