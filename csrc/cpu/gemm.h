// The one inner product of the pairwise penalty: packed panels and a micro-kernel.
//
// A panel holds kPanel lanes of a matrix, k-major: panel[k * kPanel + lane]. It serves
// as the vector operand (kPanel lanes at a time) and, in strips of kStrip lanes, as the
// broadcast operand; so a Gram matrix packs its matrix once, and a symmetric matrix
// multiplies from either side. Packing is where dtypes are converted, strides resolved,
// rows centred and scaled.
#pragma once

#include <algorithm>

#include "simd.h"

namespace imcl {
inline namespace IMCL_ISA {

#if defined(__aarch64__)
inline constexpr bool kByLane = true;  // the CPU multiplies by a lane of a register
#else
inline constexpr bool kByLane = false;
#endif

// kVectors vectors of lanes times kStrip rows must fit the register file, which has 32 vectors
// with AVX-512 and on aarch64, else 16. A panel is a number of whole strips.
inline constexpr int kVectors = 2;
template <class E>
inline constexpr int kPanel = kVectors * kLanes<E>;
template <class E>
inline constexpr int kStrip = std::min(kVectorBytes == 64 || kByLane ? 8 : 4, kPanel<E>);

// Two consecutive k of one lane, in bfloat16: the operand of a dot instruction.
struct BFloat16Pair {
  uint32_t bits;
};

IMCL_INLINE WordBits pairs_of(HalfBits even, HalfBits odd) {
  return __builtin_convertvector(even, WordBits) | (__builtin_convertvector(odd, WordBits) << 16);
}

// What a panel of E accumulates in, and how many k one element of it holds.
template <class E>
struct Packed {
  using Acc = E;
  static constexpr int kDepth = 1;
};
template <>
struct Packed<BFloat16Pair> {
  using Acc = float;
  static constexpr int kDepth = 2;
};

#if defined(__AVX512BF16__)
inline constexpr bool kHasBFloat16Dot = true;
#else
inline constexpr bool kHasBFloat16Dot = false;
#endif

// acc += a * b for one broadcast a.
template <class E>
struct MultiplyAdd {
  using Operand = Vec<E>;
  static IMCL_INLINE Operand lanes(const E* p) { return load(p); }
  static IMCL_INLINE Operand broadcast(const E* p) { return splat(*p); }
  static IMCL_INLINE void apply(Vec<E>& acc, Operand a, Operand b) { acc += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct MultiplyAdd<BFloat16Pair> {
  using Operand = __m512i;
  static IMCL_INLINE Operand lanes(const BFloat16Pair* p) { return _mm512_loadu_si512(p); }
  static IMCL_INLINE Operand broadcast(const BFloat16Pair* p) {
    return _mm512_set1_epi32(static_cast<int>(p->bits));
  }
  static IMCL_INLINE void apply(Vec<float>& acc, Operand a, Operand b) {
    acc = reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                        reinterpret_cast<__m512bh>(a),
                                                        reinterpret_cast<__m512bh>(b)));
  }
};
#endif

#if defined(__aarch64__)
// load() of what is used lane by lane: GCC would take it into general registers first.
IMCL_INLINE Vec<float> load_lanes(const float* p) {
  return reinterpret_cast<Vec<float>>(vld1q_f32(p));
}
IMCL_INLINE Vec<double> load_lanes(const double* p) {
  return reinterpret_cast<Vec<double>>(vld1q_f64(p));
}
#endif

// acc += lhs(r) b[lane] of one k, for kStrip rows r and Vectors vectors of lanes.
template <int Vectors, class E, class Lhs>
IMCL_INLINE void multiply_add(Vec<typename Packed<E>::Acc> (&acc)[kStrip<E>][Vectors], const E* b,
                              const Lhs& lhs) {
  using Op = MultiplyAdd<E>;
  typename Op::Operand rhs[Vectors];
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) rhs[v] = Op::lanes(b + v * kLanes<typename Packed<E>::Acc>);
#pragma GCC unroll 8
  for (int r = 0; r < kStrip<E>; ++r) {
    const typename Op::Operand factor = lhs(r);
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) Op::apply(acc[r][v], factor, rhs[v]);
  }
}

