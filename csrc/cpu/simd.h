// Vectors of the width of the ISA this file is compiled for, in GCC's and clang's
// vector extension: one source for AVX-512, AVX2 and the baseline of any machine.
//
// Everything is in the inline namespace of its ISA, so that the per-ISA objects can
// be linked into one library without sharing a single inline function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "types.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(IMCL_ISA)
#error "compile with -DIMCL_ISA=<name of the ISA level>"
#endif

namespace imcl {
inline namespace IMCL_ISA {

#if defined(__AVX512F__) || defined(IMCL_MATRIX_UNIT_STAND_IN)  // which stands in for a level of it
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
// Lanes of T, and how many there are.
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
IMCL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
IMCL_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
IMCL_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not x + {}: that would lose the sign of -0
}

namespace detail {
// The lanes I of a and, counted on from those of a, of b.
template <int... I, class V>
IMCL_INLINE V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else  // GCC before 12
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Indices{I...});
#endif
}

// v with its lanes rotated by Step, combined with v itself, until all lanes are alike.
template <int Step, class T, class Op, std::size_t... I>
IMCL_INLINE Vec<T> fold(Vec<T> v, const Op& op, std::index_sequence<I...> lanes) {
  if constexpr (Step == 0) {
    return v;
  } else {
    return fold<Step / 2, T>(op(v, shuffle<(static_cast<int>(I) + Step) % kLanes<T>...>(v, v)), op,
                             lanes);
  }
}

template <class T, class Op>
IMCL_INLINE T fold(Vec<T> v, const Op& op) {
  return fold<kLanes<T> / 2, T>(v, op, std::make_index_sequence<kLanes<T>>{})[0];
}
}  // namespace detail

template <class T>
IMCL_INLINE T sum_lanes(Vec<T> v) {
  return detail::fold<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// Lane by lane; where either is NaN, b.
template <class V>
IMCL_INLINE V max_vector(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return reinterpret_cast<V>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#endif
  return a > b ? a : b;
}

template <class V>
IMCL_INLINE V min_vector(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return reinterpret_cast<V>(
        _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#endif
  return a < b ? a : b;
}

template <class T>
IMCL_INLINE T max_lanes(Vec<T> v) {
  return detail::fold<T>(v, [](Vec<T> a, Vec<T> b) { return max_vector(a, b); });
}
template <class T>
IMCL_INLINE T min_lanes(Vec<T> v) {
  return detail::fold<T>(v, [](Vec<T> a, Vec<T> b) { return min_vector(a, b); });
}

// Half-precision scalars. bfloat16 is the upper half of a float; both round to
// nearest even and keep NaN a NaN.

IMCL_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

IMCL_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

IMCL_INLINE float to_acc(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
IMCL_INLINE float to_acc(float x) { return x; }
IMCL_INLINE double to_acc(double x) { return x; }

inline float to_acc(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  // Multiplying by 2^112 moves the exponent's bias, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

template <class T, class Acc>
T from_acc(Acc x);

template <>
IMCL_INLINE float from_acc<float, float>(float x) {
  return x;
}
template <>
IMCL_INLINE double from_acc<double, double>(double x) {
  return x;
}
template <>
inline BFloat16 from_acc<BFloat16, float>(float x) {
  uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
inline Float16 from_acc<Float16, float>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
  const __fp16 half = x;
  Float16 result;
  std::memcpy(&result, &half, sizeof result);
  return result;
#else
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the subnormal's bits, rounded, at the bottom of the mantissa.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13))};
#endif
}

// Unit-stride loads and stores with conversion to and from the accumulation type.

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// As kept_type() has it.
template <class T>
using KeptOf = std::conditional_t<std::is_same_v<T, Float16>, float, T>;

IMCL_INLINE Vec<float> load_acc(const float* p) { return load(p); }
IMCL_INLINE Vec<double> load_acc(const double* p) { return load(p); }
IMCL_INLINE void store_acc(float* p, Vec<float> v) { store(p, v); }
IMCL_INLINE void store_acc(double* p, Vec<double> v) { store(p, v); }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

IMCL_INLINE Vec<float> load_acc(const BFloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(half, WordBits) << 16);
}

// The upper 16 bits of each result are the float rounded to bfloat16.
IMCL_INLINE WordBits round_to_bfloat16(Vec<float> v) {
  const WordBits bits = reinterpret_cast<WordBits>(v);
  const WordBits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordBits is_nan = reinterpret_cast<WordBits>(v != v);
  return (is_nan & (bits | 0x400000u)) | (~is_nan & rounded);
}

// v rounded to bfloat16. The instruction takes subnormals for 0, as the one for dot products does.
IMCL_INLINE HalfBits to_bfloat16(Vec<float> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfBits>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  return __builtin_convertvector(round_to_bfloat16(v) >> 16, HalfBits);
#endif
}

IMCL_INLINE void store_acc(BFloat16* p, Vec<float> v) {
  const HalfBits half = to_bfloat16(v);
  std::memcpy(p, &half, sizeof half);
}

IMCL_INLINE Vec<float> load_acc(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  float16x4_t half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec<float>>(vcvt_f32_f16(half));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

IMCL_INLINE void store_acc(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t half = vcvt_f16_f32(reinterpret_cast<float32x4_t>(v));
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_acc<Float16>(static_cast<float>(v[i]));
#endif
}

// x[i], i < n, to memory of any stride.
template <class T>
IMCL_INLINE void store_strided(T* p, int64_t stride, const AccOf<T>* x, int64_t n) {
  constexpr int lanes = kLanes<AccOf<T>>;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + lanes <= n; i += lanes) store_acc(p + i, load(x + i));
  }
  for (; i < n; ++i) p[i * stride] = from_acc<T>(x[i]);
}

namespace detail {
template <int Step, bool High, int Lanes>
constexpr int butterfly(int i) {
  // Lane i of the low (high) result takes blocks of Step lanes from both operands in turn.
  const int block = i / Step, within = i % Step;
  const int from = (block & ~1) * Step + within + (High ? Step : 0);
  return (block & 1) ? from + Lanes : from;
}

template <int Step, bool High, class V, std::size_t... I>
IMCL_INLINE V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  return shuffle<butterfly<Step, High, lanes>(static_cast<int>(I))...>(a, b);
}

template <int Step, class T>
IMCL_INLINE void transpose_steps(Vec<T>* v) {
  constexpr int lanes = kLanes<T>;
  if constexpr (Step < lanes) {
    using Lanes = std::make_index_sequence<static_cast<std::size_t>(lanes)>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & Step) continue;
      const Vec<T> a = v[i], b = v[i + Step];
      v[i] = interleave<Step, false>(a, b, Lanes{});
      v[i + Step] = interleave<Step, true>(a, b, Lanes{});
    }
    transpose_steps<Step * 2, T>(v);
  }
}
}  // namespace detail

// Transposes kLanes<T> vectors in place.
template <class T>
IMCL_INLINE void transpose(Vec<T>* v) {
  detail::transpose_steps<1, T>(v);
}

}  // namespace IMCL_ISA
}  // namespace imcl
