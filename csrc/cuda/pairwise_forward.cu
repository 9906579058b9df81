// The pairwise cosine penalty and what its backward needs, all matrices in one launch.
//
// primal  c_ij = <x_i, x_j>/(n_i n_j);   loss k sum_{i != j} phi(c_ij)
//         A_ij = 2k phi'(c_ij)/(n_i n_j), A_ii = -sum_j 2k phi'(c_ij) c_ij/n_i^2
//         one block for a 64 x 64 tile of the upper triangle: it multiplies both panels of
//         rows over all columns and adds up the squares of the same numbers, so that c is
//         known at once, and so are A there and its mirror image
// dual    M = X^T diag(1/n^2) X;         loss k (|M|^2 - N_live)
//         one block for a 64 x 64 tile of its upper triangle
// signed  s = sum_i x_i/n_i;             loss k (|s|^2 - N_live)
//         one block for 64 elements of s
//
// The primal form centres a row by a guess at its mean, taken off while loading, and makes up for
// the rest later (docs/math.md, "Centred rows"): for x less a, of sums s_i, G_ij - s_i s_j/D is the
// Gram matrix of the centred rows. The other forms, which need the norms before the product,
// centre 64 rows at a time, in two passes.
#include "product.h"
#include "reduction.h"

namespace imcl {
namespace {

constexpr double kCentredDeadRatio = 1e-5;  // imcl_fast/reference.py
constexpr int kShiftColumns = 16;           // that make the first guess at a mean

template <class Acc>
struct Shared {
  union {
    uint4 panel[2][2][kPanelUnits];  // two rounds of two panels
    Acc tile[kTile][kTile + 1];
  };
  // Of the rows of both panels, or (dual, signed) of the rows under way.
  Acc shift[2][kTile], sum[2][kTile], square[2][kTile], mean[2][kTile], inverse[2][kTile];
  double losses[kThreads / 32];
};

IMCL_DEVICE float root(float x) { return sqrtf(x); }
IMCL_DEVICE double root(double x) { return sqrt(x); }

// 1/n of a row from n^2, or 0 where the row is dead, or NaN where a square was too large for its
// type; `mean` is 0 where not centred.
template <class Acc>
IMCL_DEVICE Acc inverse_norm(const PairwiseArguments& in, Acc square, Acc mean, int columns) {
  const Acc norm = root(square < 0 ? Acc(0) : square);
  Acc limit = static_cast<Acc>(in.call.settings.eps), raw = norm;
  if (in.call.settings.center) {
    raw = root(square + static_cast<Acc>(columns) * mean * mean);
    const Acc centred_limit = static_cast<Acc>(kCentredDeadRatio) * raw;
    if (centred_limit > limit) limit = centred_limit;
  }
  const Acc nothing = raw - raw;  // or NaN
  return norm <= limit ? nothing : 1 / norm + nothing;
}

// Leaves value(i, j), i and j of the thread's sums, in shared.tile, all 64 x 64 of it.
template <class Product, class Value>
IMCL_DEVICE void stage(Shared<typename Product::Acc>& shared, bool diagonal, const Value& value) {
  __syncthreads();  // the panels under the tile have been read
  if (!is_left_out(diagonal)) {
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Product::kColumns; ++j) {
        const int row = Product::row(i), column = Product::column(j);
        const auto v = value(i, j, row, column);
        shared.tile[row][column] = v;
        if (diagonal && warp_row() < warp_column()) shared.tile[column][row] = v;
      }
  }
  __syncthreads();
}

// Walks the staged tile of a symmetric matrix of `edge` rows and then its mirror image, a
// warp for a row: core(v, side, row, column) goes to out (null: nowhere), rows and
// columns counted in the tile; and row(side, row, sum) gets the sum of summand(v) of a row.
template <class Acc, class Core, class Summand, class Row>
IMCL_DEVICE void emit(const Shared<Acc>& shared, const int (&first)[2], bool diagonal, int edge,
                      Acc* out, int64_t stride, const Core& core, const Summand& summand,
                      const Row& row) {
  for (int side = 0; side < (diagonal ? 1 : 2); ++side) {
    for (int r = warp(); r < kTile && first[side] + r < edge; r += kThreads / 32) {
      Acc sum = 0;
#pragma unroll
      for (int c = lane(); c < kTile; c += 32) {
        const Acc v = side ? shared.tile[c][r] : shared.tile[r][c];
        const int column = first[1 - side] + c;
        if (column < edge) sum += summand(v);
        if (out && column < stride)
          out[(first[side] + r) * stride + column] = column < edge ? core(v, side, r, c) : Acc(0);
      }
      row(side, r, warp_sum(sum));
    }
  }
}

// phi'(c); times c it is 2 phi(c) of the square and phi(c) of the modulus.
template <class Acc>
IMCL_DEVICE Acc slope(Penalty penalty, Acc c) {
  if (penalty == Penalty::kSquare) return c + c;
  return c > 0 ? Acc(1) : (c < 0 ? Acc(-1) : c);  // 0 at 0 and NaN at NaN
}

// What a block knows of its task.
template <class T>
struct Task {
  const PairwiseArguments& in;
  const Layer& layer;
  View<T> view;
  int index, tile;  // of the matrix in its layer, and of the tile in that

