// Products of panels in shared memory: sum (64, 64) += a (64, depth) b (64, depth)^T, shared
// out to the four warps of a block, a quarter of 32 by 32 for each.
//
// Every product names what a thread holds: kRows x kColumns sums, of the rows row(i) and the
// columns column(j); the lanes that differ by multiples of kColumnLanes hold the same columns.
#pragma once

#include "mma.h"
#include "panel.h"

namespace imcl {

static_assert(kThreads == 4 * 32 && kTile == 2 * 32);
IMCL_DEVICE int warp() { return thread() / 32; }
IMCL_DEVICE int lane() { return thread() % 32; }
constexpr int kCorner = kTile / 2;
IMCL_DEVICE int warp_row() { return warp() / 2 * 32; }
IMCL_DEVICE int warp_column() { return warp() % 2 * 32; }

// The part of a matrix times its own transpose that is left out: below the diagonal.
IMCL_DEVICE bool is_left_out(bool symmetric) { return symmetric && warp_row() > warp_column(); }

// Tile `index` of an upper triangle, counted down its columns.
IMCL_DEVICE void upper_tile(int index, int& i, int& j) {
  j = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1) - 1) / 2);
  while (int64_t{j} * (j + 1) / 2 > index) --j;
  while (int64_t{j + 1} * (j + 2) / 2 <= index) ++j;
  i = index - static_cast<int>(int64_t{j} * (j + 1) / 2);
}

// Fused multiply-adds of float or double.
template <class T>
struct Simt {
  using Operand = Plain<T>;
  using Acc = T;
  static constexpr int kRows = 8, kColumns = 4, kColumnLanes = 8;
  static constexpr bool kOnTensorCores = false;
  struct Squares {};  // nothing here makes them on the way
  Acc sum[kRows][kColumns];

  static IMCL_DEVICE int row(int i) { return warp_row() + 4 * i + lane() / 8; }
  static IMCL_DEVICE int column(int j) { return warp_column() + 8 * j + lane() % 8; }

  // In a corner every warp has the first quarter of a product of its own.
  IMCL_DEVICE void add(const uint4* a, const uint4* b, bool corner = false) {
    if (!corner && is_left_out(a == b)) return;
    const int rows = corner ? warp_row() : 0, columns = corner ? warp_column() : 0;
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) {
      Unit<Operand> right[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        right[j] = Unit<Operand>::of(b[unit_index(column(j) - columns, unit)]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const auto left = Unit<Operand>::of(a[unit_index(row(i) - rows, unit)]);
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int k = 0; k < kPerUnit<Operand>; ++k) sum[i][j] += left[k] * right[j][k];
      }
    }
  }
};

// Tensor cores. A lane 4 g + t reads the unit t of the rows g + 8 i: 16 bytes that serve two
// products one after the other, each of which takes 4 bytes of them for its lower k and the
// next 4 for its upper k. That orders the k otherwise than in memory, but a and b alike.
template <class Element>
struct TensorCore {
  using Operand = Element;
  using Acc = float;

  // Of 32 rows, on the diagonals of the products of eight of them with themselves: sixteen rows in
  // one place, as a product with eight leaves those alone that are 0 in it.
  struct Squares {
    float of[2][4] = {};

    IMCL_DEVICE void add(const uint4 (&rows)[4]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 &upper = rows[2 * i], &lower = rows[2 * i + 1];
        multiply<Operand>(of[i], {upper.x, 0, upper.y, 0}, {upper.x, upper.y});
        multiply<Operand>(of[i], {upper.z, 0, upper.w, 0}, {upper.z, upper.w});
        multiply<Operand>(of[i], {0, lower.x, 0, lower.y}, {lower.x, lower.y});
        multiply<Operand>(of[i], {0, lower.z, 0, lower.w}, {lower.z, lower.w});
      }
    }

    // Leaves them where the rows' own lie.
    IMCL_DEVICE void put(Acc* squares) const {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        put_diagonal(of[i / 2][i % 2 * 2], of[i / 2][i % 2 * 2 + 1], squares + 8 * i);
    }
  };
  // Those that the product of a matrix with itself has made.
  IMCL_DEVICE void put_squares(Acc* squares) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) put_diagonal(sum[i][2 * i], sum[i][2 * i + 1], squares + 8 * i);
  }
  // Of eight rows by eight columns, two elements in each lane.
  static IMCL_DEVICE void put_diagonal(Acc even, Acc odd, Acc* diagonal) {
    const int row = lane() / 4;
    if (lane() % 4 == row / 2) diagonal[row] = row % 2 ? odd : even;
  }

  static constexpr int kRows = 4, kColumns = 8, kColumnLanes = 4;
  static constexpr bool kOnTensorCores = true;
  Acc sum[kRows][kColumns];

  static IMCL_DEVICE int row(int i) { return warp_row() + 8 * i + lane() / 4; }
  static IMCL_DEVICE int column(int j) {
    return warp_column() + j / 2 * 8 + lane() % 4 * 2 + j % 2;
  }

  IMCL_DEVICE void add(const uint4* a, const uint4* b) { add(a, b, nullptr); }

  // The same, and the squares of 32 rows: of a for warps on the diagonal, of b for the others.
  // Where a is b they are in the product itself.
  IMCL_DEVICE void add(const uint4* a, const uint4* b, Squares* squares) {
    if (is_left_out(a == b)) return;
    const bool same = a == b && warp_row() == warp_column();
#pragma unroll
    for (int segment = 0; segment < kUnits; segment += 4) {
      uint4 left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = a[unit_index(row(i), segment + lane() % 4)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        right[i] = left[i];
        if (!same)
          right[i] = b[unit_index(warp_column() + 8 * i + lane() / 4, segment + lane() % 4)];
      }
      if (squares && a != b) {
        if (warp_row() == warp_column()) squares->add(left);
        else squares->add(right);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint4 &upper = left[2 * m], &lower = left[2 * m + 1], &other = right[n];
          float d[4] = {sum[2 * m][2 * n], sum[2 * m][2 * n + 1], sum[2 * m + 1][2 * n],
                        sum[2 * m + 1][2 * n + 1]};
          multiply<Operand>(d, {upper.x, lower.x, upper.y, lower.y}, {other.x, other.y});
          multiply<Operand>(d, {upper.z, lower.z, upper.w, lower.w}, {other.z, other.w});
          sum[2 * m][2 * n] = d[0];
          sum[2 * m][2 * n + 1] = d[1];
          sum[2 * m + 1][2 * n] = d[2];
          sum[2 * m + 1][2 * n + 1] = d[3];
        }
    }
  }
};

// Blocks that a multiprocessor is to hold at once: they hide one another's waiting. What takes
// twice the registers, for doubles or for numbers under way that will be halved, gets those;
// and so does what the compiler would spill for Blackwell.
template <class T, class Product>
constexpr int kBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    Product::kOnTensorCores ||
#endif
            sizeof(T) == 8 || sizeof(T) > sizeof(typename Product::Operand::Bits)
        ? 2
        : 3;

// Adds what a warp has of a corner to a tile, or leaves it there.
template <class Product, class Acc>
IMCL_DEVICE void put_corner(const Product& product, Acc (&tile)[kTile][kTile + 1], bool first) {
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; ++j) {
      Acc& at = tile[Product::row(i) - warp_row()][Product::column(j) - warp_column()];
      at = first ? product.sum[i][j] : at + product.sum[i][j];
    }
}

template <class Product>
IMCL_DEVICE void clear(Product& product) {
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; ++j) product.sum[i][j] = 0;
}

}  // namespace imcl
