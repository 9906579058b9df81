// The pairwise cosine penalty of one matrix, compiled once per ISA.
//
// X has N rows x_i of D columns, norms n_i, c_ij = <x_i, x_j>/(n_i n_j), and the loss is
// scale * sum_{i != j} phi(c_ij). Dead rows have 1/n_i := 0.
//
// primal  G = X X^T            (N, N)   the upper panels only; norms are its diagonal
//         A_ij = a phi'(c_ij)/(n_i n_j), A_ii = -a sum_j phi'(c_ij) c_ij/n_i^2, a = 2 scale
//         dX = A X
// dual    M = X^T diag(1/n^2) X (D, D)  sum_{i != j} c^2 = |M|^2 - N_live
//         y_i = x_i M, f_i = 4 scale/n_i^2
// signed  s = sum_i x_i/n_i    (D)      sum_{i != j} c = |s|^2 - N_live
//         y_i = s,     f_i = 2 scale/n_i
//         both: dx_i = f_i (y_i - <y_i, x_i>/n_i^2 x_i)
//
// So a backward is Y = X_k S for a symmetric S and the axis k of X that S contracts: rows
// (primal) or columns (dual); the other axis is free. Whichever of the two the gradient
// stores with unit stride becomes the vector lanes, so NCHW and channels_last are both
// read and written in the order they lie in.
#include "gemm.h"
#include "pairwise.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

constexpr int64_t kDepthBlock = 256;         // k packed at a time by a Gram: panels stay in L2
constexpr double kCenteredDeadRatio = 1e-5;  // imcl_fast/reference.py

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Matrix {
  const T* x;
  Axis row, column;
  int64_t rows, columns;
};

template <class Acc>
struct State {
  Acc *core, *inverse_norm, *mean;
};

template <class Acc>
State<Acc> state_of(Acc* state, Form form, const Matrices& m) {
  const int64_t core = form == Form::kPrimal ? m.rows * m.rows
                       : form == Form::kDual ? m.columns * m.columns
                                             : m.columns;
  Acc* inverse_norm = state + core;
  return {state, inverse_norm, form == Form::kPrimal ? inverse_norm : inverse_norm + m.rows};
}

// out[i] = sum over the columns j of term(x_ij, mean[i]); mean may be null.
template <class T, class Term>
void sum_columns(const Matrix<T>& x, const AccOf<T>* mean, AccOf<T>* out, Term term) {
  using Acc = AccOf<T>;
  constexpr int width = kLanes<Acc>;
  int64_t i = 0;
  if (x.row.is_unit()) {
    for (; i + width <= x.rows; i += width) {
      Vec<Acc> sum = {};
      const Vec<Acc> centre = mean ? load(mean + i) : Vec<Acc>{};
      for (int64_t j = 0; j < x.columns; ++j) sum += term(load_acc(x.x + i + x.column[j]), centre);
      store(out + i, sum);
    }
  }
  for (; i < x.rows; ++i) {
    const T* row = x.x + x.row[i];
    const Acc centre = mean ? mean[i] : Acc(0);
    Vec<Acc> sum[4] = {};
    Acc tail = 0;
    int64_t j = 0;
    if (x.column.is_unit()) {
      for (; j + 4 * width <= x.columns; j += 4 * width)
        for (int u = 0; u < 4; ++u) sum[u] += term(load_acc(row + j + u * width), splat(centre));
    }
    for (; j < x.columns; ++j) tail += term(to_acc(row[x.column[j]]), centre);
    out[i] = sum_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
  }
}

template <class T>
void row_means(const Matrix<T>& x, AccOf<T>* mean) {
  sum_columns(x, nullptr, mean, [](auto v, auto) { return v; });
  for (int64_t i = 0; i < x.rows; ++i) mean[i] /= static_cast<AccOf<T>>(x.columns);
}

