// The tensor cores' product of one warp: d (16, 8) += a (16, k) b (k, 8), k = 16 of half
// types and 8 of TensorFloat-32.
//
// Where the elements lie, from the PTX ISA (Matrix Fragments for mma.m16n8k16 and m16n8k8),
// for lane 4 g + t, halves counted from the low one of the first register on:
//
// a  halves  0 <= i < 8: row g, or g + 8 if i is 2, 3, 6 or 7; column 2 t + i % 2, 8 more if i >= 4
//    tf32    0 <= i < 4: row g, or g + 8 if i is odd;          column t, 4 more if i >= 2
// b  halves  0 <= i < 4: row 2 t + i % 2, 8 more if i >= 2;    column g
//    tf32    0 <= i < 2: row t + 4 i;                          column g
// d          0 <= i < 4: row g, or g + 8 if i >= 2;            column 2 t + i % 2
//
// So in all of them the lanes 4 g to 4 g + 3 hold the rows g and g + 8 of a and the column g
// of b, and with t and the register go the k: as long as a and b agree, any k will do.
#pragma once

#include "operand.h"

namespace imcl {

#if defined(IMCL_CUDA_ON_CPU)

// The same on the CPU, one call for the warp: gathers both matrices by the rules above.
template <class Operand>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool halves = sizeof(typename Operand::Bits) == 2;
  constexpr int depth = halves ? 16 : 8;
  struct In {
    uint32_t a[4], b[2];
    float c[4];
  };
  struct Out {
    float d[4];
  };
  const In in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const Out out = emulated::collective<Out>(~0u, in, [](const auto& ins, const auto& outs) {
    const auto element = [](const uint32_t* registers, int i) {
      if constexpr (halves) {
        return Operand::decode(static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16));
      } else {
        return Operand::decode(registers[i] & ~uint32_t{0x1fff});  // what the hardware looks at
      }
    };
    float left[16][depth], right[depth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const In& mine = ins(static_cast<unsigned>(lane));
      for (int i = 0; i < (halves ? 8 : 4); ++i) {
        const bool lower = halves ? i / 2 % 2 : i % 2;
        const int column = halves ? 2 * t + i % 2 + i / 4 * 8 : t + i / 2 * 4;
        left[g + 8 * lower][column] = element(mine.a, i);
      }
      for (int i = 0; i < (halves ? 4 : 2); ++i)
        right[halves ? 2 * t + i % 2 + i / 2 * 8 : t + 4 * i][g] = element(mine.b, i);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < depth; ++k) sum += double{left[row][k]} * double{right[k][column]};
        const unsigned at = static_cast<unsigned>(lane);
        outs(at).d[i] = static_cast<float>(double{ins(at).c[i]} + sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
}

#else

#define IMCL_MMA(instruction)                                                                 \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Operand>
IMCL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Operand, Tf32>)
    IMCL_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (std::is_same_v<Operand, Plain<__half> >)
    IMCL_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  else IMCL_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}

#undef IMCL_MMA

#endif

// A float32 as the sum of two Tf32: 22 bits of it count, where one has 11. The first is what comes
// without its last bits, which takes a third of the instructions of rounding it; a product leaves
// out the last 13 bits of the second, which is rounded by that.
struct Tf32Sum {
  uint32_t high, low;
};

IMCL_DEVICE Tf32Sum tf32_sum_of(float x) {
  const uint32_t high = bits_of<uint32_t>(x) & ~uint32_t{0x1fff};
  return {high, bits_of<uint32_t>(x - Tf32::decode(high)) + 0x1000};
}

// It leaves out the product of what the first Tf32 of a and of b leave; and of b, where that is
// exact, what the first one leaves, which is nothing.
template <bool kExact>
IMCL_DEVICE void multiply(float (&d)[4], const Tf32Sum (&a)[4], const Tf32Sum (&b)[2]) {
  const uint32_t high_a[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t high_b[2] = {b[0].high, b[1].high};
  mma<Tf32>(d, {a[0].low, a[1].low, a[2].low, a[3].low}, high_b);
  if constexpr (!kExact) mma<Tf32>(d, high_a, {b[0].low, b[1].low});
  mma<Tf32>(d, high_a, high_b);
}

// The same for every Operand.
template <class Operand>
IMCL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Operand, SplitTf32>) {
    Tf32Sum parts_a[4], parts_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) parts_a[i] = tf32_sum_of(Tf32::decode(a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) parts_b[i] = tf32_sum_of(Tf32::decode(b[i]));
    multiply<false>(d, parts_a, parts_b);
  } else {
    mma<Operand>(d, a, b);
  }
}

}  // namespace imcl
