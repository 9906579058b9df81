// The pairwise cosine penalty and what its backward needs, many matrices in a launch.
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
// Where a row of the dual or signed form fits in one tile, rows are read once, 64 to 256 at a time,
// and a warp makes the norms of some of them; otherwise 256 rows are read in whole for their norms,
// and the columns of the tile again.
//
// The primal form centres a row by a guess at its mean, taken off while loading, and makes up for
// the rest later (docs/math.md, "Centred rows"): for x less a, of sums s_i, G_ij - s_i s_j/D is the
// Gram matrix of the centred rows. The other forms, which need the norms before the product,
// centre rows before they sum squares, in two passes.
#include "narrow.h"
#include "product.h"
#include "reduction.h"

namespace imcl {
namespace {

// Columns that make the first guess at a mean: four blocks all over the row, for the first ones
// alone may be unlike the others, as the border of an image is.
constexpr int kShiftBlocks = 4, kShiftBlock = 4;

template <class Acc>
struct Shared {
  union {
    uint4 panel[2][2][kPanelUnits];  // two rounds of two panels, or (narrow) one of each warp
    Acc tile[kTile][kTile + 1];
  };
  union {
    struct {  // (primal) of the rows of both panels
      Acc shift[2][kTile], sum[2][kTile], square[2][kTile], mean[2][kTile], inverse[2][kTile];
    };
    struct {  // (dual, signed) of the rows under way; narrow: a quarter for each warp
      Acc means[kThreads / 32 * kTile], inverses[kThreads / 32 * kTile];
    };
  };
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

// Leaves value(i, j), i and j of the thread's sums, in shared.tile: of a diagonal tile what is not
// below the diagonal, and some of the rest.
template <class Product, class Value>
IMCL_DEVICE void stage(Shared<typename Product::Acc>& shared, bool diagonal, const Value& value) {
  __syncthreads();  // the panels under the tile have been read
  if (!is_left_out(diagonal)) {
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Product::kColumns; ++j) {
        const int row = Product::row(i), column = Product::column(j);
        shared.tile[row][column] = value(i, j, row, column);
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
        const int column = first[1 - side] + c;
        const bool mirrored = side || (diagonal && c < r);
        Acc v = 0;
        if (column < edge) {
          v = mirrored ? shared.tile[c][r] : shared.tile[r][c];
          sum += summand(v);
        }
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
  uint32_t index;  // of the matrix in its layer
  int tile;        // in the matrix

  IMCL_DEVICE State<Acc<T>> state() const { return {in, layer, index}; }
};

// A thread's part of the loss, but for k, of one tile of the primal form. Lanes are rows.
template <class T, class Product>
IMCL_DEVICE double primal(const Task<T>& task, Acc<T> k_twice, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  constexpr int depth = kDepth<Operand>;
  constexpr bool on_tensor_cores = Product::kOnTensorCores;
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
    constexpr int kMost = kShiftBlocks * kShiftBlock;
    const int count = d < kMost ? d : kMost;
    const int apart = d < kMost ? kShiftBlock : d / kShiftBlocks;
    if (row < n) {
#pragma unroll 4
      for (int c = 0; c < count; ++c)
        shift += to_acc(view.at(row, c / kShiftBlock * apart + c % kShiftBlock));
      shift /= static_cast<Acc>(count);
    }
    shared.shift[half][mine] = shift;
  }

  // On the diagonal both panels are of the same rows, one after the other.
  const int ahead = diagonal ? depth : 0, step = depth + ahead;
  PanelReader<T, Operand> reader[2];
  Product product;
  clear(product);
  typename Product::Squares squares;
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
    for (int b = 0; b < (diagonal ? 2 : 1); ++b) {
      if constexpr (on_tensor_cores) product.add(panel[b], panel[diagonal ? b : 1], &squares);
      else product.add(panel[b], panel[diagonal ? b : 1]);
    }
    if (on_tensor_cores && !center) continue;
    // Of this round alone first: thousands of numbers added one by one would drift.
    Acc round_sum = 0, round_square = 0;
#pragma unroll 2
    for (int u = 0; u < kUnits; ++u) {
      const auto unit = Unit<Operand>::of(panel[half][unit_index(mine, u)]);
#pragma unroll
      for (int e = 0; e < kPerUnit<Operand>; ++e) {
        round_sum += unit[e];
        if (!on_tensor_cores) round_square += unit[e] * unit[e];
      }
    }
    sum += round_sum;
    square += round_square;
  }