  IMCL_DEVICE State<Acc<T>> state() const { return {in, layer, index}; }
};

// A thread's part of the loss, but for k, of one tile of the primal form. Lanes are rows.
template <class T, class Product>
IMCL_DEVICE double primal(const Task<T>& task, Acc<T> k_twice, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  constexpr int depth = kDepth<Operand>;
  const PairwiseArguments& in = task.in;
  const View<T>& view = task.view;
  const int n = view.lanes(), d = view.depth();
  int i, j;
  upper_tile(task.tile, i, j);
  const bool diagonal = i == j, center = in.call.settings.center;
  const int first[2] = {i * kTile, j * kTile};
  const int half = thread() / kTile, mine = thread() % kTile;  // panel and row of it
  const int row = first[half] + mine;

  Acc shift = 0;
  if (center) {
    const int count = d < kShiftColumns ? d : kShiftColumns;
    if (row < n) {
#pragma unroll 4
      for (int c = 0; c < count; ++c) shift += to_acc(view.at(row, c));
      shift /= static_cast<Acc>(count);
    }
    shared.shift[half][mine] = shift;
  }

  // On the diagonal both panels are of the same rows, one after the other.
  const int ahead = diagonal ? depth : 0, step = depth + ahead;
  PanelReader<T, Operand> reader[2];
  Product product;
  clear(product);
  Acc sum = 0, square = 0;
  for (int k = -step, round = 0; k < d; k += step, round ^= 1) {
    uint4(&panel)[2][kPanelUnits] = shared.panel[round];
    if (k >= 0) {
#pragma unroll
      for (int b = 0; b < 2; ++b) reader[b].store(view, first[b], k + b * ahead, center, panel[b]);
      __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) reader[b].load(view, first[b], k + step + b * ahead);
    if (k < 0) continue;
    if (center) {
#pragma unroll 1
      for (int b = 0; b < 2; ++b)
        change_panel<Operand, Operand>(panel[b], [&](Acc x, int lane, int at) {
          return k + b * ahead + at < d ? x - shared.shift[b][lane] : Acc(0);
        });
      __syncthreads();
    }
#pragma unroll 1
    for (int b = 0; b < (diagonal ? 2 : 1); ++b) product.add(panel[b], panel[diagonal ? b : 1]);
    // Of this round alone first: thousands of numbers added one by one would drift.
    Acc round_sum = 0, round_square = 0;
#pragma unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const auto unit = Unit<Operand>::of(panel[half][unit_index(mine, u)]);
#pragma unroll
      for (int e = 0; e < kPerUnit<Operand>; ++e) {
        round_sum += unit[e];
        round_square += unit[e] * unit[e];
      }
    }
    sum += round_sum;
    square += round_square;
  }

