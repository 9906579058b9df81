// The primal form of tall matrices without its N x N matrix. Only the norms are kept;
// the backward makes each tile of A again, uses it while it is in cache and forgets it. For a
// panel of rows i, in the lanes, and one of rows j after the other,
//
//   G_ji = <x_j, x_i>, c_ji = G_ji/(n_i n_j), A_ji = a phi'(c_ji)/(n_i n_j)   (panel, panel)
//   Y_i += X_j^T A_ji                                                        (D, panel)
//   dx_i = Y_i - a sum_j phi'(c_ji) c_ji/n_i^2 x_i, a = 2 scale
#pragma once

#include "pairwise_backward.h"
#include "pairwise_forward.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {  // what is handed to Parallel must be no symbol that ISA levels could share

template <Penalty P, class T>
class Tiles {
 public:
  using Acc = AccOf<T>;
  static constexpr int64_t panel = kPanel<Acc>, width = kLanes<Acc>;

  // 1/n of the rows and, if centred, their means must be there, inverse up to whole panels.
  Tiles(const Matrix<T>& x, const Acc* mean, const Acc* inverse, Scratch& scratch,
        const Parallel& parallel)
      : rows_(x.rows),
        columns_(x.columns),
        panels_(divide_up(x.rows, panel)),
        depth_(divide_up(x.columns, kStrip<Acc>) * kStrip<Acc>),
        inverse_(inverse),
        packed_(scratch.get<Acc>(panels_ * depth_ * panel)) {
    const Source<T> source{x.x, x.row, x.column, mean, nullptr, nullptr, rests_of(mean, rows_)};
    parallel(panels_, [&](int64_t p) {
      Acc* out = packed_ + p * depth_ * panel;
      pack_panel(source, p * panel, std::min(panel, rows_ - p * panel), 0, columns_, out);
      std::fill(out + columns_ * panel, out + depth_ * panel, Acc(0));
    });
  }

  double loss(const Parallel& parallel) const {
    Scratch scratch;
    double* losses = scratch.get<double>(panels_);
    parallel(panels_, [&](int64_t p) {
      alignas(kVectorBytes) Acc c[panel * panel];
      losses[p] = 0;
      for (int64_t q = p; q < panels_; ++q) {
        cosines(q, p, c);
        Vec<Acc> sum = {};
        for (int64_t i = 0; i < panel * panel; i += width) sum += phi<P>(load(c + i));
        losses[p] += (q == p ? 1 : 2) * static_cast<double>(sum_lanes<Acc>(sum));
      }
    });
    double total = 0;
    for (int64_t p = 0; p < panels_; ++p) total += losses[p];
    return total;
  }

  // Calls emit(p, dx^T) for every panel p: (columns, panel), to be overwritten at will.
  template <class Emit>
  void gradient(double scale, const Parallel& parallel, const Emit& emit) const {
    const Vec<Acc> slope_scale = splat(static_cast<Acc>(2 * scale));
    parallel(panels_, [&](int64_t p) {
      Scratch scratch;
      Acc* y = scratch.get<Acc>(depth_ * panel);
      std::fill_n(y, depth_ * panel, Acc(0));
      alignas(kVectorBytes) Acc tile[panel * panel];
      Vec<Acc> inverse[kVectors];
      LongSum<Vec<Acc>> diagonal[kVectors];
      for (int v = 0; v < kVectors; ++v) inverse[v] = load(inverse_ + p * panel + v * width);
      for (int64_t q = 0; q < panels_; ++q) {
        cosines(q, p, tile);
        Vec<Acc> of_panel[kVectors] = {};
        for (int64_t j = 0; j < panel; ++j) {
          for (int v = 0; v < kVectors; ++v) {
            Acc* at = tile + j * panel + v * width;
            const Vec<Acc> c = load(at), slope = slope_scale * phi_slope<P>(c);
            of_panel[v] += slope * c;
            store(at, slope * inverse[v] * splat(inverse_[q * panel + j]));
          }
        }
        for (int v = 0; v < kVectors; ++v) diagonal[v].add(of_panel[v]);
        for (int64_t d = 0; d < depth_; d += kStrip<Acc>)
          micro_kernel<kVectors>(packed_panel(q) + d * panel, panel, 1, tile, panel, y + d * panel,
                                 panel, true);
      }
      const Acc* x = packed_panel(p);
      for (int64_t d = 0; d < columns_; ++d)
        for (int v = 0; v < kVectors; ++v) {
          Acc* at = y + d * panel + v * width;
          store(at, load(at) - diagonal[v].sum * inverse[v] * inverse[v] *
                                   load(x + d * panel + v * width));
        }
      emit(p, y);
    });
  }

