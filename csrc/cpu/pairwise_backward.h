// The backward of one matrix in each of the three forms of pairwise_kernels.cpp.
#pragma once

#include "gram.h"
#include "matrix.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {  // what is handed to Parallel must be no symbol that ISA levels could share

// x[first + i], i < n, to an axis of a tensor.
template <class T>
void store_axis(T* base, const Axis& axis, int64_t first, const AccOf<T>* x, int64_t n) {
  if (!axis.table) return store_strided(base + first * axis.stride, axis.stride, x, n);
  for (int64_t i = 0; i < n; ++i) base[axis.table[first + i]] = from_acc<T>(x[i]);
}

// A symmetric matrix (n, n), kept as symmetric.h says.
template <class Acc>
class Symmetric {
 public:
  Symmetric(const Acc* data, int64_t n, Scratch& scratch)
      : data_(data), n_(n), rows_(scratch.get<int64_t>(n)) {
    for (int64_t i = 0; i < n; ++i) rows_[i] = symmetric_row(n, i);
  }

  // A packed panel of it: [k, lane], all k.
  template <class E>
  void pack(int64_t first, int64_t lanes, E* out) const {
    static_assert(kPanel<Acc> <= 2 * kSymmetricBlock);
    pack_as<E, Acc>(n_, out, [&](Acc* values) {
      const Axis row{0, rows_}, column{1, nullptr};
      // All lanes are columns of the rows k up to the end of the first lane's block, and all k
      // from there on are columns of the lanes' rows, which begin in that block or the next.
      const int64_t above = std::min(n_, symmetric_first(first) + kSymmetricBlock);
      pack_panel(Source<Acc>{data_, column, row}, first, lanes, 0, above, values);
      pack_panel(Source<Acc>{data_, row, column}, first, lanes, above, n_ - above,
                 values + above * kPanel<Acc>);
    });
  }

 private:
  const Acc* data_;
  int64_t n_;
  int64_t* rows_;  // where they begin
};

// Everything a backward of one matrix shares among its tasks.
template <class E, class T>
struct Backward {
  using Acc = AccOf<T>;
  static constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;

  Source<T> x;  // lanes: the free axis; k: the axis S contracts
  T* dx;
  Axis dx_free, dx_k;
  int64_t free_count, k_count;
  const E* symmetric;  // S in panels, turned where it is the left operand; null: every y_i is s
  const Acc* s;
  const Acc* inverse_norm;  // of the free axis; null in the primal form: dX = Y
  double factor, grad;      // f_i = factor * (1/n_i)^power
  int power;

  int64_t depth() const { return packed_depth<E>(k_count); }
  const E* symmetric_panel(int64_t p) const { return symmetric + p * panel * depth(); }

  // f_i of one index of the free axis, times the incoming gradient.
  Acc scale_of(int64_t i) const {
    if (!inverse_norm) return static_cast<Acc>(grad);
    const Acc inverse = inverse_norm[i];
    return static_cast<Acc>(grad * factor) * (power == 2 ? inverse * inverse : inverse);
  }

  // Y^T (k, lanes) = S X, the lanes being one panel of the free axis.
  void free_lanes(int64_t p) const {
    const int64_t first = p * panel, lanes = std::min(panel, free_count - first);
    Scratch scratch;
    prefetch_panel(first + panel);
    E* packed = scratch.get<E>(depth() * panel);
    pack(x, first, lanes, 0, k_count, packed);
    alignas(kVectorBytes) Acc scale[panel] = {};
    for (int64_t i = 0; i < lanes; ++i) scale[i] = scale_of(first + i);
    if (!inverse_norm) {
      alignas(kVectorBytes) Acc y[kRows<E> * panel];
      Multiplier<E> multiplier;
      for (int64_t k = 0; k < k_count; k += kRows<E>) {
        const auto rows = multiplier.rows_of_panel(symmetric_panel(k / panel), k % panel, depth());
        multiplier.multiply(rows, packed, depth(), y, panel, false);
        emit(y, k, std::min(kRows<E>, k_count - k), first, lanes, scale);
      }
      return;
    }
    // The other forms come with unrounded elements only: the panel holds x itself.
    if constexpr (std::is_same_v<E, Acc>) correct(packed, first, lanes, scale);
  }