  const auto state = task.state();
  shared.sum[half][mine] = sum;
  shared.square[half][mine] = square;
  __syncthreads();
  if (diagonal) {
    sum = shared.sum[0][mine] + shared.sum[1][mine];
    square = shared.square[0][mine] + shared.square[1][mine];
  }
  Acc mean = 0, offset = 0;
  if (center) {
    offset = sum / static_cast<Acc>(d);
    mean = shift + offset;
    square -= sum * offset;
    if (state.core && diagonal && half == 0 && row < n) state.means[row] = mean;
  }
  shared.mean[half][mine] = offset;
  shared.inverse[half][mine] = row < n ? inverse_norm(in, square, mean, d) : Acc(0);

  stage<Product>(shared, diagonal, [&](int at, int to, int r, int c) {
    if (diagonal && r == c) return Acc(0);
    Acc gram = product.sum[at][to];
    if (center) gram -= static_cast<Acc>(d) * shared.mean[0][r] * shared.mean[1][c];
    return gram * (shared.inverse[0][r] * shared.inverse[1][c]);
  });
  double loss = 0;
  emit(
      shared, first, diagonal, n, state.core, state.stride,
      [&](Acc c, int side, int r, int column) {
        const Acc both = shared.inverse[side][r] * shared.inverse[1 - side][column];
        return k_twice * slope(in.call.settings.penalty, c) * both;
      },
      [&](Acc c) { return slope(in.call.settings.penalty, c) * c; },
      [&](int side, int r, Acc along) {
        if (lane() != 0) return;
        loss += along;
        const Acc inverse = shared.inverse[side][r];
        if (state.core)
          state.diagonals[first[1 - side] / kTile * state.stride + first[side] + r] =
              k_twice * along * inverse * inverse;
      });
  return in.call.settings.penalty == Penalty::kSquare ? loss / 2 : loss;
}

// What thread `rank` of so many has of a row's elements, 16 bytes at a time where that can be.
template <class T, class Visit>
IMCL_DEVICE void visit_row(const Matrix<const T>& x, int row, int rank, int threads,
                           const Visit& visit) {
  if (x.vectors() && !x.along_rows()) {
    struct Pack {
      T element[16 / sizeof(T)];
    };
    constexpr int vector = 16 / static_cast<int>(sizeof(T));
    const T* data = x.data + row * x.row_stride();
#pragma unroll 4
    for (int c = rank * vector; c < x.columns(); c += threads * vector) {
      const auto pack = bits_of<Pack>(__ldg(reinterpret_cast<const uint4*>(data + c)));
#pragma unroll
      for (int e = 0; e < vector; ++e) visit(to_acc(pack.element[e]));
    }
  } else {
#pragma unroll 4
    for (int c = rank; c < x.columns(); c += threads) visit(to_acc(x.at(row, c)));
  }
}

