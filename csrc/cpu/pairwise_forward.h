// The forward of one matrix in each of the three forms of pairwise_kernels.cpp.
#pragma once

#include "gram.h"
#include "matrix.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {  // what is handed to Parallel must be no symbol that ISA levels could share

template <Penalty P, class V>
IMCL_INLINE V phi(V c) {
  if constexpr (P == Penalty::kSquare) return c * c;
  return c < 0 ? -c : c;
}

// phi'(c); 0 at 0 and NaN at NaN.
template <Penalty P, class V>
IMCL_INLINE V phi_slope(V c) {
  if constexpr (P == Penalty::kSquare) return c + c;
  const V one = V{} + 1;
  return c > 0 ? one : (c < 0 ? -one : c);
}

// run() of the penalty, one of the two that compare pairs, as a constant.
template <class Run>
auto with_penalty(const PairwiseSettings& settings, const Run& run) {
  if (settings.penalty == Penalty::kAbs)
    return run(std::integral_constant<Penalty, Penalty::kAbs>{});
  return run(std::integral_constant<Penalty, Penalty::kSquare>{});
}

// Loss, unscaled, of the rows of one vector of lanes, and their columns of A (null: none), in the
// rows of A that have them.
template <Penalty P, class Acc>
double finish_lanes(const Acc* g, int64_t stride, int64_t n, int64_t first, const Acc* inverse,
                    double scale, Acc* a) {
  constexpr int64_t width = kLanes<Acc>;
  static_assert(kSymmetricBlock % width == 0);
  const int64_t lanes = std::min(width, n - first);
  const Vec<Acc> inverse_i = load(inverse + first);
  const Vec<Acc> slope_scale = splat(static_cast<Acc>(2 * scale));
  LongSum<Vec<Acc>> losses, diagonals;  // of all j, and of a block of them:
  Vec<Acc> loss = {}, diagonal = {};
  const auto visit = [&](int64_t j, Vec<Acc> gram) {  // gram: G_ij of all lanes i
    const Vec<Acc> both = inverse_i * splat(inverse[j]);
    Vec<Acc> c = gram * both;
    if (j >= first && j < first + lanes) c[j - first] = 0;
    loss += phi<P>(c);
    if (!a) return;
    const Vec<Acc> slope = slope_scale * phi_slope<P>(c);
    diagonal += slope * c;
    if (first < symmetric_first(j)) return;
    const Vec<Acc> row = slope * both;
    Acc* out = a + symmetric_row(n, j) + first;
    if (lanes == width) {
      store(out, row);
    } else {
      for (int64_t i = 0; i < lanes; ++i) out[i] = row[i];
    }
  };
  const auto end_block = [&] {
    losses.add(loss);
    diagonals.add(diagonal);
    loss = diagonal = Vec<Acc>{};
  };
  // Upper panels hold G_ji for j up to these lanes, and its transpose after them.
  const int64_t direct = std::min(n, first + width);
  for (int64_t j = 0; j < direct; j += width) {
    for (int64_t k = j; k < std::min(j + width, direct); ++k)
      visit(k, load(g + k * stride + first));
    end_block();
  }
  for (int64_t j = direct; j < n; j += width) {
    Vec<Acc> tile[width];
    for (int64_t i = 0; i < width; ++i) tile[i] = load(g + (first + i) * stride + j);
    transpose<Acc>(tile);
    for (int64_t i = 0; i < std::min(width, n - j); ++i) visit(j + i, tile[i]);
    end_block();
  }
  for (int64_t i = 0; a && i < lanes; ++i)
    a[symmetric_row(n, first + i) + first + i] = -diagonals.sum[i] * inverse_i[i] * inverse_i[i];
  double total = 0;
  for (int64_t i = 0; i < width; ++i) total += static_cast<double>(losses.sum[i]);
  return total;
}

// gram() of the rows, the second half of the columns added to the first.
template <class E, class T>
void gram_in_halves(const Matrix<T>& x, const AccOf<T>* mean, AccOf<T>* g, int64_t padded,
                    const Parallel& parallel) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;
  constexpr int64_t kWhole = 64;  // columns: a half begins at a cache line in every dtype
  Scratch scratch;
  Acc* halves[] = {g, scratch.get<Acc>(padded * padded)};
  const int64_t first = divide_up(x.columns, 2 * kWhole) * kWhole;
  const auto make = [&](int64_t half, const Parallel& inner) {
    const Matrix<T> part = columns_of(x, half * first, half == 0 ? first : x.columns - first);
    const Source<T> source{part.x,  part.row, part.column,           mean,
                           nullptr, nullptr,  rests_of(mean, x.rows)};
    gram<E>(source, x.rows, part.columns, halves[half], padded, inner);
  };
  if (parallel.threads == 2) {
    parallel(2, [&](int64_t half) { make(half, one_thread()); });
  } else {
    for (int64_t half = 0; half < 2; ++half) make(half, parallel);
  }
  parallel(padded / panel, [&](int64_t p) {
    for (int64_t i = p * panel; i < (p + 1) * panel; ++i)
      for (int64_t j = p * panel; j < padded; j += width) {
        const int64_t at = i * padded + j;
        store(g + at, load(g + at) + load(halves[1] + at));
      }
  });
}