 private:
  const Acc* packed_panel(int64_t p) const { return packed_ + p * depth_ * panel; }

  // c_ji of the rows j of panel q and i of panel p; 0 for i = j, dead rows and the padding. Not
  // inline: what a caller keeps in registers would leave too few for the sums.
  [[gnu::noinline]] void cosines(int64_t q, int64_t p, Acc* c) const {
    int64_t k = 0;
    do {  // without columns once as well: the products are 0
      for (int64_t j = 0; j < panel; j += kStrip<Acc>)
        micro_kernel<kVectors>(packed_panel(q) + k * panel + j, 1, panel,
                               packed_panel(p) + k * panel, std::min(kDepthBlock, columns_ - k),
                               c + j * panel, panel, k > 0);
    } while ((k += kDepthBlock) < columns_);
    for (int64_t j = 0; j < panel; ++j)
      for (int64_t i = 0; i < panel; i += width) {
        Acc* at = c + j * panel + i;
        store(at, load(at) * load(inverse_ + p * panel + i) * splat(inverse_[q * panel + j]));
      }
    for (int64_t i = 0; q == p && i < panel; ++i) c[i * panel + i] = 0;
  }

  int64_t rows_, columns_, panels_, depth_;  // depth: columns up to whole strips
  const Acc* inverse_;
  Acc* packed_;  // (panels, depth, panel)
};

template <class T>
double forward_tiles(const Matrix<T>& x, State<AccOf<T>> state, const PairwiseSettings& settings,
                     double scale, const Parallel& parallel) {
  using Acc = AccOf<T>;
  Scratch scratch;
  const int64_t padded = divide_up(x.rows, kPanel<Acc>) * kPanel<Acc>;
  Acc* inverse = scratch.get<Acc>(padded);
  Acc* mean = state.mean && settings.center ? state.mean : scratch.get<Acc>(2 * x.rows);
  row_norms(x, settings, mean, inverse);
  std::fill(inverse + x.rows, inverse + padded, Acc(0));
  if (state.inverse_norm) std::copy_n(inverse, x.rows, state.inverse_norm);
  return scale * with_penalty(settings, [&](auto penalty) {
           const Tiles<penalty(), T> tiles(x, settings.center ? mean : nullptr, inverse, scratch,
                                           parallel);
           return tiles.loss(parallel);
         });
}

template <class T>
void backward_tiles(const Matrix<T>& x, const Matrices& m, T* dx, State<AccOf<T>> state,
                    const PairwiseSettings& settings, double grad, const Parallel& parallel) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>;
  Scratch scratch;
  const int64_t padded = divide_up(x.rows, panel) * panel;
  Acc* inverse = scratch.get<Acc>(padded);
  std::copy_n(state.inverse_norm, x.rows, inverse);
  std::fill(inverse + x.rows, inverse + padded, Acc(0));
  const auto emit = [&](int64_t p, const Acc* y) {
    const int64_t first = p * panel, lanes = std::min(panel, x.rows - first);
    for (int64_t k = 0; k < x.columns; ++k)
      store_axis(dx + m.dx_column_axis[k], m.dx_row_axis, first, y + k * panel, lanes);
  };
  // The incoming gradient is a factor of A, as the scale is.
  with_penalty(settings, [&](auto penalty) {
    const Tiles<penalty(), T> tiles(x, settings.center ? state.mean : nullptr, inverse, scratch,
                                    parallel);
    tiles.gradient(m.scale * grad, parallel, emit);
  });
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