// A thread's part of the loss, but for k, of one tile of M, or of s. Lanes are columns here, and
// the product adds up along the rows, 64 of them in a round (32 of float64): both panels' depths.
template <class T, class Product>
IMCL_DEVICE double over_rows(const Task<T>& task, bool is_signed, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  using Raw = Plain<Acc>;
  constexpr int depth = kDepth<Raw>, threads = kThreads / (2 * depth);
  const PairwiseArguments& in = task.in;
  const View<T>& view = task.view;
  const int n = view.depth(), d = view.lanes();
  int i = task.tile, j = task.tile;
  if (!is_signed) upper_tile(task.tile, i, j);
  const bool diagonal = i == j, narrow = d <= kTile;
  const int first[2] = {i * kTile, j * kTile};
  // Of the rows of a round, a thread adds up some columns of one.
  const int row = thread() / threads, rank = thread() % threads;
  const int half = row / depth, k_of_row = row % depth;

  // On the diagonal both panels are of the same columns and make up a round, elsewhere of
  // the same rows, and a round takes two steps.
  const int ahead = diagonal ? depth : 0, step = depth + ahead;
  PanelReader<T, Raw> reader[2];
  Product product;
  clear(product);
  Acc sum = 0;
  int live = 0;
  for (int k = -step, at = 0; k < n; k += step, at ^= 1) {
    uint4(&panel)[2][kPanelUnits] = shared.panel[at];
    if (k >= 0) {
#pragma unroll
      for (int b = 0; b < 2; ++b) reader[b].store(view, first[b], k + b * ahead, true, panel[b]);
      __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) reader[b].load(view, first[b], k + step + b * ahead);
    if (k < 0) continue;

    const bool starts = k % (2 * depth) == 0, inside = k + row < n;
    if (starts) {
      Acc mean = 0, square = 0;
      for (int pass = in.call.settings.center ? 0 : 1; pass < 2; ++pass) {
        Acc total = 0;
        const auto visit = [&](Acc x) { total += pass ? (x - mean) * (x - mean) : x; };
        if (!narrow) {
          if (inside) visit_row(view.matrix, k + row, rank, threads, visit);
        } else {
#pragma unroll 4
          for (int l = rank; l < d; l += threads)
            visit(Raw::decode(number<Raw>(panel[half], l, k_of_row)));
        }
        for (int distance = threads / 2; distance; distance /= 2)
          total += __shfl_xor_sync(~0u, total, distance);
        if (pass) square = total;
        else mean = total / static_cast<Acc>(d);
      }
      if (rank == 0) {
        const Acc inverse = inside ? inverse_norm(in, square, mean, d) : Acc(0);
        shared.inverse[half][k_of_row] = inverse;
        shared.mean[half][k_of_row] = inside ? mean : Acc(0);
        if (task.tile == 0 && inside) {
          live += inverse != 0;
          const auto state = task.state();
          if (state.core) state.inverse[k + row] = inverse;
          if (state.core && in.call.settings.center) state.means[k + row] = mean;
        }
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int b = 0; b < 2; ++b) {
      const int rows = diagonal ? b : !starts;
      change_panel<Raw, Operand>(panel[b], [&](Acc x, int, int of) {
        return (x - shared.mean[rows][of]) * shared.inverse[rows][of];
      });
    }
    __syncthreads();
    if (is_signed) {
#pragma unroll 2
      for (int u = 0; u < kUnits; ++u) {
        const int column = thread() % kTile;
        const auto unit = Unit<Operand>::of(panel[thread() / kTile][unit_index(column, u)]);
#pragma unroll
        for (int e = 0; e < kPerUnit<Operand>; ++e) sum += unit[e];
      }
    } else {
#pragma unroll 1
      for (int b = 0; b < (diagonal ? 2 : 1); ++b) product.add(panel[b], panel[diagonal ? b : 1]);
    }
  }

  const auto state = task.state();
  double loss = 0;
  if (is_signed) {
    shared.sum[thread() / kTile][thread() % kTile] = sum;
    __syncthreads();
    const int column = first[0] + thread();
    if (thread() < kTile && column < d) {
      const Acc s = shared.sum[0][thread()] + shared.sum[1][thread()];
      loss = static_cast<double>(s) * static_cast<double>(s);
      if (state.core) state.core[column] = s;
    }
  } else {
    stage<Product>(shared, diagonal, [&](int at, int to, int, int) { return product.sum[at][to]; });
    emit(
        shared, first, diagonal, d, state.core, state.stride,
        [](Acc m, int, int, int) { return m; }, [](Acc m) { return m * m; },
        [&](int, int, Acc squares) { loss += lane() == 0 ? static_cast<double>(squares) : 0.0; });
  }
  return loss - live;
}

// The sum over a block, for all its threads; a barrier stands between one and the next.
IMCL_DEVICE double block_sum(double x, double (&of_warps)[kThreads / 32]) {
  x = warp_sum(x);
  if (lane() == 0) of_warps[warp()] = x;
  __syncthreads();
  x = 0;
  for (const double of_warp : of_warps) x += of_warp;
  return x;
}

// Adds a block's part to the loss, which the last block of all writes.
IMCL_DEVICE void finish(const PairwiseArguments& in, double loss,
                        double (&of_warps)[kThreads / 32]) {
  const PairwiseCall& call = in.call;
  loss = block_sum(loss, of_warps);
  if (thread() == 0) call.partials[call.first_program + blockIdx.x] = loss;
  if (!draws_last_ticket(call.ticket, static_cast<unsigned>(call.programs))) return;
  constexpr int at_once = 8;  // there is no other block to wait behind
  double sum = 0;
  for (int64_t first = thread(); first < call.programs; first += at_once * kThreads) {
    double some[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int64_t at = first + i * kThreads;
      some[i] = at < call.programs ? __ldcg(call.partials + at) : 0.0;
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) sum += some[i];
  }
  sum = block_sum(sum, of_warps);
  if (thread() != 0) return;
  if (call.is_double) *static_cast<double*>(call.loss) = sum;
  else *static_cast<float*>(call.loss) = static_cast<float>(sum);
}

template <class T, class Product, class FormProduct>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Product>)
    forward(IMCL_PARAMETER(PairwiseArguments) in) {
  using Acc = imcl::Acc<T>;
  IMCL_SHARED(shared, Shared<Acc>);
  const int program = static_cast<int>(blockIdx.x);
  const Layer& layer = layer_of(in, program);
  const bool is_primal = layer.form == Form::kPrimal;
  const int tiles = static_cast<int>(forward_programs(layer));
  const int local = program - layer.first_program, index = local / tiles;
  const Task<T> task{
      in,
      layer,
      {Matrix<const T>(in, layer, kInput, static_cast<const T*>(layer.x), index), is_primal},
      index,
      local % tiles};
  const double k = scale_of(in, layer);
  double loss;
  if (is_primal) loss = primal<T, Product>(task, static_cast<Acc>(2 * k), shared);
  else loss = over_rows<T, FormProduct>(task, layer.form == Form::kSigned, shared);
  finish(in, k * loss, shared.losses);
}

