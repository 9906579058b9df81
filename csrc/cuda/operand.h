// The factors of products: their bits in shared memory, made of accumulated numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"

#define IMCL_DEVICE __device__ __forceinline__

namespace imcl {

template <class To, class From>
IMCL_DEVICE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
struct Plain {  // of a dtype
  using Native = T;
  using Acc = imcl::Acc<T>;
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  static IMCL_DEVICE Bits encode(Acc x) { return bits_of<Bits>(from_acc<T>(x)); }
  static IMCL_DEVICE Acc decode(Bits bits) { return to_acc(bits_of<T>(bits)); }
};

struct Tf32 {  // float32 of which the last 13 bits are 0
  using Native = void;
  using Acc = float;
  using Bits = uint32_t;
  static IMCL_DEVICE Bits encode(float x) {
#if defined(IMCL_CUDA_ON_CPU)
    // To the nearest, ties away from zero.
    const uint32_t bits = bits_of<uint32_t>(x);
    return x != x ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
#else
    Bits bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
#endif
  }
  static IMCL_DEVICE float decode(Bits bits) { return bits_of<float>(bits); }
};

struct SplitTf32 : Plain<float> {};  // float32, multiplied as the sum of two Tf32

}  // namespace imcl
