// The pairwise cosine penalty of one matrix, compiled once per ISA.
//
// X has N rows x_i of D columns, norms n_i, c_ij = <x_i, x_j>/(n_i n_j), and the loss is
// scale * sum_{i != j} phi(c_ij). Dead rows have 1/n_i := 0.
//
// primal  G = X X^T            (N, N)   the upper panels only; norms are its diagonal
//         A_ij = a phi'(c_ij)/(n_i n_j), A_ii = -a sum_j phi'(c_ij) c_ij/n_i^2, a = 2 scale
//         dX = A X; where A would be too large, in tiles: pairwise_tiles.h
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
#include "pairwise_backward.h"
#include "pairwise_forward.h"
#include "pairwise_tiles.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

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
  const bool tiled = in_tiles(settings, m.rows, m.columns);
  const State<Acc> state = state_of(static_cast<Acc*>(m.state) + index * size, form, tiled, m);
  const Acc* mean = settings.center ? state.mean : nullptr;
  const bool primal = form == Form::kPrimal;
  const T* x = static_cast<const T*>(m.x) + m.batch_axis[index];
  T* dx = static_cast<T*>(m.dx) + m.dx_batch_axis[index];
  const Matrix<T> matrix{x, m.row_axis, m.column_axis, m.rows, m.columns};
  if (tiled) return backward_tiles(matrix, m, dx, state, settings, grad, parallel);
  prefetch(matrix);

  Backward<E, T> work{};
  work.x =
      primal
          ? Source<T>{x, m.column_axis, m.row_axis, nullptr, mean, nullptr, rests_of(mean, m.rows)}
          : Source<T>{x, m.row_axis, m.column_axis, mean, nullptr, nullptr, rests_of(mean, m.rows)};
  work.dx = dx;
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
    const Symmetric<Acc> source(state.core, work.k_count, scratch);
    const bool turned = kOnMatrixUnit<E> && !work.k_in_lanes();
    parallel(panels, [&](int64_t p) {
      const int64_t first = p * panel, lanes = std::min(panel, work.k_count - first);
      E* out = packed + p * panel_size;
      if constexpr (kOnMatrixUnit<E>) {
        if (turned) {
          Scratch own;
          E* flat = own.get<E>(panel_size);
          source.pack(first, lanes, flat);
          return turn(flat, work.depth(), out);
        }
      }
      source.pack(first, lanes, out);
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
  const bool tiled = in_tiles(settings, m.rows, m.columns);
  State<Acc> state{};
  if (m.state) {
    const int64_t size = state_size(settings, m.rows, m.columns);
    state = state_of(static_cast<Acc*>(m.state) + index * size, form, tiled, m);
  }
  if (tiled) return forward_tiles(x, state, settings, m.scale, parallel);
  prefetch(x);
  if (form == Form::kSigned) return forward_signed(x, state, settings, m.scale, parallel);
  if (form == Form::kDual) return forward_dual(x, state, settings, m.scale, parallel);
  return forward_primal<E>(x, state, settings, m.scale, parallel);
}

// Calls run(element, x) with null pointers of the packed and the tensor's type.
template <class Run>
auto with_types(const Matrices& m, const PairwiseSettings& settings, const Run& run) {
  if constexpr (kHasBFloat16Dot || kHasMatrixUnit) {
    using Pair = BFloat16Pair*;
    if (m.dtype == DType::kBFloat16) return run(Pair{}, static_cast<BFloat16*>(nullptr));
    if (m.dtype == DType::kFloat32 && settings.precision == Precision::kMedium)
      return run(Pair{}, static_cast<float*>(nullptr));
  }
  return with_type(m.dtype, [&](auto* x) {
    return run(static_cast<AccOf<std::remove_pointer_t<decltype(x)>>*>(nullptr), x);
  });
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