  const auto state = task.state();
  shared.sum[half][mine] = sum;
  if constexpr (!on_tensor_cores) {
    shared.square[half][mine] = square;
  } else if (!diagonal) {
    const bool of_a = warp_row() == warp_column();
    squares.put(shared.square[!of_a] + (of_a ? warp_row() : warp_column()));
  } else if (warp_row() == warp_column()) {
    product.put_squares(shared.square[0] + warp_row());
  }
  __syncthreads();
  square = shared.square[diagonal ? 0 : half][mine];
  if (diagonal) {
    sum = shared.sum[0][mine] + shared.sum[1][mine];
    if (!on_tensor_cores) square += shared.square[1][mine];
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
      const auto pack = bits_of<Pack>(__ldg(whole<const uint4>(data + c)));
#pragma unroll
      for (int e = 0; e < vector; ++e) visit(to_acc(pack.element[e]));
    }
  } else {
#pragma unroll 4
    for (int c = rank; c < x.columns(); c += threads) visit(to_acc(x.at(row, c)));
  }
}

// A thread's part of the loss, but for k, of a tile of M that shared.tile holds.
template <class T>
IMCL_DEVICE double emit_form(const Task<T>& task, const int (&first)[2], bool diagonal,
                             const Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  const auto state = task.state();
  double loss = 0;
  emit(
      shared, first, diagonal, task.view.lanes(), state.core, state.stride,
      [](Acc m, int, int, int) { return m; }, [](Acc m) { return m * m; },
      [&](int, int, Acc squares) { loss += lane() == 0 ? static_cast<double>(squares) : 0.0; });
  return loss;
}

// A thread's part of the loss, but for k, of M or s of no more than 64 columns, which are lanes: a
// panel of rows for each warp at a time.
template <class T, class Product, bool kSigned>
IMCL_DEVICE double narrow(const Task<T>& task, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  using Rows = SegmentRows<T>;
  using Operand = typename Rows::Operand;
  constexpr int warps = kThreads / 32, depth = kDepth<Operand>;
  constexpr bool on_tensor_cores = Product::kOnTensorCores;
  const PairwiseArguments& in = task.in;
  const int n = task.view.depth(), d = task.view.lanes();
  const bool center = in.call.settings.center, corner = d <= kCorner;
  const auto state = task.state();
  const auto panel = [&](int of_warp) { return shared.panel[of_warp / 2][of_warp % 2]; };
  const auto rows_of = [&](int of_warp, int segment) {
    const int first = of_warp * kTile + segment * Rows::kRows;
    return Rows{panel(of_warp), shared.means + first, shared.inverses + first, segment, d, center};
  };

  Product product;
  clear(product);
  Acc s[Rows::kGroups] = {};
  int live = 0;
  for (int k = 0; k < n; k += warps * depth) {
    if (k > 0) __syncthreads();  // the panels have been read
#pragma unroll 1
    for (int w = 0; w < warps && k + w * depth < n; w += 2) {
      PanelReader<T, Operand> reader[2];
#pragma unroll
      for (int b = 0; b < 2; ++b) reader[b].load(task.view, 0, k + (w + b) * depth);
#pragma unroll
      for (int b = 0; b < 2; ++b)
        reader[b].store(task.view, 0, k + (w + b) * depth, true, panel(w + b));
    }
    __syncthreads();  // the panels are there
#pragma unroll 1
    for (int segment = 0; segment < 2; ++segment) {
      const Rows rows = rows_of(warp(), segment);
      const int first = k + warp() * depth + segment * Rows::kRows;
      if (first >= n) break;
      Acc mean = 0;
      if (center) {
        mean = rows.template owned_sum<false>() / static_cast<Acc>(d);
        if (Rows::owns()) rows.means[Rows::owned_row()] = mean;
        __syncwarp();  // the means are there
      }
      const Acc inverse = inverse_norm(in, rows.template owned_sum<true>(), mean, d);
      if (Rows::owns()) rows.inverses[Rows::owned_row()] = inverse;
      __syncwarp();  // the norms are there
      const int row = first + Rows::owned_row();
      if (Rows::owns() && row < n) {
        live += inverse != 0;
        if (state.core) state.inverse[row] = inverse;
        if (state.core && center) state.means[row] = mean;
      }
      if constexpr (kSigned) {
        rows.add_to(s);
      } else if constexpr (!on_tensor_cores) {
        rows.normalize();
      } else if (corner) {
        if (d <= 16) add_segment<2>(product, rows, 0, 0);
        else add_segment<4>(product, rows, 0, 0);
      }
    }
    if constexpr (!kSigned) {
      if (!corner) {
        __syncthreads();  // the norms, or rows of norm 1, are there
#pragma unroll 1
        for (int w = 0; w < warps && k + w * depth < n; ++w) {
          if constexpr (on_tensor_cores) {
#pragma unroll 1
            for (int segment = 0; segment < 2; ++segment) {
              if (k + w * depth + segment * Rows::kRows >= n || is_left_out(true)) break;
              add_segment<4>(product, rows_of(w, segment), warp_row() / 8, warp_column() / 8);
            }
          } else {
            product.add(panel(w), panel(w));
          }
        }
      } else if constexpr (!on_tensor_cores) {
        __syncwarp();  // the warp's rows are of norm 1
        if (k + warp() * depth < n) product.add(panel(warp()), panel(warp()), true);
      }
    }
  }

  if constexpr (kSigned) {
    __syncthreads();  // nobody reads the panels any more
    rows_sum<Rows>(s, shared.tile[warp()]);
    __syncthreads();  // all warps' parts are there
    double loss = 0;
    if (thread() < d) {
      Acc sum = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w) sum += shared.tile[w][thread()];
      loss = static_cast<double>(sum) * static_cast<double>(sum);
      if (state.core) state.core[thread()] = sum;
    }
    return loss - live;
  } else {
    if (corner) {
      __syncthreads();  // nobody reads the panels any more
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        if (warp() == w) put_corner(product, shared.tile, w == 0);
        __syncthreads();  // one warp after the other
      }
    } else {
      stage<Product>(shared, true, [&](int at, int to, int, int) { return product.sum[at][to]; });
    }
    const int first[2] = {0, 0};
    return emit_form(task, first, true, shared) - live;
  }
}