template <class T, class Product, class FormProduct>
cudaError_t launch(const PairwiseCall& call, const Layer* layers, int64_t count,
                   const Dimension* dimensions, cudaStream_t stream) {
  return for_launches<PairwiseArguments>(
      call, layers, count, dimensions, forward_programs,
      [stream](const PairwiseArguments& arguments, unsigned programs) {
        const auto kernel = forward<T, Product, FormProduct>;
        IMCL_LAUNCH(kernel, programs, kThreads, 0, stream)(arguments);
      });
}

}  // namespace
}  // namespace imcl

extern "C" cudaError_t imcl_cuda_pairwise_forward(const imcl::PairwiseCall* call,
                                                  const imcl::Layer* layers, int64_t count,
                                                  const imcl::Dimension* dimensions,
                                                  cudaStream_t stream) {
  using namespace imcl;
  const auto run = [&](auto launcher) {
    return launcher(*call, layers, count, dimensions, stream);
  };
  using Half = TensorCore<Plain<__half>>;
  using BFloat = TensorCore<Plain<__nv_bfloat16>>;
  // The dual and signed forms subtract nearly equal numbers: nothing coarser than float32 will do.
  using Split = TensorCore<SplitTf32>;
  switch (call->dtype) {
    case DType::kFloat64: return run(launch<double, Simt<double>, Simt<double>>);
    case DType::kBFloat16: return run(launch<__nv_bfloat16, BFloat, Split>);
    case DType::kFloat16:
      // Centred numbers may lie beyond float16's range.
      if (call->settings.center) return run(launch<__half, TensorCore<Tf32>, Split>);
      return run(launch<__half, Half, Split>);
    default: break;
  }
  switch (precision_of(call->settings)) {
    case Precision::kMedium: return run(launch<float, BFloat, Simt<float>>);
    case Precision::kHigh: return run(launch<float, TensorCore<Tf32>, Simt<float>>);
    default: return run(launch<float, Simt<float>, Simt<float>>);
  }
}