template <class E, class T>
double forward_primal(const Matrix<T>& x, State<AccOf<T>> state, const PairwiseSettings& settings,
                      double scale, const Parallel& parallel) {
  using Acc = AccOf<T>;
  const int64_t n = x.rows, padded = divide_up(n, kPanel<Acc>) * kPanel<Acc>;
  Scratch scratch;
  Acc* g = scratch.get<Acc>(padded * padded);
  Acc* mean = nullptr;
  if (settings.center) {
    mean = state.mean ? state.mean : scratch.get<Acc>(2 * n);
    row_means(x, mean, mean + n);
  }
  if (in_halves(n, x.columns)) {
    gram_in_halves<E>(x, mean, g, padded, parallel);
  } else {
    const Source<T> source{x.x, x.row, x.column, mean, nullptr, nullptr, rests_of(mean, n)};
    gram<E>(source, n, x.columns, g, padded, parallel);
  }

  Acc* inverse = scratch.get<Acc>(padded);
  std::fill_n(inverse + n, padded - n, Acc(0));
  for (int64_t i = 0; i < n; ++i)
    inverse[i] = inverse_norm(g[i * padded + i], mean ? mean[i] : Acc(0), x.columns, settings);
  constexpr int64_t width = kLanes<Acc>;
  const int64_t vectors = divide_up(n, width);
  double* losses = scratch.get<double>(vectors);
  with_penalty(settings, [&](auto penalty) {
    parallel(vectors, [&](int64_t v) {
      losses[v] = finish_lanes<penalty(), Acc>(g, padded, n, v * width, inverse, scale, state.core);
    });
  });
  double loss = 0;
  for (int64_t v = 0; v < vectors; ++v) loss += losses[v];
  return scale * loss;
}

template <class T>
double forward_dual(const Matrix<T>& x, State<AccOf<T>> state, const PairwiseSettings& settings,
                    double scale, const Parallel& parallel) {
  using Acc = AccOf<T>;
  const int64_t n = x.rows, d = x.columns, padded = divide_up(d, kPanel<Acc>) * kPanel<Acc>;
  Scratch scratch;
  Acc* mean = state.core ? state.mean : scratch.get<Acc>(2 * n);
  Acc* inverse = state.core ? state.inverse_norm : scratch.get<Acc>(n);
  const int64_t live = row_norms(x, settings, mean, inverse);
  Acc* m = scratch.get<Acc>(padded * padded);
  const Acc* means = settings.center ? mean : nullptr;
  const Source<T> source{x.x, x.column, x.row, nullptr, means, inverse, rests_of(means, n)};
  gram<Acc>(source, d, n, m, padded, parallel);
  double sum = 0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      const auto value = static_cast<double>(m[i * padded + j]);
      sum += (i == j ? 1.0 : 2.0) * value * value;
    }
    if (!state.core) continue;
    Acc* row = state.core + symmetric_row(d, i);
    for (int64_t j = symmetric_first(i); j < i; ++j) row[j] = m[j * padded + i];
    std::copy_n(m + i * padded + i, d - i, row + i);
  }
  return scale * (sum - static_cast<double>(live));
}

template <class T>
double forward_signed(const Matrix<T>& x, State<AccOf<T>> state, const PairwiseSettings& settings,
                      double scale, const Parallel& parallel) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;
  const int64_t n = x.rows, d = x.columns;
  Scratch scratch;
  Acc* mean = state.core ? state.mean : scratch.get<Acc>(2 * n);
  Acc* inverse = state.core ? state.inverse_norm : scratch.get<Acc>(n);
  const int64_t live = row_norms(x, settings, mean, inverse);
  const Acc* means = settings.center ? mean : nullptr;
  const Source<T> source{x.x, x.column, x.row, nullptr, means, inverse, rests_of(means, n)};
  const int64_t panels = divide_up(d, panel);
  double* squares = scratch.get<double>(panels);
  parallel(panels, [&](int64_t p) {
    Scratch own;
    Acc* packed = own.get<Acc>(kDepthBlock * panel);
    LongSum<Vec<Acc>> sums[kVectors];
    const int64_t lanes = std::min(panel, d - p * panel);
    for (int64_t k = 0; k < n; k += kDepthBlock) {
      const int64_t block = std::min(kDepthBlock, n - k);
      pack_panel(source, p * panel, lanes, k, block, packed);
      for (int v = 0; v < kVectors; ++v)
        sums[v].add(long_sum(0, block, kSumBlock, [&](int64_t j, int64_t end) {
          Vec<Acc> sum = {};
          for (; j < end; ++j) sum += load(packed + j * panel + v * width);
          return sum;
        }));
    }
    alignas(kVectorBytes) Acc s[panel];
    for (int v = 0; v < kVectors; ++v) store(s + v * width, sums[v].sum);
    squares[p] = 0;
    for (int64_t i = 0; i < lanes; ++i) squares[p] += static_cast<double>(s[i]) * s[i];
    if (state.core) std::copy_n(s, lanes, state.core + p * panel);
  });
  double sum = 0;
  for (int64_t p = 0; p < panels; ++p) sum += squares[p];
  return scale * (sum - static_cast<double>(live));
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
