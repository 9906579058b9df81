// Matrices whose columns fit in one tile, row by row: what one warp does with rows that lie in a
// panel of its own, columns for lanes, which it needs nobody else for.
//
// It takes them a segment of the panel at a time. Of that a thread 4 g + t holds the unit t of the
// lanes g + 8 i: some rows' elements in every eighth column, and what a product of the segment with
// itself takes of them is just that (mma.h).
#pragma once

#include "product.h"
#include "reduction.h"

namespace imcl {

// Which of kCount sums over the eight lanes of one t a lane gets.
template <int kCount>
IMCL_DEVICE int lane_owns() {
  return lane() / 4 * kCount / 8;
}

// That sum, of numbers x of every lane.
template <int kCount, class Acc>
IMCL_DEVICE Acc sum_of_lanes(Acc (&x)[kCount]) {
  int count = kCount;
#pragma unroll
  for (int bit = 16; bit >= 4; bit /= 2) {
    if (count > 1) {  // half of them go to the other lane, for half of its own
      count /= 2;
      const bool upper = lane() & bit;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) break;
        const Acc kept = upper ? x[i + count] : x[i], sent = upper ? x[i] : x[i + count];
        x[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
      }
    } else {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], bit);
    }
  }
  return x[0];
}

// The rows of a segment, of which a thread reads its part each time that it needs it: that takes
// fewer registers. Their means and norms are the warp's.
template <class T>
struct SegmentRows {
  using Operand = Plain<T>;
  using Acc = imcl::Acc<T>;
  static constexpr int kGroups = kTile / 8;  // of eight lanes
  static constexpr int kCount = kPerUnit<Operand>;
  static constexpr int kRows = 4 * kCount;  // of the segment

  // What makes rows of norm 1 of some.
  template <int kSome>
  struct Scales {
    Acc mean[kSome], inverse[kSome];
    IMCL_DEVICE Acc unit(int e, Acc x) const { return (x - mean[e]) * inverse[e]; }
  };

  uint4* panel;
  Acc *means, *inverses;  // (kRows,)
  int segment, columns;
  bool center;

  static IMCL_DEVICE int lane_of(int group) { return 8 * group + lane() / 4; }
  static IMCL_DEVICE int first_row() { return lane() % 4 * kCount; }
  // The row whose sum this thread owns, as others may.
  static IMCL_DEVICE int owned_row() { return first_row() + lane_owns<kCount>(); }
  static IMCL_DEVICE bool owns() { return lane() / 4 % (8 / kCount) == 0; }

  IMCL_DEVICE uint4& unit(int group) const {
    return panel[unit_index(lane_of(group), 4 * segment + lane() % 4)];
  }
  template <int kSome>
  IMCL_DEVICE Scales<kSome> scales(int first) const {
    Scales<kSome> scales;
#pragma unroll
    for (int e = 0; e < kSome; ++e) {
      scales.mean[e] = center ? means[first_row() + first + e] : Acc(0);
      scales.inverse[e] = inverses[first_row() + first + e];
    }
    return scales;
  }

  // Over the columns of the row that this thread owns, the sum of x or of (x - mean)^2.
  template <bool kSquares>
  IMCL_DEVICE Acc owned_sum() const {
    Acc sum[kCount] = {}, mean[kCount] = {};
    if (kSquares && center) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) mean[e] = means[first_row() + e];
    }