// Leaves means and inverse norms of some rows in shared memory, and for the first tile in the
// state; how many of them a thread has found live.
template <class T>
IMCL_DEVICE int row_norms(const Task<T>& task, int first, int end, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  constexpr int threads = 4;  // of a row
  const PairwiseArguments& in = task.in;
  const Matrix<const T>& x = task.view.matrix;
  const int rank = thread() % threads, d = x.columns();
  const auto state = task.state();
  int live = 0;
#pragma unroll 1
  for (int r = thread() / threads; first + r < end; r += kThreads / threads) {
    const int row = first + r;
    Acc mean = 0, square = 0;
    // Of what elements are more than the first: of rows that are nearly constant the mean is as
    // exact as of others.
    const Acc guess = in.call.settings.center && d > 0 ? to_acc(x.at(row, 0)) : Acc(0);
    for (int pass = in.call.settings.center ? 0 : 1; pass < 2; ++pass) {
      Acc total = 0;
      visit_row(x, row, rank, threads,
                [&](Acc v) { total += pass ? (v - mean) * (v - mean) : v - guess; });
      // Of one row alone: the others' threads may be done.
      const unsigned mask = ((1u << threads) - 1) << (lane() / threads * threads);
      for (int other = threads / 2; other > 0; other /= 2)
        total += __shfl_xor_sync(mask, total, other);
      if (pass) square = total;
      else mean = guess + total / static_cast<Acc>(d);
    }
    if (rank != 0) continue;
    const Acc inverse = inverse_norm(in, square, mean, d);
    shared.inverses[r] = inverse;
    shared.means[r] = mean;
    if (task.tile > 0) continue;
    live += inverse != 0;
    if (state.core) state.inverse[row] = inverse;
    if (state.core && in.call.settings.center) state.means[row] = mean;
  }
  return live;
}