  // Y^T of the dual and signed forms and what they subtract, x being one packed panel.
  void correct(const Acc* values, int64_t first, int64_t lanes, const Acc* scale) const {
    const int64_t padded = divide_up(k_count, kStrip<Acc>) * kStrip<Acc>;
    Scratch scratch;
    Acc* y = scratch.get<Acc>(padded * panel);
    for (int64_t k = 0; k < k_count; k += kStrip<Acc>) {
      if (symmetric) {
        micro_kernel<2>(symmetric_panel(k / panel) + k % panel, 1, panel, values, depth(),
                        y + k * panel, panel, false);
      } else {
        for (int64_t j = k; j < std::min(k + kStrip<Acc>, k_count); ++j)
          std::fill_n(y + j * panel, panel, s[j]);
      }
    }
    alignas(kVectorBytes) Acc along[panel];  // <y_i, x_i>/n_i^2
    for (int64_t v = 0; v < panel; v += width)
      store(along + v, long_sum(0, k_count, kSumBlock, [&](int64_t k, int64_t end) {
              Vec<Acc> sum = {};
              for (; k < end; ++k) sum += load(y + k * panel + v) * load(values + k * panel + v);
              return sum;
            }));
    for (int64_t i = 0; i < lanes; ++i)
      along[i] *= inverse_norm[first + i] * inverse_norm[first + i];
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t v = 0; v < panel; v += width) {
        Acc* at = y + k * panel + v;
        store(at, load(at) - load(along + v) * load(values + k * panel + v));
      }
    emit(y, 0, k_count, first, lanes, scale);
  }

  // Asks for the panel after the one being worked on: a few bytes of each of many distant
  // rows, which the hardware doesn't foresee. Small matrices are in cache already.
  void prefetch_panel(int64_t first) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kCache = 512 * 1024;
    const int64_t bytes = k_count * free_count * static_cast<int64_t>(sizeof(T));
    if (!x.lane.is_unit() || bytes <= kCache || first >= free_count) return;
    const int64_t lanes = std::min(panel, free_count - first);
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t i = 0; i < lanes; i += kLine)
        __builtin_prefetch(x.data + x.k[k] + first + i, 0, 2);
  }

  void emit(Acc* y, int64_t first_k, int64_t count, int64_t first, int64_t lanes,
            const Acc* scale) const {
    for (int64_t k = 0; k < count; ++k) {
      Acc* row = y + k * panel;
      for (int64_t v = 0; v < panel; v += width) store(row + v, load(row + v) * load(scale + v));
      store_axis(dx + dx_k[first_k + k], dx_free, first, row, lanes);
    }
  }

  // kRows rows as pairs of consecutive k, zeros up to depth(); values is working memory for a
  // strip.
  void rows_of_pairs(int64_t first, int64_t rows, Acc* values, E* pairs) const {
    const int64_t stride = 2 * depth();
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (x.k.is_unit() && x.is_plain()) {
        std::memset(pairs, 0, static_cast<std::size_t>(kRows<E> * depth()) * sizeof(E));
        for (int64_t r = 0; r < rows; ++r)
          std::memcpy(pairs + r * depth(), x.data + x.lane[first + r],
                      static_cast<std::size_t>(k_count) * sizeof(T));
        return;
      }
    }
    for (int64_t r = 0; r < kRows<E>; r += kStrip<Acc>)
      strip_of_pairs(first + r, std::clamp<int64_t>(rows - r, 0, kStrip<Acc>), stride, values,
                     pairs + r * depth());
  }

  void strip_of_pairs(int64_t first, int64_t rows, int64_t stride, Acc* values, E* pairs) const {
    pack_strip(x, first, rows, k_count, values, stride);
    for (int64_t r = 0; r < kStrip<Acc>; ++r)
      std::fill(values + r * stride + k_count, values + (r + 1) * stride, Acc(0));
    for (int64_t i = 0; i < kStrip<Acc> * stride / 2; ++i) {
      const uint32_t low = from_acc<BFloat16>(values[2 * i]).bits;
      const uint32_t high = from_acc<BFloat16>(values[2 * i + 1]).bits;
      pairs[i].bits = low | (high << 16);
    }
  }

  // Y (free, k) = X S, kRows of the free axis; the lanes are the k axis.
  void k_lanes(int64_t index) const {
    const int64_t first = index * kRows<E>, rows = std::min(kRows<E>, free_count - first);
    const int64_t panels = divide_up(k_count, panel), stride = panels * panel;
    Scratch scratch;
    Acc* values = scratch.get<Acc>(kStrip<Acc> * std::max(stride, Packed<E>::kDepth * depth()));
    Acc* y = scratch.get<Acc>(kRows<E> * stride);
    LeftOperand<E> left{nullptr, stride, 1};
    if constexpr (std::is_same_v<E, Acc>) {
      pack_strip(x, first, rows, k_count, values, stride);
      left.data = values;
    } else {  // the primal form only, which needs no values
      E* pairs = scratch.get<E>(kRows<E> * depth());
      rows_of_pairs(first, rows, values, pairs);
      left = {pairs, depth(), 1};
    }
    if (symmetric) {
      Multiplier<E> multiplier;
      for (int64_t p = 0; p < panels; ++p)
        multiplier.multiply(left, symmetric_panel(p), depth(), y + p * panel, stride, false);
    } else {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(s, k_count, y + r * stride);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Acc *row = y + r * stride, *value = values + r * stride;
      const Acc scale = scale_of(first + r);
      Acc along = 0;
      if (inverse_norm) {
        int64_t k = k_count - k_count % width;
        along = sum_lanes<Acc>(long_sum(0, k, kSumBlock * width, [&](int64_t j, int64_t end) {
          Vec<Acc> sum = {};
          for (; j < end; j += width) sum += load(row + j) * load(value + j);
          return sum;
        }));
        for (; k < k_count; ++k) along += row[k] * value[k];
        along *= inverse_norm[first + r] * inverse_norm[first + r];
      }
      int64_t k = 0;
      if (inverse_norm) {
        for (; k + width <= k_count; k += width)
          store(row + k, (load(row + k) - splat(along) * load(value + k)) * splat(scale));
        for (; k < k_count; ++k) row[k] = (row[k] - along * value[k]) * scale;
      } else {
        for (; k + width <= stride; k += width) store(row + k, load(row + k) * splat(scale));
      }
      store_axis(dx + dx_free[first + r], dx_k, 0, row, k_count);
    }
  }

  // Whether the gradient is stored along k, so that S is the right operand.
  bool k_in_lanes() const { return dx_k.is_unit() && !dx_free.is_unit(); }

  void run(const Parallel& parallel) const {
    if (k_in_lanes()) {
      parallel(divide_up(free_count, kRows<E>), [&](int64_t index) { k_lanes(index); });
    } else {
      parallel(divide_up(free_count, panel), [&](int64_t p) { free_lanes(p); });
    }
  }
};

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
