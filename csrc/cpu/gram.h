// Packed panels of one matrix, and the symmetric product that is made of them.
#pragma once

#include "matrix_unit.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {  // what is handed to Parallel must be no symbol that ISA levels could share

inline constexpr int64_t kDepthBlock = 256;  // k packed at a time by a Gram: panels stay in L2

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of E that a panel or a strip of `depth` k holds of each lane.
template <class E>
inline int64_t packed_depth(int64_t depth) {
  return padded_depth<E>(divide_up(depth, Packed<E>::kDepth));
}

// Asks for the next `depth` k of the lanes that were just packed.
template <class T>
void prefetch(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k,
              int64_t depth) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  if (!x.k.is_unit()) return;
  for (int64_t lane = first_lane; lane < first_lane + lanes; ++lane)
    for (int64_t k = 0; k < depth; k += kLine)
      __builtin_prefetch(x.data + x.lane[lane] + first_k + k, 0, 2);
}

// Zeros after `depth` k of a panel, up to packed_depth<E>(depth).
template <class E>
void complete(int64_t depth, E* out) {
  const int64_t packed = divide_up(depth, Packed<E>::kDepth), padded = packed_depth<E>(depth);
  std::memset(out + packed * kPanel<float>, 0,
              static_cast<std::size_t>((padded - packed) * kPanel<float>) * sizeof(E));
}

// The panel that fill(values) makes of unrounded numbers as elements of E.
template <class E, class Acc, class Fill>
void pack_as(int64_t depth, E* out, const Fill& fill) {
  if constexpr (std::is_same_v<E, Acc>) {
    fill(out);
  } else {
    constexpr int panel = kPanel<float>;
    complete(depth, out);
    Scratch scratch;
    float* values = scratch.get<float>((depth + 1) * panel);
    fill(values);
    std::fill_n(values + depth * panel, panel, 0.0f);
    pair_panel(values, depth + 1, out);
  }
}

// pack_panel into elements of E, completed with zeros up to packed_depth<E>(depth).
template <class E, class T>
void pack(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k, int64_t depth,
          E* out) {
  if constexpr (std::is_same_v<E, BFloat16Pair> && std::is_same_v<T, BFloat16>) {
    if (x.is_plain()) {
      complete(depth, out);
      return pack_pairs(x, first_lane, lanes, first_k, depth, out);
    }
  }
  pack_as<E, AccOf<T>>(depth, out, [&](AccOf<T>* values) {
    pack_panel(x, first_lane, lanes, first_k, depth, values);
  });
}

// g (panels, panels) tiles of X X^T, x seen as `lanes` rows by `depth`: the upper ones, and
// of the diagonal tiles at least the upper triangle. Lanes beyond `lanes` come out 0. If
// `accumulate` they are added to what is there.
template <class E, class T>
void gram(const Source<T>& x, int64_t lanes, int64_t depth, AccOf<T>* g, int64_t stride,
          const Parallel& parallel, bool accumulate = false) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;
  const int64_t panels = divide_up(lanes, panel);
  const int64_t panel_size = panel * packed_depth<E>(kDepthBlock);
  Scratch scratch;
  E* packed = scratch.get<E>(panels * panel_size);
  E* left = kOnMatrixUnit<E> ? scratch.get<E>(panels * panel_size) : packed;
  if (depth == 0 && !accumulate) std::fill_n(g, panels * panel * stride, Acc(0));
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t block = std::min(kDepthBlock, depth - k), elements = packed_depth<E>(block);
    const int64_t next = std::min(kDepthBlock, depth - k - block);
    parallel(panels, [&](int64_t p) {
      const int64_t present = std::min(panel, lanes - p * panel);
      pack(x, p * panel, present, k, block, packed + p * panel_size);
      if constexpr (kOnMatrixUnit<E>)
        turn(packed + p * panel_size, elements, left + p * panel_size);
      prefetch(x, p * panel, present, k + block, next);
    });
    parallel(panels * (panels + 1) / 2, [&](int64_t tile) {
      int64_t i = 0;
      for (; tile >= panels - i; ++i) tile -= panels - i;
      const int64_t j = i + tile;
      const E *a = left + i * panel_size, *b = packed + j * panel_size;
      Multiplier<E> multiplier;
      for (int64_t r = 0; r < panel; r += kRows<E>) {
        Acc* out = g + (i * panel + r) * stride + j * panel;
        const LeftOperand<E> rows = multiplier.rows_of_panel(a, r, elements);
        if (i == j && r >= width) {  // left of the diagonal in its first vector
          multiplier.template multiply<1>(rows, b, elements, out, stride, accumulate || k > 0);
        } else {
          multiplier.multiply(rows, b, elements, out, stride, accumulate || k > 0);
        }
      }
    });
  }
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
