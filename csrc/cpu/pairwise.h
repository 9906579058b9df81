// The pairwise cosine penalty on the CPU: its layers, its state and its two functions.
#pragma once

#include <cstdint>
#include <vector>

#include "symmetric.h"
#include "types.h"

namespace imcl {

// The matrices (batch, rows, columns) of one layer, a tensor; its gradient and its state.
struct Matrices {
  DType dtype;
  int64_t batch, rows, columns;
  const void* x;
  Axis batch_axis, row_axis, column_axis;
  void* dx;  // backward only, as are its axes
  Axis dx_batch_axis, dx_row_axis, dx_column_axis;
  void* state;   // (batch, state_size()) in the accumulation type; may be null in forward
  double scale;  // of the penalty's terms: scale_of() of ../tensors.h; or of a Gram
};

// Whether the primal form makes A again in the backward, tile by tile, instead of keeping it: where
// it would be larger than X. That takes about as long, and less where A would not stay in cache.
IMCL_INLINE bool in_tiles(const PairwiseSettings& settings, int64_t rows, int64_t columns) {
  return rows > columns && form_of(settings.penalty, rows, columns) == Form::kPrimal;
}

// Multiply-adds above which one matrix is worth waking all threads several times.
inline constexpr double kShared = 3e7;

// Whether the Gram of the rows is made in two halves of the columns, each by one thread of two.
// They share nothing then, where what one of them packs the other would have to fetch from its
// cache. By its shape alone: a sum doesn't depend on the threads.
IMCL_INLINE bool in_halves(int64_t rows, int64_t columns) {
  return columns >= 2 * rows &&
         static_cast<double>(rows) * static_cast<double>(rows) * static_cast<double>(columns) >
             kShared;
}

// State of one matrix: A (rows^2), or in tiles 1/n | M (columns^2), 1/n | s (columns), 1/n;
// then, if centred, the row means and the rest of each that rounding took (2N). Of A and M, which
// are symmetric, a half: symmetric.h.
IMCL_INLINE int64_t state_size(const PairwiseSettings& settings, int64_t rows, int64_t columns) {
  const int64_t means = settings.center ? 2 * rows : 0;
  switch (form_of(settings.penalty, rows, columns)) {
    case Form::kPrimal:
      return (in_tiles(settings, rows, columns) ? rows : symmetric_size(rows, rows)) + means;
    case Form::kDual: return symmetric_size(columns, columns) + rows + means;
    default: return columns + rows + means;
  }
}

// The per-ISA kernels, each for one matrix of a layer; `parallel` shares the work of
// that one matrix among threads.
struct PairwiseKernels {
  double (*forward)(const Matrices&, int64_t index, const PairwiseSettings&, const Parallel&);
  void (*backward)(const Matrices&, int64_t index, const PairwiseSettings&, double grad,
                   const Parallel&);
};

// The penalty of all layers; fills their state where it is not null.
double pairwise_forward(const PairwiseKernels&, const std::vector<Matrices>&,
                        const PairwiseSettings&, const Parallel&);

// Every dx = grad * d(penalty)/dx from the state.
void pairwise_backward(const PairwiseKernels&, const std::vector<Matrices>&,
                       const PairwiseSettings&, double grad, const Parallel&);

}  // namespace imcl
