// exp of a vector, for softmaxes: arguments are at most a rounding error above 0.
#pragma once

#include "simd.h"

namespace imcl {
inline namespace IMCL_ISA {

// Within 2 units in the last place; results below the smallest normal float are 0.
IMCL_INLINE Vec<float> exp_of(Vec<float> x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds n into the lowest bits.
  const Vec<float> rounder = splat(12582912.0f);
  const Vec<float> shifted = x * 1.44269504f + rounder;
  const Vec<float> n = shifted - rounder;
  Vec<float> r = x - n * 0.693359375f;  // ln 2 in two parts: the product with n is exact
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.98412698e-4f);  // Taylor to r^7: its error is 0.1 ulp
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const WordBits exponent = reinterpret_cast<WordBits>(shifted) << 23;
  const Vec<float> result =
      reinterpret_cast<Vec<float>>(reinterpret_cast<WordBits>(p) + exponent);
  // NaN fails both comparisons and comes out as the NaN it went in as.
  return x < -87.0f ? Vec<float>{} : (x <= 88.0f ? result : x + 1e38f * x);
}

IMCL_INLINE Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

IMCL_INLINE float exp_of(float x) { return std::exp(x); }
IMCL_INLINE double exp_of(double x) { return std::exp(x); }

}  // namespace IMCL_ISA
}  // namespace imcl