#pragma unroll 2
    for (int i = 0; lane_of(i) < columns; ++i) {
      const auto x = Unit<Operand>::of(unit(i));
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const Acc v = x[e] - mean[e];
        sum[e] += kSquares ? v * v : v;
      }
    }
    return sum_of_lanes<kCount>(sum);
  }

  IMCL_DEVICE void add_to(Acc (&s)[kGroups]) const {
    const auto scale = scales<kCount>(0);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (8 * i >= columns) break;
      const auto x = Unit<Operand>::of(unit(i));
#pragma unroll
      for (int e = 0; e < kCount; ++e) s[i] += scale.unit(e, x[e]);
    }
  }

  // Leaves the rows where they were, of norm 1.
  IMCL_DEVICE void normalize() const {
    const auto scale = scales<kCount>(0);
#pragma unroll 2
    for (int i = 0; 8 * i < columns; ++i) {
      const auto x = Unit<Operand>::of(unit(i));
      Unit<Operand> changed;
#pragma unroll
      for (int e = 0; e < kCount; ++e) changed.bits[e] = Operand::encode(scale.unit(e, x[e]));
      unit(i) = changed.words();
    }
  }
};

// The sums over a warp of what its threads have of 64 columns.
template <class Rows>
IMCL_DEVICE void rows_sum(const typename Rows::Acc (&s)[Rows::kGroups],
                          typename Rows::Acc (&of_columns)[kTile + 1]) {
#pragma unroll
  for (int i = 0; i < Rows::kGroups; ++i) {
    auto sum = s[i];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane() % 4 == 0) of_columns[Rows::lane_of(i)] = sum;
  }
}

// Adds the rows of a segment, of a half type, to a warp's quarter of M, or to the corner of so many
// groups of columns: those of `left` by those of `right`. Of what lies on the diagonal the part
// below it is left out.
//
// u u^T of a row u of norm 1, where centred: u is the sum of two Tf32. Otherwise u/n x^T: x, of a
// half type, is one as it lies, and has no second part.
template <int kGroups, bool kCenter, class T, class Product>
IMCL_DEVICE void add_segment(Product& product, const SegmentRows<T>& rows, int left, int right) {
  const bool same = left == right;
  const auto half_of = [&](int group, int half) {
    return reinterpret_cast<const uint2*>(&rows.unit(group))[half];
  };
  const auto decoded = [](const uint2& half, int i) {
    return Plain<T>::decode(static_cast<uint16_t>((i < 2 ? half.x : half.y) >> i % 2 * 16));
  };
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint2 x[2][kGroups];  // halves of units
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      x[0][i] = x[1][i] = half_of(left + i, half);
      if (!same) x[1][i] = half_of(right + i, half);
    }
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const auto scale = rows.template scales<2>(4 * half + e);
      const auto unit = [&](int side, int i, int k) {
        return scale.unit(k, decoded(x[side][i], e + k));
      };
      Tf32Sum a[kGroups][2], b[kGroups][2];
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if constexpr (kCenter) {
            a[i][k] = b[i][k] = tf32_sum_of(unit(0, i, k));
            if (!same) b[i][k] = tf32_sum_of(unit(1, i, k));
          } else {
            a[i][k] = tf32_sum_of(unit(0, i, k) * scale.inverse[k]);
            b[i][k] = {bits_of<uint32_t>(decoded(x[1][i], e + k)), 0};
          }
        }
#pragma unroll
      for (int m = 0; m < kGroups; m += 2)
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          if (same && n < m) continue;
          auto& sum = product.sum;
          float d[4] = {sum[m][2 * n], sum[m][2 * n + 1], sum[m + 1][2 * n], sum[m + 1][2 * n + 1]};
          multiply<!kCenter>(d, {a[m][0], a[m + 1][0], a[m][1], a[m + 1][1]}, {b[n][0], b[n][1]});
          sum[m][2 * n] = d[0];
          sum[m][2 * n + 1] = d[1];
          sum[m + 1][2 * n] = d[2];
          sum[m + 1][2 * n + 1] = d[3];
        }
    }
  }
}

// The same, centred or not.
template <int kGroups, class T, class Product>
IMCL_DEVICE void add_segment(Product& product, const SegmentRows<T>& rows, int left, int right) {
  if (rows.center) add_segment<kGroups, true>(product, rows, left, right);
  else add_segment<kGroups, false>(product, rows, left, right);
}

}  // namespace imcl
