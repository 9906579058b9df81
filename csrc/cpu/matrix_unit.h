// What multiplies packed panels: the micro-kernel of gemm.h, or a matrix unit.
//
//   C (rows, kPanel) (+)= A (rows, depth) B (depth, kPanel)
//
// The matrix unit is Intel's AMX. Its registers are tiles of up to 16 rows of 64 bytes, and one
// instruction, TDPBF16PS, adds to a tile C (16, 16) of float32 what two tiles of pairs of
// bfloat16 give, A (16 rows, 16 pairs of k) and B (16 pairs of k, 16 lanes):
//
//   even_mn = sum_k A_mk.low B_kn.low, odd_mn = sum_k A_mk.high B_kn.high, C_mn += even_mn + odd_mn
//
// each sum one fused multiply-add after the other, from 0, rounded to nearest even; subnormals are
// taken for 0, and results that would be are 0. With IMCL_MATRIX_UNIT_STAND_IN the same is done in
// plain C++, bit for bit, for tests on CPUs that have no such unit.
#pragma once

#include "gemm.h"

#if defined(IMCL_MATRIX_UNIT) && !defined(IMCL_MATRIX_UNIT_STAND_IN) && !defined(__AVX512BF16__)
#error "the level of the matrix unit is that of avx512bf16 and more"
#endif

namespace imcl {
inline namespace IMCL_ISA {

#if defined(IMCL_MATRIX_UNIT)
inline constexpr bool kHasMatrixUnit = true;
#else
inline constexpr bool kHasMatrixUnit = false;
#endif

// Whether panels of E are multiplied by a matrix unit.
template <class E>
inline constexpr bool kOnMatrixUnit = kHasMatrixUnit && std::is_same_v<E, BFloat16Pair>;

// Rows of A that are taken at a time.
template <class E>
inline constexpr int64_t kRows = kOnMatrixUnit<E> ? kPanel<float> : kStrip<E>;

// Elements of E along k that a panel or a strip is filled up to with zeros.
template <class E>
inline constexpr int64_t padded_depth(int64_t depth) {
  constexpr int64_t whole = kOnMatrixUnit<E> ? 16 : 1;
  return (depth + whole - 1) / whole * whole;
}

// Where A lies, row by row and k by k.
template <class E>
struct LeftOperand {
  const E* data;
  int64_t row, k;
};

// Multiplies while it lives; one for each task, for a matrix unit is set up by each thread.
template <class E, bool = kOnMatrixUnit<E>>
class Multiplier {
 public:
  // Rows [first, first + kRows) of a packed panel as the left operand.
  static LeftOperand<E> rows_of_panel(const E* panel, int64_t first, int64_t /*depth*/) {
    return {panel + first, 1, kPanel<typename Packed<E>::Acc>};
  }

  // c (kRows, kPanel) (+)= a b, of the lanes from vector kVectors - Vectors on.
  template <int Vectors = kVectors>
  IMCL_INLINE void multiply(LeftOperand<E> a, const E* b, int64_t depth, typename Packed<E>::Acc* c,
                            int64_t c_stride, bool accumulate) const {
    constexpr int skipped = (kVectors - Vectors) * kLanes<typename Packed<E>::Acc>;
    micro_kernel<Vectors>(a.data, a.row, a.k, b + skipped, depth, c + skipped, c_stride,
                          accumulate);
  }
};

#if defined(IMCL_MATRIX_UNIT)

inline constexpr int kTile = 16;  // rows, lanes and pairs of k; a panel is two tiles wide
static_assert(kPanel<float> == 2 * kTile);

#if defined(IMCL_MATRIX_UNIT_STAND_IN)

// The eight tiles, and what the instructions do to them.
class TileRegisters {
 public:
  template <int To>
  void zero() {
    std::memset(tiles_[To], 0, sizeof tiles_[To]);
  }
  template <int To>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < kTile; ++row)
      std::memcpy(tiles_[To][row], static_cast<const char*>(from) + row * stride, kRowBytes);
  }
  template <int From>
  void store(void* to, int64_t stride) const {
    for (int row = 0; row < kTile; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles_[From][row], kRowBytes);
  }
  template <int C, int A, int B>
  void multiply() {
    for (int m = 0; m < kTile; ++m) {
      float even[kTile] = {}, odd[kTile] = {};
      for (int k = 0; k < kTile; ++k) {
        const uint32_t a = tiles_[A][m][k];
        for (int n = 0; n < kTile; ++n) {
          const uint32_t b = tiles_[B][k][n];
          even[n] = flushed(__builtin_fmaf(value(a << 16), value(b << 16), even[n]));
          odd[n] = flushed(__builtin_fmaf(value(a & kHigh), value(b & kHigh), odd[n]));
        }
      }
      for (int n = 0; n < kTile; ++n) {
        const float sum = flushed(even[n] + odd[n]);
        tiles_[C][m][n] = float_to_bits(flushed(value(tiles_[C][m][n]) + sum));
      }
    }
  }