// 1/n of a row from n^2, or 0 where the row is dead; `mean` is 0 where not centred.
template <class Acc>
Acc inverse_norm(Acc square, Acc mean, int64_t columns, const PairwiseSettings& settings) {
  const Acc norm = std::sqrt(square);
  Acc limit = static_cast<Acc>(settings.eps);
  if (settings.center) {
    const Acc raw = std::sqrt(square + static_cast<Acc>(columns) * mean * mean);
    limit = std::max(limit, static_cast<Acc>(kCenteredDeadRatio) * raw);
  }
  return norm <= limit ? Acc(0) : 1 / norm;  // a NaN norm stays NaN
}

// Asks for x in the order it lies in, where it is dense and fits the second-level cache: the
// packs that follow read it in strips that the hardware doesn't foresee.
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

// Asks for the next `depth` k of the lanes that were just packed.
template <class T>
void prefetch(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k,
              int64_t depth) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  if (!x.k.is_unit()) return;
  for (int64_t lane = first_lane; lane < first_lane + lanes; ++lane)
    for (int64_t k = 0; k < depth; k += kLine)
      __builtin_prefetch(x.data + x.lane[lane] + first_k + k, 0, 2);
}

// pack_panel into elements of E; an odd depth is completed with zeros.
template <class E, class T>
void pack(const Source<T>& x, int64_t first_lane, int64_t lanes, int64_t first_k, int64_t depth,
          E* out) {
  if constexpr (std::is_same_v<E, AccOf<T>>) {
    pack_panel(x, first_lane, lanes, first_k, depth, out);
  } else {
    constexpr int panel = kPanel<float>;
    Scratch scratch;
    float* panel_out = scratch.get<float>((depth + 1) * panel);
    pack_panel(x, first_lane, lanes, first_k, depth, panel_out);
    std::fill_n(panel_out + depth * panel, panel, 0.0f);
    pair_panel(panel_out, depth + 1, out);
  }
}

// g (panels, panels) tiles of X X^T, x seen as `lanes` rows by `depth`: the upper ones, and
// of the diagonal tiles at least the upper triangle. Lanes beyond `lanes` come out 0.
template <class E, class T>
void gram(const Source<T>& x, int64_t lanes, int64_t depth, AccOf<T>* g, int64_t stride,
          const Parallel& parallel) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>, packing = Packed<E>::kDepth;
  const int64_t panels = divide_up(lanes, panel);
  const int64_t panel_size = panel * divide_up(kDepthBlock, packing);
  Scratch scratch;
  E* packed = scratch.get<E>(panels * panel_size);
  if (depth == 0) std::fill_n(g, panels * panel * stride, Acc(0));
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t block = std::min(kDepthBlock, depth - k);
    const int64_t next = std::min(kDepthBlock, depth - k - block);
    parallel(panels, [&](int64_t p) {
      const int64_t present = std::min(panel, lanes - p * panel);
      pack(x, p * panel, present, k, block, packed + p * panel_size);
      prefetch(x, p * panel, present, k + block, next);
    });
    parallel(panels * (panels + 1) / 2, [&](int64_t tile) {
      int64_t i = 0;
      for (; tile >= panels - i; ++i) tile -= panels - i;
      const int64_t j = i + tile;
      const E *a = packed + i * panel_size, *b = packed + j * panel_size;
      for (int64_t r = 0; r < panel; r += kStrip) {
        Acc* out = g + (i * panel + r) * stride + j * panel;
        if (i == j && r >= width) {  // left of the diagonal in its first vector
          micro_kernel<1>(a + r, 1, panel, b + width, divide_up(block, packing), out + width,
                          stride, k > 0);
        } else {
          micro_kernel<2>(a + r, 1, panel, b, divide_up(block, packing), out, stride, k > 0);
        }
      }
    });
  }
}

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

