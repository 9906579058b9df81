// The Grams of samples on a GPU and their gradients: what the two kernels are told, and their
// launchers. The rest of the dependence is done on the small Grams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pairwise.h"

namespace imcl {

constexpr int kBlocksAtOnce = 2;  // on a multiprocessor: what shares its work out counts on that

// One representation: its samples are the rows of one matrix.
struct GramLayer : Layer {
  double scale;   // of its Gram
  int32_t place;  // which of the Grams
};

// What all representations of one dtype share.
struct DependenceCall {
  DType dtype;
  Layer grams;        // (n, B, B), in the accumulation type: the Grams, dx of this; or S, x of this
  void* means;        // in the accumulation type: of each column over the first 64 samples
  void* partials;     // (programs, 64, 64), or null where no Gram is a sum of parts
  unsigned* tickets;  // (programs,), all 0 before the first program
  int64_t first_program;  // of all the forward's
  int64_t span;           // columns of a part, whole tiles
};

// Blocks for one Gram: a tile of its upper triangle and a part of the columns each. The Gram of no
// columns is 0, and somebody has to write that.
IMCL_HOST_DEVICE inline int64_t gram_tiles(int64_t rows) {
  const int64_t tiles = divide_up(rows, kTile);
  return tiles * (tiles + 1) / 2;
}
IMCL_HOST_DEVICE inline int64_t gram_parts(int64_t columns, int64_t span) {
  return columns ? divide_up(columns, span) : 1;
}
IMCL_HOST_DEVICE inline int64_t gram_programs(const Layer& layer, int64_t span) {
  return gram_tiles(layer.rows) * gram_parts(layer.columns, span);
}

// For one gradient: 64 rows and a part of the columns each.
IMCL_HOST_DEVICE inline int64_t product_programs(const Layer& layer, int64_t span) {
  return divide_up(layer.rows, kTile) * divide_up(layer.columns, span);
}

// Columns of a part: as few as let all parts of all tiles run at once. Where one part of each
// representation is more than that, so few that every program running has one. As _span of
// kernels/dependence_plan.py.
inline int64_t span_of(const std::vector<GramLayer>& all, int64_t tiles, int64_t at_once) {
  const auto programs = [&](int64_t each) {
    int64_t count = 0;
    for (const Layer& layer : all) count += divide_up(divide_up(layer.columns, kTile), each);
    return tiles * count;
  };
  const int64_t least = std::max<int64_t>(1, divide_up(programs(1), at_once));
  for (int64_t each = least; each <= 2 * least; ++each)
    if (programs(each) <= at_once) return each * kTile;
  return least * kTile;
}

}  // namespace imcl

// Launches for `count` representations of one dtype, whatever their number: as many in each as its
// parameters hold (LaunchArguments in matrix.h).
extern "C" cudaError_t imcl_cuda_gram_forward(const imcl::DependenceCall* call,
                                              const imcl::GramLayer* layers, int64_t count,
                                              const imcl::Dimension* dimensions,
                                              cudaStream_t stream);
extern "C" cudaError_t imcl_cuda_gram_backward(const imcl::DependenceCall* call,
                                               const imcl::GramLayer* layers, int64_t count,
                                               const imcl::Dimension* dimensions,
                                               cudaStream_t stream);
