// Logits that mask their class, and what they are multiplied with.
#pragma once

#include <limits>

#include "simd.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

template <class T>
constexpr AccOf<T> kLowest = std::numeric_limits<T>::lowest();
template <>
constexpr float kLowest<BFloat16> = -0x1.fep127f;
template <>
constexpr float kLowest<Float16> = -65504.0f;

template <class Acc>
constexpr Acc kMasked = -std::numeric_limits<Acc>::infinity();

// x, or 0 where p is 0, whatever x is: 0 log 0 = 0.
template <class V>
IMCL_INLINE V unless_0(V p, V x) {
  return p == V{} ? V{} : x;
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