// Loss, unscaled, of the rows of one vector of lanes, and their columns of A (null: none).
template <Penalty P, class Acc>
double finish_lanes(const Acc* g, int64_t stride, int64_t n, int64_t first, const Acc* inverse,
                    double scale, Acc* a) {
  constexpr int64_t width = kLanes<Acc>;
  const int64_t lanes = std::min(width, n - first);
  const Vec<Acc> inverse_i = load(inverse + first);
  const Vec<Acc> slope_scale = splat(static_cast<Acc>(2 * scale));
  Vec<Acc> loss = {}, diagonal = {};
  const auto visit = [&](int64_t j, Vec<Acc> gram) {  // gram: G_ij of all lanes i
    const Vec<Acc> both = inverse_i * splat(inverse[j]);
    Vec<Acc> c = gram * both;
    if (j >= first && j < first + lanes) c[j - first] = 0;
    loss += phi<P>(c);
    if (!a) return;
    const Vec<Acc> slope = slope_scale * phi_slope<P>(c);
    diagonal += slope * c;
    const Vec<Acc> row = slope * both;
    Acc* out = a + j * n + first;
    if (lanes == width) {
      store(out, row);
    } else {
      for (int64_t i = 0; i < lanes; ++i) out[i] = row[i];
    }
  };
  // Upper panels hold G_ji for j up to these lanes, and its transpose after them.
  const int64_t direct = std::min(n, first + width);
  for (int64_t j = 0; j < direct; ++j) visit(j, load(g + j * stride + first));
  for (int64_t j = direct; j < n; j += width) {
    Vec<Acc> block[width];
    for (int64_t i = 0; i < width; ++i) block[i] = load(g + (first + i) * stride + j);
    transpose<Acc>(block);
    for (int64_t i = 0; i < std::min(width, n - j); ++i) visit(j + i, block[i]);
  }
  for (int64_t i = 0; a && i < lanes; ++i)
    a[(first + i) * n + first + i] = -diagonal[i] * inverse_i[i] * inverse_i[i];
  double total = 0;
  for (int64_t i = 0; i < width; ++i) total += static_cast<double>(loss[i]);
  return total;
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
    mean = state.mean ? state.mean : scratch.get<Acc>(n);
    row_means(x, mean);
  }
  gram<E>(Source<T>{x.x, x.row, x.column, mean}, n, x.columns, g, padded, parallel);

  Acc* inverse = scratch.get<Acc>(padded);
  std::fill_n(inverse + n, padded - n, Acc(0));
  for (int64_t i = 0; i < n; ++i)
    inverse[i] = inverse_norm(g[i * padded + i], mean ? mean[i] : Acc(0), x.columns, settings);
  constexpr int64_t width = kLanes<Acc>;
  const int64_t vectors = divide_up(n, width);
  double* losses = scratch.get<double>(vectors);
  parallel(vectors, [&](int64_t v) {
    const auto finish = settings.penalty == Penalty::kSquare ? finish_lanes<Penalty::kSquare, Acc>
                                                             : finish_lanes<Penalty::kAbs, Acc>;
    losses[v] = finish(g, padded, n, v * width, inverse, scale, state.core);
  });
  double loss = 0;
  for (int64_t v = 0; v < vectors; ++v) loss += losses[v];
  return scale * loss;
}

// Row means and 1/n of the forms that need them before their product; returns N_live.
template <class T>
int64_t row_norms(const Matrix<T>& x, const PairwiseSettings& settings, AccOf<T>* mean,
                  AccOf<T>* inverse) {
  using Acc = AccOf<T>;
  if (settings.center) row_means(x, mean);
  sum_columns(x, settings.center ? mean : nullptr, inverse,
              [](auto v, auto centre) { return (v - centre) * (v - centre); });
  int64_t live = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    inverse[i] = inverse_norm(inverse[i], settings.center ? mean[i] : Acc(0), x.columns, settings);
    live += inverse[i] != 0;
  }
  return live;
}