// c[r * c_stride + lane] (+)= sum_k a[r * a_row + k * a_k] b[k * kPanel + lane]
// for kStrip rows r and Vectors vectors of lanes.
template <int Vectors, class E>
IMCL_INLINE void micro_kernel(const E* a, int64_t a_row, int64_t a_k, const E* b, int64_t depth,
                              typename Packed<E>::Acc* c, int64_t c_stride, bool accumulate) {
  using Acc = typename Packed<E>::Acc;
  constexpr int lanes = kLanes<Acc>, panel = kPanel<Acc>, rows = kStrip<E>;
  Vec<Acc> acc[rows][Vectors] = {};
  int64_t k = 0;
  if constexpr (kByLane) {
    if (a_k == 1) {
      for (const int64_t whole = depth / lanes * lanes; k < whole; k += lanes) {
        Vec<E> factors[rows];  // a row's of so many k
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) factors[r] = load_lanes(a + r * a_row + k);
#pragma GCC unroll 4
        for (int i = 0; i < lanes; ++i)
          multiply_add(acc, b + (k + i) * panel, [&](int r) { return splat(factors[r][i]); });
      }
    } else if (a_row == 1) {
      for (; k < depth; ++k) {
        Vec<E> factors[rows / lanes];  // all rows' of one k
#pragma GCC unroll 2
        for (int v = 0; v < rows / lanes; ++v) factors[v] = load_lanes(a + k * a_k + v * lanes);
        multiply_add(acc, b + k * panel,
                     [&](int r) { return splat(factors[r / lanes][r % lanes]); });
      }
    }
  }
  for (; k < depth; ++k)
    multiply_add(acc, b + k * panel,
                 [&](int r) { return MultiplyAdd<E>::broadcast(a + r * a_row + k * a_k); });
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      Acc* out = c + r * c_stride + v * lanes;
      store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
    }
  }
}

// A matrix to pack, seen as lanes by k; the value packed is (x - mean - rest) * scale, each
// per lane or per k, or absent (null).
template <class T>
struct Source {
  const T* data;
  Axis lane, k;
  const AccOf<T>* mean_of_lane = nullptr;
  const AccOf<T>* mean_of_k = nullptr;
  const AccOf<T>* scale_of_k = nullptr;
  const AccOf<T>* rest = nullptr;  // what rounding took of the means, if anything

  bool is_plain() const { return !mean_of_lane && !mean_of_k && !scale_of_k; }
};

// out[j * kPanel + i] = adjusted(x(first_lane + i, first_k + j), the vector of i, the k), 0 for
// i >= lanes.
template <class T, class Adjusted>
void pack_adjusted(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k,
                   int64_t depth, AccOf<T>* out, const Adjusted& adjusted) {
  using Acc = AccOf<T>;
  constexpr int width = kLanes<Acc>, panel = kPanel<Acc>;
  const T* base = x.data;
  const int full = static_cast<int>(lanes / width);  // vectors without padding

  for (int vector = 0; vector < kVectors; ++vector) {
    Acc* column = out + vector * width;
    const int64_t lane0 = first_lane + vector * width;
    int64_t j = 0;
    if (vector < full && x.lane.is_unit()) {
      for (; j < depth; ++j)
        store(column + j * panel,
              adjusted(load_acc(base + lane0 + x.k[first_k + j]), vector, first_k + j));
    } else if (vector < full && x.k.is_unit()) {
      for (; j + width <= depth; j += width) {
        Vec<Acc> v[width];
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) v[i] = load_acc(base + x.lane[lane0 + i] + first_k + j);
        transpose<Acc>(v);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i)
          store(column + (j + i) * panel, adjusted(v[i], vector, first_k + j + i));
      }
    }
    const int64_t present = std::clamp<int64_t>(lanes - vector * width, 0, width);
    for (; j < depth; ++j) {
      alignas(kVectorBytes) Acc v[width] = {};
      const int64_t k = first_k + j, offset = x.k[k];
      for (int64_t i = 0; i < present; ++i) v[i] = to_acc(base[x.lane[lane0 + i] + offset]);
      store(v, adjusted(load(v), vector, k));
      for (int64_t i = present; i < width; ++i) v[i] = 0;
      store(column + j * panel, load(v));
    }
  }
}

// out[j * kPanel + i] = (x - mean - rest) * scale of (first_lane + i, first_k + j), 0 for i >=
// lanes.
template <class T>
void pack_panel(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k,
                int64_t depth, AccOf<T>* out) {
  using Acc = AccOf<T>;
  constexpr int width = kLanes<Acc>, panel = kPanel<Acc>;
  const auto adjust = [&](const auto& adjusted) {
    pack_adjusted(x, first_lane, lanes, first_k, depth, out, adjusted);
  };
  if (x.is_plain()) return adjust([](Vec<Acc> v, int, int64_t) { return v; });
  alignas(kVectorBytes) Acc mean[panel] = {}, rest[panel] = {};
  if (x.mean_of_lane) {
    std::copy_n(x.mean_of_lane + first_lane, lanes, mean);
    if (x.rest) std::copy_n(x.rest + first_lane, lanes, rest);
    return adjust([&](Vec<Acc> v, int vector, int64_t k) {
      v = (v - load(mean + vector * width)) - load(rest + vector * width);
      return x.scale_of_k ? v * splat(x.scale_of_k[k]) : v;
    });
  }
  adjust([&](Vec<Acc> v, int, int64_t k) {
    if (x.mean_of_k) v -= splat(x.mean_of_k[k]);
    if (x.mean_of_k && x.rest) v -= splat(x.rest[k]);
    return x.scale_of_k ? v * splat(x.scale_of_k[k]) : v;
  });
}

