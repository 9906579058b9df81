// A tile of a gradient on its way from the product that made it to where it belongs.
#pragma once

#include "product.h"

namespace imcl {

template <class T>
using Tile = T[kTile][kTile + 16 / sizeof(T)];  // rows of 16 more bytes

// Writes the staged tile to dx, from (major0, minor0) on. The minor axis, the rows of dx or
// else its columns, is the one of stride 1 if either is.
template <class T>
IMCL_DEVICE void write_tile(const Tile<T>& tile, const Matrix<T>& dx, int major0, int minor0) {
  const bool minor_is_row = dx.along_rows();
  const int majors = (minor_is_row ? dx.columns() : dx.rows()) - major0;
  const int minors = (minor_is_row ? dx.rows() : dx.columns()) - minor0;
  if (dx.vectors()) {
    constexpr int vector = 16 / static_cast<int>(sizeof(T)), packs = kTile / vector;
    const int64_t stride = minor_is_row ? dx.column_stride() : dx.row_stride();
    T* base = dx.data + major0 * stride + minor0;
#pragma unroll 2
    for (int i = thread(); i < kTile * packs; i += kThreads) {
      const int major = i / packs, minor = i % packs * vector;
      if (major < majors && minor < minors)
        store_pack(base + major * stride + minor, load_pack(&tile[major][minor]));
    }
  } else {
#pragma unroll 2
    for (int i = thread(); i < kTile * kTile; i += kThreads) {
      const int major = i / kTile, minor = i % kTile;
      if (major >= majors || minor >= minors) continue;
      const int row = minor_is_row ? minor0 + minor : major0 + major;
      const int column = minor_is_row ? major0 + major : minor0 + minor;
      dx.at(row, column) = tile[major][minor];
    }
  }
}

// Leaves value(i, j), i and j of the thread's sums of a product (p, q), in dx from (p0, q0) on: p
// are its rows and q its columns, or the other way round. The tile may lie where the panels lay.
template <class Product, class T, class Value>
IMCL_DEVICE void write_product(Tile<T>& tile, const Matrix<T>& dx, bool p_is_row, int p0, int q0,
                               const Value& value) {
  const bool p_is_minor = dx.along_rows() == p_is_row;
  __syncthreads();  // the panels under the tile have been read
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; ++j) {
      const int p = Product::row(i), q = Product::column(j);
      const T v = from_acc<T>(value(i, j));
      if (p_is_minor) tile[q][p] = v;
      else tile[p][q] = v;
    }
  __syncthreads();
  write_tile(tile, dx, p_is_minor ? q0 : p0, p_is_minor ? p0 : q0);
  __syncthreads();
}

}  // namespace imcl