template <class T>
double forward_dual(const Matrix<T>& x, State<AccOf<T>> state, const PairwiseSettings& settings,
                    double scale, const Parallel& parallel) {
  using Acc = AccOf<T>;
  const int64_t n = x.rows, d = x.columns, padded = divide_up(d, kPanel<Acc>) * kPanel<Acc>;
  Scratch scratch;
  Acc* mean = state.core ? state.mean : scratch.get<Acc>(n);
  Acc* inverse = state.core ? state.inverse_norm : scratch.get<Acc>(n);
  const int64_t live = row_norms(x, settings, mean, inverse);
  Acc* m = scratch.get<Acc>(padded * padded);
  const Source<T> source{x.x, x.column, x.row, nullptr, settings.center ? mean : nullptr, inverse};
  gram<Acc>(source, d, n, m, padded, parallel);
  double sum = 0;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      const Acc value = m[i * padded + j];
      sum += (i == j ? 1.0 : 2.0) * static_cast<double>(value) * static_cast<double>(value);
      if (state.core) state.core[i * d + j] = state.core[j * d + i] = value;
    }
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
  Acc* mean = state.core ? state.mean : scratch.get<Acc>(n);
  Acc* inverse = state.core ? state.inverse_norm : scratch.get<Acc>(n);
  const int64_t live = row_norms(x, settings, mean, inverse);
  const Source<T> source{x.x, x.column, x.row, nullptr, settings.center ? mean : nullptr, inverse};
  const int64_t panels = divide_up(d, panel);
  double* squares = scratch.get<double>(panels);
  parallel(panels, [&](int64_t p) {
    Scratch own;
    Acc* packed = own.get<Acc>(kDepthBlock * panel);
    alignas(kVectorBytes) Acc s[panel] = {};
    const int64_t lanes = std::min(panel, d - p * panel);
    for (int64_t k = 0; k < n; k += kDepthBlock) {
      const int64_t block = std::min(kDepthBlock, n - k);
      pack_panel(source, p * panel, lanes, k, block, packed);
      for (int64_t j = 0; j < block; ++j)
        for (int64_t v = 0; v < panel; v += width)
          store(s + v, load(s + v) + load(packed + j * panel + v));
    }
    squares[p] = 0;
    for (int64_t i = 0; i < lanes; ++i) squares[p] += static_cast<double>(s[i]) * s[i];
    if (state.core) std::copy_n(s, lanes, state.core + p * panel);
  });
  double sum = 0;
  for (int64_t p = 0; p < panels; ++p) sum += squares[p];
  return scale * (sum - static_cast<double>(live));
}

// x[first + i], i < n, to an axis of a tensor.
template <class T>
void store_axis(T* base, const Axis& axis, int64_t first, const AccOf<T>* x, int64_t n) {
  if (!axis.table) return store_strided(base + first * axis.stride, axis.stride, x, n);
  for (int64_t i = 0; i < n; ++i) base[axis.table[first + i]] = from_acc<T>(x[i]);
}

// Everything a backward of one matrix shares among its tasks.
template <class E, class T>
struct Backward {
  using Acc = AccOf<T>;
  static constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;

  Source<T> x;  // lanes: the free axis; k: the axis S contracts
  T* dx;
  Axis dx_free, dx_k;
  int64_t free_count, k_count;
  const E* symmetric;  // S in panels, or null: then every y_i is s
  const Acc* s;
  const Acc* inverse_norm;  // of the free axis; null in the primal form: dX = Y
  double factor, grad;      // f_i = factor * (1/n_i)^power
  int power;

