// Panels of a matrix in shared memory, as the products read them: 64 lanes (rows or columns
// of the matrix) by 128 bytes of depth, the axis that the product adds up along.
//
// Such a panel is two segments of (64 lanes, 64 bytes), and a lane's 64 bytes are four units
// of 16, which lie permuted by the lane's number. So whatever reads a unit of eight
// consecutive lanes, or the four units of each of two, finds them in 32 different banks, and
// a thread that writes one k of eight lanes disturbs one other at most.
#pragma once

#include "matrix.h"

namespace imcl {

constexpr int kUnits = 8;  // of a lane
constexpr int kPanelUnits = kTile * kUnits;

template <class Operand>
constexpr int kDepth = 128 / static_cast<int>(sizeof(typename Operand::Bits));
template <class Operand>
constexpr int kPerUnit = 16 / static_cast<int>(sizeof(typename Operand::Bits));

IMCL_DEVICE int unit_index(int lane, int unit) {
  return ((unit / 4 * kTile + lane) * 4) + ((unit ^ (lane >> 1) ^ (lane >> 3)) & 3);
}

template <class Operand>
struct Unit {
  typename Operand::Bits bits[kPerUnit<Operand>];

  static IMCL_DEVICE Unit of(const uint4& words) { return bits_of<Unit>(words); }
  IMCL_DEVICE uint4 words() const { return bits_of<uint4>(*this); }
  IMCL_DEVICE typename Operand::Acc operator[](int i) const { return Operand::decode(bits[i]); }
};

// One number of a panel, for reading or writing.
template <class Operand>
IMCL_DEVICE typename Operand::Bits& number(uint4* panel, int lane, int k) {
  using Bits = typename Operand::Bits;
  constexpr int per_unit = kPerUnit<Operand>;
  return reinterpret_cast<Bits*>(panel + unit_index(lane, k / per_unit))[k % per_unit];
}

// A matrix seen as lanes by depth.
template <class T>
struct View {
  Matrix<const T> matrix;
  bool lanes_are_rows;

  IMCL_DEVICE int lanes() const { return lanes_are_rows ? matrix.rows() : matrix.columns(); }
  IMCL_DEVICE int depth() const { return lanes_are_rows ? matrix.columns() : matrix.rows(); }
  IMCL_DEVICE bool along_lanes() const { return matrix.along_rows() == lanes_are_rows; }
  IMCL_DEVICE const T& at(int lane, int k) const {
    return lanes_are_rows ? matrix.at(lane, k) : matrix.at(k, lane);
  }
};

// Carries panels from global to shared memory in two steps, so that a panel is under way
// while the products of the one before are worked out: load() into registers, store() from
// there. Elements beyond the matrix come out 0. A matrix that can't be read 16 bytes at a
// time is read by store() alone.
template <class T, class Operand>
class PanelReader {
 public:
  using Bits = typename Operand::Bits;

  IMCL_DEVICE void load(const View<T>& view, int first_lane, int first_k) {
    if (!view.matrix.vectors()) return;
    const int t = opaque(thread());
    const int64_t row = view.matrix.row_stride(), column = view.matrix.column_stride();
    const int64_t lane_stride = view.lanes_are_rows ? row : column;
    const int64_t k_stride = view.lanes_are_rows ? column : row;
    const int lanes = view.lanes() - first_lane, depth = view.depth() - first_k;
    const bool along = view.along_lanes();
    const int lane = along ? lane_along(t) : lane_across(t, 0);
    const int k = along ? k_along(t, 0) : k_across(t);
    // The packs of a thread differ in k, along lanes, or else in their lane.
    int left = along ? depth - k : lanes - lane;
    if (lane >= lanes || k >= depth) left = 0;
    const int64_t stride = along ? k_stride : lane_stride;
    const T* pack = view.matrix.data + (first_lane + lane) * lane_stride + (first_k + k) * k_stride;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      packs_[j] = uint4{0, 0, 0, 0};
      if (left > 0) packs_[j] = __ldg(whole<const uint4>(pack));  // [kVector]
      const int step = !along ? kLaneStep : j % kPair + 1 < kPair ? 1 : kKStep - (kPair - 1);
      left -= step;
      pack += step * stride;
    }
  }