// out[r * stride + j] = x(first_lane + r, j) - mean - rest for kStrip lanes, absent ones 0: a
// broadcast operand that stays in the order it is read in. Nothing that is packed so has a scale.
template <class T>
void pack_strip(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t depth, AccOf<T>* out,
                int64_t stride) {
  using Acc = AccOf<T>;
  constexpr int width = kLanes<Acc>;
  for (int64_t r = 0; r < kStrip<Acc>; ++r) {
    Acc* row = out + r * stride;
    if (r >= lanes) {
      std::fill_n(row, depth, Acc(0));
      continue;
    }
    const T* from = x.data + x.lane[first_lane + r];
    const Acc* const of_k = x.mean_of_k;
    const Acc mean = x.mean_of_lane ? x.mean_of_lane[first_lane + r] : Acc(0);
    const Acc rest = x.mean_of_lane && x.rest ? x.rest[first_lane + r] : Acc(0);
    int64_t j = 0;
    if (x.k.is_unit()) {
      for (; j + width <= depth; j += width) {
        Vec<Acc> v = load_acc(from + j) - splat(mean) - splat(rest);
        if (of_k) v -= load(of_k + j);
        if (of_k && x.rest) v -= load(x.rest + j);
        store(row + j, v);
      }
    }
    for (; j < depth; ++j) {
      Acc v = to_acc(from[x.k[j]]) - mean - rest;
      if (of_k) v -= of_k[j];
      if (of_k && x.rest) v -= x.rest[j];
      row[j] = v;
    }
  }
}

// Rounds a float panel of an even depth to bfloat16 pairs:
// out[j * kPanel + lane] = (in[2j * kPanel + lane], in[(2j + 1) * kPanel + lane]).
inline void pair_panel(const float* in, int64_t depth, BFloat16Pair* out) {
  constexpr int width = kLanes<float>, panel = kPanel<float>;
  for (int64_t j = 0; j < depth / 2; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const float* from = in + 2 * j * panel + v * width;
      const WordBits both = pairs_of(to_bfloat16(load(from)), to_bfloat16(load(from + panel)));
      std::memcpy(out + j * panel + v * width, &both, sizeof both);
    }
  }
}

// pack_panel of a matrix that is bfloat16 already, with nothing to subtract or multiply, as
// pairs; an odd depth is completed with zeros. Along k a pair is one word of x.
inline void pack_pairs(const Source<BFloat16>& x, int64_t first_lane, int64_t lanes,
                       int64_t first_k, int64_t depth, BFloat16Pair* out) {
  constexpr int width = kLanes<float>, panel = kPanel<float>;
  for (int vector = 0; vector < kVectors; ++vector) {
    BFloat16Pair* column = out + vector * width;
    const int64_t lane0 = first_lane + vector * width;
    const int64_t present = std::clamp<int64_t>(lanes - vector * width, 0, width);
    int64_t j = 0;  // of pairs
    if (present == width && x.lane.is_unit()) {
      for (; 2 * j + 1 < depth; ++j) {
        HalfBits even, odd;
        std::memcpy(&even, x.data + lane0 + x.k[first_k + 2 * j], sizeof even);
        std::memcpy(&odd, x.data + lane0 + x.k[first_k + 2 * j + 1], sizeof odd);
        const WordBits both = pairs_of(even, odd);
        std::memcpy(column + j * panel, &both, sizeof both);
      }
    } else if (present == width && x.k.is_unit()) {
      for (; 2 * (j + width) <= depth; j += width) {
        Vec<float> v[width];  // of pairs, which are only moved
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i)
          std::memcpy(&v[i], x.data + x.lane[lane0 + i] + first_k + 2 * j, sizeof v[i]);
        transpose<float>(v);
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) std::memcpy(column + (j + i) * panel, &v[i], sizeof v[i]);
      }
    }
    for (; 2 * j < depth; ++j) {
      WordBits both = {};
      for (int64_t i = 0; i < present; ++i) {
        const BFloat16* row = x.data + x.lane[lane0 + i];
        both[i] = row[x.k[first_k + 2 * j]].bits;
        if (2 * j + 1 < depth)
          both[i] |= static_cast<uint32_t>(row[x.k[first_k + 2 * j + 1]].bits) << 16;
      }
      std::memcpy(column + j * panel, &both, sizeof both);
    }
  }
}

}  // namespace IMCL_ISA
}  // namespace imcl