  int64_t depth() const { return divide_up(k_count, Packed<E>::kDepth); }
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
      alignas(kVectorBytes) Acc y[kStrip * panel];
      for (int64_t k = 0; k < k_count; k += kStrip) {
        micro_kernel<2>(symmetric_panel(k / panel) + k % panel, 1, panel, packed, depth(), y, panel,
                        false);
        emit(y, k, std::min<int64_t>(kStrip, k_count - k), first, lanes, scale);
      }
      return;
    }
    // The other forms come with unrounded elements only: the panel holds x itself.
    if constexpr (std::is_same_v<E, Acc>) correct(packed, first, lanes, scale);
  }

  // Y^T of the dual and signed forms and what they subtract, x being one packed panel.
  void correct(const Acc* values, int64_t first, int64_t lanes, const Acc* scale) const {
    const int64_t padded = divide_up(k_count, kStrip) * kStrip;
    Scratch scratch;
    Acc* y = scratch.get<Acc>(padded * panel);
    for (int64_t k = 0; k < k_count; k += kStrip) {
      if (symmetric) {
        micro_kernel<2>(symmetric_panel(k / panel) + k % panel, 1, panel, values, depth(),
                        y + k * panel, panel, false);
      } else {
        for (int64_t j = k; j < std::min(k + kStrip, k_count); ++j)
          std::fill_n(y + j * panel, panel, s[j]);
      }
    }
    alignas(kVectorBytes) Acc along[panel] = {};  // <y_i, x_i>/n_i^2
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t v = 0; v < panel; v += width)
        store(along + v, load(along + v) + load(y + k * panel + v) * load(values + k * panel + v));
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

  // Y (free, k) = X S, one strip of the free axis; the lanes are the k axis.
  void k_lanes(int64_t strip) const {
    const int64_t first = strip * kStrip;
    const int64_t rows = std::min<int64_t>(kStrip, free_count - first);
    const int64_t panels = divide_up(k_count, panel), stride = panels * panel;
    Scratch scratch;
    Acc* values = scratch.get<Acc>(kStrip * stride);
    Acc* y = scratch.get<Acc>(kStrip * stride);
    pack_strip(x, first, rows, k_count, values, stride);
    if (symmetric) {
      const E* lhs;
      int64_t lhs_stride = stride;
      if constexpr (std::is_same_v<E, Acc>) {
        lhs = values;
      } else {
        // Pairs of consecutive k; the strip's padding up to its stride must be finite.
        for (int64_t r = 0; r < kStrip; ++r)
          std::fill(values + r * stride + k_count, values + (r + 1) * stride, Acc(0));
        E* pairs = scratch.get<E>(kStrip * stride / 2);
        for (int64_t i = 0; i < kStrip * stride / 2; ++i) {
          const uint32_t low = from_acc<BFloat16>(values[2 * i]).bits;
          const uint32_t high = from_acc<BFloat16>(values[2 * i + 1]).bits;
          pairs[i].bits = low | (high << 16);
        }
        lhs = pairs;
        lhs_stride = stride / 2;
      }
      for (int64_t p = 0; p < panels; ++p)
        micro_kernel<2>(lhs, lhs_stride, 1, symmetric_panel(p), depth(), y + p * panel, stride,
                        false);
    } else {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(s, k_count, y + r * stride);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Acc *row = y + r * stride, *value = values + r * stride;
      const Acc scale = scale_of(first + r);
      Acc along = 0;
      if (inverse_norm) {
        Vec<Acc> sum = {};
        int64_t k = 0;
        for (; k + width <= k_count; k += width) sum += load(row + k) * load(value + k);
        along = sum_lanes<Acc>(sum);
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

  void run(const Parallel& parallel) const {
    if (dx_k.is_unit() && !dx_free.is_unit()) {
      parallel(divide_up(free_count, kStrip), [&](int64_t strip) { k_lanes(strip); });
    } else {
      parallel(divide_up(free_count, panel), [&](int64_t p) { free_lanes(p); });
    }
  }
};

template <class E, class T>
void backward_matrix(const Matrices& m, int64_t index, const PairwiseSettings& settings,
                     double grad, const Parallel& parallel) {
  using Acc = AccOf<T>;
  const Form form = form_of(settings.penalty, m.rows, m.columns);
  // The other forms subtract nearly equal numbers: their products aren't rounded.
  if constexpr (!std::is_same_v<E, Acc>) {
    if (form != Form::kPrimal) return backward_matrix<Acc, T>(m, index, settings, grad, parallel);
  }
  const int64_t size = state_size(settings, m.rows, m.columns);
  const State<Acc> state = state_of(static_cast<Acc*>(m.state) + index * size, form, m);
  const Acc* mean = settings.center ? state.mean : nullptr;
  const bool primal = form == Form::kPrimal;
  const T* x = static_cast<const T*>(m.x) + m.batch_axis[index];
  prefetch(Matrix<T>{x, m.row_axis, m.column_axis, m.rows, m.columns});

  Backward<E, T> work{};
  work.x = primal ? Source<T>{x, m.column_axis, m.row_axis, nullptr, mean}
                  : Source<T>{x, m.row_axis, m.column_axis, mean};
  work.dx = static_cast<T*>(m.dx) + m.dx_batch_axis[index];
  work.dx_free = primal ? m.dx_column_axis : m.dx_row_axis;
  work.dx_k = primal ? m.dx_row_axis : m.dx_column_axis;
  work.free_count = primal ? m.columns : m.rows;
  work.k_count = primal ? m.rows : m.columns;
  work.s = state.core;
  work.inverse_norm = primal ? nullptr : state.inverse_norm;
  work.factor = (form == Form::kDual ? 4 : 2) * m.scale;
  work.power = form == Form::kDual ? 2 : 1;
  work.grad = grad;

  Scratch scratch;
  if (form != Form::kSigned) {
    constexpr int64_t panel = kPanel<Acc>;
    const int64_t panels = divide_up(work.k_count, panel), panel_size = panel * work.depth();
    E* packed = scratch.get<E>(panels * panel_size);
    const Source<Acc> source{state.core, {1, nullptr}, {work.k_count, nullptr}};
    parallel(panels, [&](int64_t p) {
      pack(source, p * panel, std::min(panel, work.k_count - p * panel), 0, work.k_count,
           packed + p * panel_size);
    });
    work.symmetric = packed;
  }
  work.run(parallel);
}

template <class E, class T>
double forward_matrix(const Matrices& m, int64_t index, const PairwiseSettings& settings,
                      const Parallel& parallel) {
  using Acc = AccOf<T>;
  const Form form = form_of(settings.penalty, m.rows, m.columns);
  const Matrix<T> x{static_cast<const T*>(m.x) + m.batch_axis[index], m.row_axis, m.column_axis,
                    m.rows, m.columns};
  prefetch(x);
  State<Acc> state{};
  if (m.state) {
    const int64_t size = state_size(settings, m.rows, m.columns);
    state = state_of(static_cast<Acc*>(m.state) + index * size, form, m);
  }
  if (form == Form::kSigned) return forward_signed(x, state, settings, m.scale, parallel);
  if (form == Form::kDual) return forward_dual(x, state, settings, m.scale, parallel);
  return forward_primal<E>(x, state, settings, m.scale, parallel);
}

// Calls run(element, x) with null pointers of the packed and the tensor's type.
template <class Run>
auto with_types(const Matrices& m, const PairwiseSettings& settings, const Run& run) {
  if constexpr (kHasBFloat16Dot) {
    using Pair = BFloat16Pair*;
    if (m.dtype == DType::kBFloat16) return run(Pair{}, static_cast<BFloat16*>(nullptr));
    if (m.dtype == DType::kFloat32 && settings.precision == Precision::kMedium)
      return run(Pair{}, static_cast<float*>(nullptr));
  }
  float* element = nullptr;
  switch (m.dtype) {
    case DType::kFloat64: return run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case DType::kBFloat16: return run(element, static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return run(element, static_cast<Float16*>(nullptr));
    default: return run(element, static_cast<float*>(nullptr));
  }
}

double forward(const Matrices& m, int64_t index, const PairwiseSettings& settings,
               const Parallel& parallel) {
  return with_types(m, settings, [&](auto* element, auto* x) {
    return forward_matrix<std::remove_pointer_t<decltype(element)>,
                          std::remove_pointer_t<decltype(x)>>(m, index, settings, parallel);
  });
}

void backward(const Matrices& m, int64_t index, const PairwiseSettings& settings, double grad,
              const Parallel& parallel) {
  with_types(m, settings, [&](auto* element, auto* x) {
    backward_matrix<std::remove_pointer_t<decltype(element)>, std::remove_pointer_t<decltype(x)>>(
        m, index, settings, grad, parallel);
  });
}

}  // namespace

extern const PairwiseKernels pairwise_kernels;
const PairwiseKernels pairwise_kernels = {forward, backward};

}  // namespace IMCL_ISA
}  // namespace imcl