 private:
  static constexpr uint32_t kHigh = 0xffff0000u;
  static constexpr std::size_t kRowBytes = 64;

  static float flushed(float x) {
    return __builtin_fabsf(x) < std::numeric_limits<float>::min() ? __builtin_copysignf(0.0f, x)
                                                                  : x;
  }
  static float value(uint32_t bits) { return flushed(bits_to_float(bits)); }

  uint32_t tiles_[8][kTile][kTile];
};

#else

// The compiler's intrinsics take the number of a tile as text only, which no template can give.
class TileRegisters {
 public:
  TileRegisters() {
    // Tiles of 16 rows of 64 bytes, all of them.
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileRegisters() { asm volatile("tilerelease" ::); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  template <int To>
  IMCL_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(To));
  }
  template <int To>
  IMCL_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(To), "r"(from), "r"(stride) : "memory");
  }
  template <int From>
  IMCL_INLINE void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(From), "r"(to), "r"(stride) : "memory");
  }
  template <int C, int A, int B>
  IMCL_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

#endif

template <>
class Multiplier<BFloat16Pair, true> {
 public:
  using E = BFloat16Pair;

  // A panel that turn() has turned.
  static LeftOperand<E> rows_of_panel(const E* turned, int64_t first, int64_t depth) {
    return {turned + first * depth, depth, 1};
  }

  // All lanes, whatever is asked for: the others come for nothing.
  template <int Vectors = kVectors>
  IMCL_INLINE void multiply(LeftOperand<E> a, const E* b, int64_t depth, float* c, int64_t c_stride,
                            bool accumulate) {
    constexpr int panel = kPanel<float>;
    const int64_t c_bytes = 4 * c_stride, a_bytes = 4 * a.row, b_bytes = 4 * panel;
    float* lower = c + kTile * c_stride;
    if (accumulate) {
      tiles_.load<0>(c, c_bytes);
      tiles_.load<1>(c + kTile, c_bytes);
      tiles_.load<2>(lower, c_bytes);
      tiles_.load<3>(lower + kTile, c_bytes);
    } else {
      tiles_.zero<0>();
      tiles_.zero<1>();
      tiles_.zero<2>();
      tiles_.zero<3>();
    }
    for (int64_t k = 0; k < depth; k += kTile) {
      tiles_.load<4>(a.data + k, a_bytes);
      tiles_.load<5>(a.data + kTile * a.row + k, a_bytes);
      tiles_.load<6>(b + k * panel, b_bytes);
      tiles_.load<7>(b + k * panel + kTile, b_bytes);
      tiles_.multiply<0, 4, 6>();
      tiles_.multiply<1, 4, 7>();
      tiles_.multiply<2, 5, 6>();
      tiles_.multiply<3, 5, 7>();
    }
    tiles_.store<0>(c, c_bytes);
    tiles_.store<1>(c + kTile, c_bytes);
    tiles_.store<2>(lower, c_bytes);
    tiles_.store<3>(lower + kTile, c_bytes);
  }

 private:
  TileRegisters tiles_;
};

#endif

// out (kPanel, depth), row by row, of a packed panel (depth, kPanel): what the matrix unit takes
// as its left operand. The depth is padded.
inline void turn(const BFloat16Pair* panel, int64_t depth, BFloat16Pair* out) {
  constexpr int width = kLanes<float>, lanes = kPanel<float>;
  for (int64_t k = 0; k < depth; k += width)
    for (int lane = 0; lane < lanes; lane += width) {
      Vec<float> v[width];  // of pairs, which are only moved
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i)
        std::memcpy(&v[i], panel + (k + i) * lanes + lane, sizeof v[i]);
      transpose<float>(v);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) std::memcpy(out + (lane + i) * depth + k, &v[i], sizeof v[i]);
    }
}

}  // namespace IMCL_ISA
}  // namespace imcl
