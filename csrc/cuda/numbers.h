// The dtypes in device code: what they accumulate in, and 16 bytes of them at a time.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../problem.h"
#include "launch.h"

namespace imcl {

// Calls run with a null pointer of the elements' type.
template <class Run>
auto with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(static_cast<double*>(nullptr));
    case DType::kBFloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16: return run(static_cast<__half*>(nullptr));
    default: return run(static_cast<float*>(nullptr));
  }
}

template <class T>
struct Accumulated {
  using Type = float;
};
template <>
struct Accumulated<double> {
  using Type = double;
};
template <class T>
using Acc = typename Accumulated<T>::Type;

// As kept_type() has it.
template <class T>
using Kept = std::conditional_t<std::is_same_v<T, __half>, float, T>;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

// A logit, -inf where it is the lowest number of its type.
__device__ __forceinline__ float masked(float x) { return x <= -0x1.fffffep127f ? -INFINITY : x; }
__device__ __forceinline__ double masked(double x) {
  return x <= -0x1.fffffffffffffp1023 ? -INFINITY : x;
}
__device__ __forceinline__ __nv_bfloat16 masked(__nv_bfloat16 x) {
  return to_acc(x) <= -0x1.fep127f ? __float2bfloat16_rn(-INFINITY) : x;
}
__device__ __forceinline__ __half masked(__half x) {
  return to_acc(x) <= -65504.0f ? __float2half_rn(-INFINITY) : x;
}

// The special function unit's exponential is good to 2 units in the last place near 0, and
// what it loses further off is small beside the sums that these go into.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// What one access takes at an address that must be aligned to it. The tests see that it is: a CPU
// takes any, and a GPU ends with an error.
template <class V, class T>
__device__ __forceinline__ V* whole(T* address) {
#if defined(IMCL_CUDA_ON_CPU)
  emulated::check_aligned(address, alignof(V));
#endif
  return reinterpret_cast<V*>(address);
}

// As many values as one load or store of a thread can take.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// `from` and `to` are aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  const uint4 raw = *whole<const uint4>(from);
  Pack<T> pack;
  memcpy(&pack, &raw, sizeof(raw));
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, sizeof(raw));
  *whole<uint4>(to) = raw;
}

// Rounded to bfloat16, 8 bytes of them; `to` is aligned to these.
__device__ __forceinline__ void store_pack(__nv_bfloat16* to, const Pack<float>& pack) {
  __nv_bfloat16 rounded[Pack<float>::kSize];
#pragma unroll
  for (int i = 0; i < Pack<float>::kSize; ++i) rounded[i] = __float2bfloat16_rn(pack.at[i]);
  uint2 raw;
  memcpy(&raw, rounded, sizeof(raw));
  *whole<uint2>(to) = raw;
}

}  // namespace imcl