// A thread's part of the loss, but for k, of one tile of a wider M, or of s. Lanes are columns
// here, and the product adds up along the rows, which get their norms 256 at a time.
template <class T, class Product>
IMCL_DEVICE double over_rows(const Task<T>& task, bool is_signed, Shared<Acc<T>>& shared) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  using Raw = Plain<Acc>;
  constexpr int depth = kDepth<Raw>, at_once = kThreads / 32 * kTile;
  const View<T>& view = task.view;
  const int n = view.depth(), d = view.lanes();
  int i = task.tile, j = task.tile;
  if (!is_signed) upper_tile(task.tile, i, j);
  const bool diagonal = i == j;
  const int first[2] = {i * kTile, j * kTile};

  // On the diagonal both panels are of the same columns, one after the other.
  const int ahead = diagonal ? depth : 0, step = depth + ahead;
  PanelReader<T, Raw> reader[2];
  Product product;
  clear(product);
  Acc sum = 0;
  int live = 0;
  for (int k = -step, at = 0; k < n; k += step, at ^= 1) {
    uint4(&panel)[2][kPanelUnits] = shared.panel[at];
    if (k >= 0) {
      if (k % at_once == 0) live += row_norms(task, k, n < k + at_once ? n : k + at_once, shared);
#pragma unroll
      for (int b = 0; b < 2; ++b) reader[b].store(view, first[b], k + b * ahead, true, panel[b]);
      __syncthreads();  // the panels are there, and the norms
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) reader[b].load(view, first[b], k + step + b * ahead);
    if (k < 0) continue;

#pragma unroll 1
    for (int b = 0; b < 2; ++b) {
      const int row = k % at_once + b * ahead;
      change_panel<Raw, Operand>(panel[b], [&](Acc x, int, int of) {
        const bool inside = k + b * ahead + of < n;
        return inside ? (x - shared.means[row + of]) * shared.inverses[row + of] : Acc(0);
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
    loss = emit_form(task, first, diagonal, shared);
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
  const int local = program - layer.first_program;
  const auto index = static_cast<uint32_t>(local / tiles);
  // For each form anew: see opaque().
  const auto task = [&] {
    const Layer& own = in.layers[opaque(static_cast<int>(&layer - in.layers))];
    const auto x = static_cast<const T*>(own.x);
    return Task<T>{
        in, own, {Matrix<const T>(in, own, kInput, x, index), is_primal}, index, local % tiles};
  };
  const bool is_signed = layer.form == Form::kSigned;
  double loss;
  if (is_primal)
    loss = primal<T, Product>(task(), static_cast<Acc>(2 * scale_of(in, layer)), shared);
  else if (layer.columns > kTile) loss = over_rows<T, FormProduct>(task(), is_signed, shared);
  else if (is_signed) loss = narrow<T, FormProduct, true>(task(), shared);
  else loss = narrow<T, FormProduct, false>(task(), shared);
  finish(in, scale_of(in, layer) * loss, shared.losses);
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
