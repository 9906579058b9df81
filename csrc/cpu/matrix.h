// One matrix as the pairwise penalty sees it: its rows' means and norms, and where its state
// lies.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "pairwise.h"
#include "simd.h"

namespace imcl {
inline namespace IMCL_ISA {

template <class T>
struct Matrix {
  const T* x;
  Axis row, column;
  int64_t rows, columns;
};

// An axis from one of its indices on, and how far into the tensor that lies.
struct Rest {
  int64_t offset;
  Axis axis;
};

IMCL_INLINE Rest rest_of(const Axis& axis, int64_t first) {
  if (axis.table) return {0, {axis.stride, axis.table + first}};
  return {first * axis.stride, axis};
}

template <class T>
Matrix<T> columns_of(const Matrix<T>& x, int64_t first, int64_t count) {
  const Rest columns = rest_of(x.column, first);
  return {x.x + columns.offset, x.row, columns.axis, x.rows, count};
}

// What the forward keeps of one matrix; see state_size(). Without a core all are null.
template <class Acc>
struct State {
  Acc *core, *inverse_norm, *mean;
};

template <class Acc>
State<Acc> state_of(Acc* state, Form form, bool tiled, const Matrices& m) {
  if (form == Form::kPrimal && !tiled) {
    Acc* means = state + symmetric_size(m.rows, m.rows);
    return {state, nullptr, means};
  }
  const int64_t core = tiled                 ? 0
                       : form == Form::kDual ? symmetric_size(m.columns, m.columns)
                                             : m.columns;
  return {state, state + core, state + core + m.rows};
}

// A sum of many as exact as one of few: what is lost when a number is added is added to the next
// one (Kahan). Of numbers that are all alike every addition rounds the same way: the error of a
// single chain would grow with its length.
template <class V>
struct LongSum {
  V sum = {}, lost = {};

  IMCL_INLINE void add(V value) {
    const V more = value - lost, next = sum + more;
    lost = (next - sum) - more;
    sum = next;
  }
};

// The LongSum over [first, last) of block(j, end), each of which adds up at most `step`.
template <class Block>
IMCL_INLINE auto long_sum(int64_t first, int64_t last, int64_t step, const Block& block) {
  int64_t end = std::min(first + step, last);
  LongSum<decltype(block(first, end))> total{block(first, end)};
  while (end < last) {
    const int64_t j = end;
    end = std::min(j + step, last);
    total.add(block(j, end));
  }
  return total.sum;
}

inline constexpr int64_t kSumBlock = 32;  // numbers in a lane's chain

// out[i] = sum over the columns j of term(x_ij, mean[i]); mean may be null, or be out.
template <class T, class Term>
void sum_columns(const Matrix<T>& x, const AccOf<T>* mean, AccOf<T>* out, Term term) {
  using Acc = AccOf<T>;
  constexpr int width = kLanes<Acc>;
  int64_t i = 0;
  if (x.row.is_unit()) {
    for (; i + width <= x.rows; i += width) {
      const Vec<Acc> shift = mean ? load(mean + i) : Vec<Acc>{};
      store(out + i, long_sum(0, x.columns, kSumBlock, [&](int64_t j, int64_t end) {
              Vec<Acc> sum = {};
              for (; j < end; ++j) sum += term(load_acc(x.x + i + x.column[j]), shift);
              return sum;
            }));
    }
  }
  for (; i < x.rows; ++i) {
    const T* row = x.x + x.row[i];
    const Acc shift = mean ? mean[i] : Acc(0);
    if (!x.column.is_unit()) {
      out[i] = long_sum(0, x.columns, kSumBlock, [&](int64_t j, int64_t end) {
        Acc sum = 0;
        for (; j < end; ++j) sum += term(to_acc(row[x.column[j]]), shift);
        return sum;
      });
      continue;
    }
    const auto vector = [&](int64_t j) { return term(load_acc(row + j), splat(shift)); };
    int64_t j = x.columns - x.columns % (4 * width);
    Vec<Acc> sums = long_sum(0, j, 4 * kSumBlock * width, [&](int64_t k, int64_t end) {
      Vec<Acc> sum[4] = {};
      for (; k < end; k += 4 * width)
        for (int u = 0; u < 4; ++u) sum[u] += vector(k + u * width);
      return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    });
    for (; j + width <= x.columns; j += width) sums += vector(j);
    Acc sum = sum_lanes<Acc>(sums);
    for (; j < x.columns; ++j) sum += term(to_acc(row[j]), shift);
    out[i] = sum;
  }
}

// Of each row the mean of what it is more than its first element: of rows that are nearly constant,
// whose differences are all that counts, it is as exact as of others. `rest`, if not null, is what
// the mean has lost when it was rounded: of such rows it is much of what a gradient is made of.
template <class T>
void row_means(const Matrix<T>& x, AccOf<T>* mean, AccOf<T>* rest = nullptr) {
  using Acc = AccOf<T>;
  if (x.columns == 0) {  // such a row is dead
    std::fill_n(mean, x.rows, Acc(0));
    if (rest) std::fill_n(rest, x.rows, Acc(0));
    return;
  }
  const T* first = x.x + x.column[0];
  for (int64_t i = 0; i < x.rows; ++i) mean[i] = to_acc(first[x.row[i]]);
  sum_columns(x, mean, mean, [](auto v, auto shift) { return v - shift; });
  const auto count = static_cast<Acc>(x.columns);
  for (int64_t i = 0; i < x.rows; ++i) {
    const Acc shift = to_acc(first[x.row[i]]), more = mean[i] / count;
    mean[i] = shift + more;
    const Acc added = mean[i] - shift;  // the sum of two numbers without error (Knuth)
    if (rest) rest[i] = (shift - (mean[i] - added)) + (more - added);
  }
}

// 1/n of a row from n^2, or 0 where the row is dead, or NaN where a square was too large for its
// type; `mean` is 0 where not centred.
template <class Acc>
Acc inverse_norm(Acc square, Acc mean, int64_t columns, const PairwiseSettings& settings) {
  const Acc norm = std::sqrt(square);
  Acc limit = static_cast<Acc>(settings.eps), raw = norm;
  if (settings.center) {
    raw = std::sqrt(square + static_cast<Acc>(columns) * mean * mean);
    limit = std::max(limit, static_cast<Acc>(kCentredDeadRatio) * raw);
  }
  if (!std::isfinite(raw)) return std::numeric_limits<Acc>::quiet_NaN();
  return norm <= limit ? Acc(0) : 1 / norm;
}

// Asks for x in the order it lies in, where it is dense and fits the second-level cache: the
// packs that follow read it in pieces that the hardware doesn't foresee.
template <class T>
void prefetch(const Matrix<T>& x) {
  constexpr int64_t kLine = 64, kCache = 512 * 1024;
  const int64_t bytes = x.rows * x.columns * static_cast<int64_t>(sizeof(T));
  const bool dense = (x.column.is_unit() && x.row[1] == x.columns) ||
                     (x.row.is_unit() && !x.column.table && x.column[1] == x.rows);
  if (!dense || bytes > kCache) return;
  const char* data = reinterpret_cast<const char*>(x.x);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(data + i, 0, 2);
}

// What rounding took of N row means, behind them as State has it; none of none.
template <class Acc>
const Acc* rests_of(const Acc* mean, int64_t rows) {
  return mean ? mean + rows : nullptr;
}

// Row means, 2N numbers as of State, and 1/n of the forms that need them before their product;
// returns N_live.
template <class T>
int64_t row_norms(const Matrix<T>& x, const PairwiseSettings& settings, AccOf<T>* mean,
                  AccOf<T>* inverse) {
  using Acc = AccOf<T>;
  if (settings.center) row_means(x, mean, mean + x.rows);
  sum_columns(x, settings.center ? mean : nullptr, inverse,
              [](auto v, auto shift) { return (v - shift) * (v - shift); });
  int64_t live = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    inverse[i] = inverse_norm(inverse[i], settings.center ? mean[i] : Acc(0), x.columns, settings);
    live += inverse[i] != 0;
  }
  return live;
}

}  // namespace IMCL_ISA
}  // namespace imcl
