// exp and log of a vector, for softmaxes: arguments of exp are at most a rounding error above 0.
#pragma once

#include "simd.h"

namespace imcl {
inline namespace IMCL_ISA {

// 2^n p for p in [1/2, 2] and an integral n >= -150.
IMCL_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // n lands in the lowest bits of the sum's mantissa. Results below the normal floats
  // are flushed: their exponent would wrap around. NaN stays, whose lowest bits may be any.
  const WordBits shifted = reinterpret_cast<WordBits>(n + 12582912.0f) << 23;
  const WordBits scaled = reinterpret_cast<WordBits>(p) + shifted;
  const WordBits flushed = reinterpret_cast<WordBits>(n < -125.0f);
  return n == n ? reinterpret_cast<Vec<float>>(scaled & ~flushed) : p;
#endif
}

// Within 2 units in the last place.
IMCL_INLINE Vec<float> exp_of(Vec<float> x) {
  // x log2(e) = n + r, |r| <= 1/2. Adding 1.5 * 2^23 rounds n to an integer, and
  // log2(e) in two parts keeps r exact to a float's precision however large n is.
  x = max_vector(splat(-104.0f), x);  // NaN stays NaN
  const Vec<float> n = (x * 1.44269502f + 12582912.0f) - 12582912.0f;
  Vec<float> r = x * 1.44269502f - n;
  r = r + x * 1.92596299e-8f;
  // 2^r at the Chebyshev nodes of [-1/2, 1/2]: a relative error of 2.5e-9.
  Vec<float> p = splat(1.54614448e-4f);
  p = p * r + 1.34004280e-3f;
  p = p * r + 9.61805694e-3f;
  p = p * r + 5.55032715e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return scale_by_power(p, n);
}

IMCL_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Within 2 units in the last place, of normal numbers and of 0; infinity and NaN stay.
IMCL_INLINE Vec<float> log_of(Vec<float> x) {
  // x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); the polynomial is that of Cephes.
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  const Integers bits = reinterpret_cast<Integers>(x);
  const Integers above = bits - 0x3f3504f3;  // the bits of sqrt(1/2)
  const Integers exponent = above >> 23;
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  const Vec<float> n = __builtin_convertvector(exponent, Vec<float>), square = f * f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * square - n * 2.12194440e-4f - square * 0.5f;
  const Vec<float> log = (f + p) + n * 0.693359375f;
  const Vec<float> least = x == Vec<float>{} ? splat(-std::numeric_limits<float>::infinity()) : log;
  return x - x == Vec<float>{} ? least : x;
}

IMCL_INLINE Vec<double> log_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace IMCL_ISA
}  // namespace imcl