  // `exact` leaves float32 as it is where the operand is Tf32: it is to be rounded later.
  IMCL_DEVICE void store(const View<T>& view, int first_lane, int first_k, bool exact,
                         uint4* panel) const {
    const int t = opaque(thread());
    if (!view.matrix.vectors()) {
      store_elements(view, first_lane, first_k, exact, panel, t);
    } else if (view.along_lanes()) {
#pragma unroll
      for (int j = 0; j < kPacks; j += kPair) {
        const int lane = lane_along(t), k = k_along(t, j);
        const Piece piece = encoded(packs_[j], exact);
        const Piece next = encoded(packs_[j + kPair - 1], exact);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if constexpr (kPair == 2) {
            reinterpret_cast<uint32_t&>(number<Operand>(panel, lane + e, k)) =
                piece.bits[e] | static_cast<uint32_t>(next.bits[e]) << 16;
          } else {
            number<Operand>(panel, lane + e, k) = piece.bits[e];
          }
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int lane = lane_across(t, j), k = k_across(t);
        const Piece piece = encoded(packs_[j], exact);
        if constexpr (sizeof(Piece) == 8) {
          reinterpret_cast<uint2&>(number<Operand>(panel, lane, k)) = bits_of<uint2>(piece);
        } else {
          const auto units = bits_of<Units>(piece);
#pragma unroll
          for (int u = 0; u < kPackUnits; ++u)
            panel[unit_index(lane, k / kPerUnit<Operand> + u)] = units.unit[u];
        }
      }
    }
  }

 private:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPacks = kTile * kDepth<Operand> / kVector / kThreads;
  static constexpr int kPackUnits = kVector * static_cast<int>(sizeof(Bits)) / 16;
  // Along lanes two consecutive k of 2 bytes are written together.
  static constexpr int kPair = sizeof(Bits) == 2 ? 2 : 1;
  static constexpr int kEights = kTile / kVector / 8;          // of 8 packs of lanes
  static constexpr int kHalf = kDepth<Operand> / kVector / 2;  // packs of half a lane

  struct Piece {
    Bits bits[kVector];
  };
  struct Units {
    uint4 unit[kPackUnits > 0 ? kPackUnits : 1];
  };

  // Along lanes a warp takes 8 packs of them at 4 k (or pairs of k): 128 consecutive bytes each.
  static constexpr int kKStep = kThreads / (8 * kEights) * kPair;
  static IMCL_DEVICE int lane_along(int t) { return (t % 8 + t / 32 % kEights * 8) * kVector; }
  static IMCL_DEVICE int k_along(int t, int j) {
    const int first = (t / 8 % 4 + t / (32 * kEights) * 4) * kPair;
    return first + j / kPair * kKStep + j % kPair;
  }
  // Otherwise it takes whole lanes, two of them in eight threads that write together.
  static constexpr int kLaneStep = kThreads / (2 * kHalf);
  static IMCL_DEVICE int lane_across(int t, int j) {
    return t / (4 * kHalf) * 2 + t / kHalf % 2 + j * kLaneStep;
  }
  static IMCL_DEVICE int k_across(int t) {
    return (t % kHalf + t / (2 * kHalf) % 2 * kHalf) * kVector;
  }

  static IMCL_DEVICE Bits encoded(T x, bool exact) {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Operand, Tf32>)
      return exact ? bits_of<Bits>(x) : Operand::encode(x);
    else return Operand::encode(to_acc(x));
  }

  static IMCL_DEVICE Piece encoded(const uint4& pack, bool exact) {
    if constexpr (std::is_same_v<T, typename Operand::Native>) {
      return bits_of<Piece>(pack);
    } else {
      struct Elements {
        T element[kVector];
      };
      const auto elements = bits_of<Elements>(pack);
      Piece piece;
#pragma unroll
      for (int e = 0; e < kVector; ++e) piece.bits[e] = encoded(elements.element[e], exact);
      return piece;
    }
  }

  static IMCL_DEVICE void store_elements(const View<T>& view, int first_lane, int first_k,
                                         bool exact, uint4* panel, int t) {
    const bool along = view.along_lanes();
#pragma unroll 4
    for (int first = 0; first < kTile * kDepth<Operand>; first += kThreads) {
      const int i = first + t;
      const int lane = along ? i % kTile : i / kDepth<Operand>;
      const int k = along ? i / kTile : i % kDepth<Operand>;
      const bool inside = first_lane + lane < view.lanes() && first_k + k < view.depth();
      number<Operand>(panel, lane, k) =
          inside ? encoded(view.at(first_lane + lane, first_k + k), exact) : Bits(0);
    }
  }

  uint4 packs_[kPacks];
};

// Replaces every number of a panel by change(number, lane, k).
template <class From, class To, class Change>
IMCL_DEVICE void change_panel(uint4* panel, const Change& change) {
  static_assert(sizeof(typename From::Bits) == sizeof(typename To::Bits));
#pragma unroll 2
  for (int i = thread(); i < kPanelUnits; i += kThreads) {
    const int lane = i / 4 % kTile;
    const int unit = unit_index(lane, i % 4) % 4 + i / (4 * kTile) * 4;  // undoes its permutation
    const auto old = Unit<From>::of(panel[i]);
    Unit<To> changed;
#pragma unroll
    for (int e = 0; e < kPerUnit<To>; ++e)
      changed.bits[e] = To::encode(change(old[e], lane, unit * kPerUnit<To> + e));
    panel[i] = changed.words();
  }
}

}  // namespace imcl
