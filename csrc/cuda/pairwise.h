// The pairwise cosine penalty on a GPU: what its two kernels are told, and their launchers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace imcl {

constexpr int kTile = 64;  // edge of a tile of a Gram matrix, as in kernels/plan.py

// How elements of a matrix are read or written: one by one or 16 bytes at a time, and in
// either case along its columns or along its rows.
enum class Access : int8_t { kColumns, kRows, kColumnVectors, kRowVectors };

// A dimension of columns that don't collapse into one, and its strides in x and dx.
struct Dimension {
  int32_t size;
  int64_t stride[2];
};

// The matrices (batch, rows, columns) of one tensor. Strides are in elements; pairs are of x
// and of dx, which has no business in a forward.
struct Layer {
  const void* x;
  void* dx;
  int64_t batch_stride[2], row_stride[2], column_stride[2];
  int64_t state;  // elements before that of the first matrix
  int32_t batch, rows, columns;
  int32_t first_program;  // of its launch; filled in by the launcher
  int32_t first_dimension;
  int16_t dimensions;  // the last runs fastest; none: column_stride
  Form form;
  Access access[2];
};

// What all layers of one dtype share.
struct PairwiseCall {
  DType dtype;
  PairwiseSettings settings;
  int64_t layers;                   // whose mean the penalty is, of all dtypes
  void* state;                      // in the accumulation type, on 16 bytes; null: nothing is kept
  bool is_double;                   // the loss and its gradient, else they are float32
  const void* grad;                 // backward, (); the rest is the forward's
  void* loss;                       // (), written by the last program of all
  double* partials;                 // (programs,)
  unsigned* ticket;                 // 0 before the first program of all
  int64_t first_program, programs;  // in the order of the partials; of all dtypes
};

// How 16 bytes at a time can be read, and written: along an axis of stride 1, where all rows
// of it begin on 16 bytes and take a multiple of them.
inline Access access_of(const void* data, std::size_t element_size, const Layer& layer, int side,
                        bool collapsed) {
  const int64_t row = layer.row_stride[side], column = layer.column_stride[side];
  const auto vector = static_cast<int64_t>(16 / element_size);
  const auto fits = [vector](int64_t count) { return count % vector == 0; };
  const bool can =
      collapsed && reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(layer.batch_stride[side]);
  if (can && column == 1 && fits(row) && fits(layer.columns)) return Access::kColumnVectors;
  if (can && row == 1 && fits(column) && fits(layer.rows)) return Access::kRowVectors;
  return row < column ? Access::kRows : Access::kColumns;
}

IMCL_HOST_DEVICE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

IMCL_HOST_DEVICE inline int64_t padded(int64_t elements) { return divide_up(elements, 4) * 4; }

// Elements of the state of one matrix, as in kernels/plan.py; rows of A and M are padded
// with zeros to a multiple of 4 elements, so that 16 bytes can be read at a time.
//
// primal  A (n, n), its diagonal 0 | what each column tile adds to -A_ii (tiles, n)
// dual    M (d, d) | 1/n (n)
// signed  s (d) | 1/n (n)              then the row means (n) if centred
IMCL_HOST_DEVICE inline int64_t state_size(Form form, bool center, int64_t rows, int64_t columns) {
  const int64_t means = center ? padded(rows) : 0;
  switch (form) {
    case Form::kPrimal: return (rows + divide_up(rows, kTile)) * padded(rows) + means;
    case Form::kDual: return columns * padded(columns) + padded(rows) + means;
    default: return padded(columns) + padded(rows) + means;
  }
}

// Blocks for one matrix: a tile of the upper triangle of its Gram matrix or of M each; or
// tiles of s.
IMCL_HOST_DEVICE inline int64_t forward_programs(const Layer& layer) {
  if (layer.columns == 0) return 0;
  const int64_t tiles = divide_up(layer.form == Form::kPrimal ? layer.rows : layer.columns, kTile);
  return layer.form == Form::kSigned ? tiles : tiles * (tiles + 1) / 2;
}

// Tiles that a block of the backward works on one after the other, so that it has several
// rounds of loads to overlap even where the product is short.
IMCL_HOST_DEVICE inline int64_t tiles_in_turn(const Layer& layer) {
  if (layer.form == Form::kSigned) return 1;
  const int64_t rounds = divide_up(layer.form == Form::kPrimal ? layer.rows : layer.columns, kTile);
  return rounds < 4 ? 4 / rounds : 1;
}

// primal: 64 rows by some tiles of 64 columns each; otherwise some tiles of 64 rows.
IMCL_HOST_DEVICE inline int64_t backward_programs(const Layer& layer) {
  if (layer.columns == 0) return 0;
  const int64_t row_tiles = divide_up(layer.rows, kTile), in_turn = tiles_in_turn(layer);
  if (layer.form != Form::kPrimal) return divide_up(row_tiles, in_turn);
  return row_tiles * divide_up(divide_up(layer.columns, kTile), in_turn);
}

}  // namespace imcl

// Launches for `count` layers of one dtype, whatever their number: as many in each as its
// parameters hold (LaunchArguments in matrix.h).
extern "C" cudaError_t imcl_cuda_pairwise_forward(const imcl::PairwiseCall* call,
                                                  const imcl::Layer* layers, int64_t count,
                                                  const imcl::Dimension* dimensions,
                                                  cudaStream_t stream);
extern "C" cudaError_t imcl_cuda_pairwise_backward(const imcl::PairwiseCall* call,
                                                   const imcl::Layer* layers, int64_t count,
                                                   const imcl::Dimension* dimensions,
                                                   cudaStream_t stream);
