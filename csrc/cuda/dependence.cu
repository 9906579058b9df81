// The Grams of samples and their gradients, as many representations of a dtype in a launch as its
// parameters hold.
//
// X has B rows, the samples, of D columns, the features; a_k is the mean of column k over the
// first 64 samples and X_a = X - 1 a^T.
//
// gram     G = scale X_a X_a^T  (B, B)  one block for a 64 x 64 tile (i, j), i <= j, and a part of
//                                       the columns; the tiles of all parts are added up
// product  dX = S X_a           (B, D)  one block for 64 rows and a part of the columns
//
// Why a needn't be the mean over all samples is said in kernels/dependence_kernel.py. Every block
// that needs a makes it of the same numbers in the same order: all of them must take off the same
// bits. Only then are numbers multiplied, by nothing coarser than float32: distances of samples are
// differences of what comes out.
#include "dependence.h"
#include "gradient.h"
#include "product.h"
#include "reduction.h"

namespace imcl {
namespace {

struct DependenceArguments : LaunchArguments<DependenceCall, GramLayer> {};
static_assert(sizeof(DependenceArguments) <= IMCL_PARAMETER_BYTES);

// Tiles that one block adds up at a time; in the tests as few as show every loop turning, and no
// fewer: by 2 the parts of a Gram would take more tickets than there are of them.
#if defined(IMCL_CUDA_ON_CPU)
constexpr int kFan = 3;
#else
constexpr int kFan = 8;
#endif

// Which of the Grams is a representation's, or what takes its place.
template <class T>
IMCL_DEVICE Matrix<T> gram_of(const DependenceArguments& in, const GramLayer& layer, Side side,
                              T* grams) {
  return {in, in.call.grams, side, grams, layer.place};
}

template <class T>
IMCL_DEVICE Acc<T>* means_of(const DependenceArguments& in, const Layer& layer) {
  return static_cast<Acc<T>*>(in.call.means) + layer.state;
}

// ---- gram ----

template <class Operand>
struct GramShared {
  uint4 panel[2][2][kPanelUnits];  // two rounds of the rows i and j, or of more columns
  uint4 begin[kPanelUnits];        // the first 64 samples, where neither i nor j is those
  typename Operand::Acc shift[2][kDepth<Operand>];
};

// The means of the columns of a panel over its lanes, of which `samples` are any.
template <class Operand>
IMCL_DEVICE void column_means(uint4* panel, int samples, typename Operand::Acc* shift) {
  using Acc = typename Operand::Acc;
  constexpr int ranks = kThreads / kDepth<Operand>;  // threads of a column
  const int k = thread() / ranks, rank = thread() % ranks;
  Acc sum = 0;
#pragma unroll 4
  for (int lane = rank; lane < kTile; lane += ranks)
    sum += Operand::decode(number<Operand>(panel, lane, k));
  for (int other = ranks / 2; other > 0; other /= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (rank == 0) shift[k] = sum / static_cast<Acc>(samples);
}

// Leaves in `product` the sum of the tiles of `count` blocks, in an order that depends on count
// alone, for one of them; whether it is this one, `part` of them.
//
// Of kFan blocks the last to store its tile adds up theirs, of kFan such sums the last to store its
// own adds up those, and so on: no block reads the tiles of many, one after the other.
template <class Product>
IMCL_DEVICE bool added_up(Product& product, typename Product::Acc* tiles, unsigned* tickets,
                          int part, int count) {
  constexpr int columns = Product::kColumns, sums = Product::kRows * columns;
  const auto tile = [&](int64_t index) { return tiles + index * (sums * kThreads) + thread(); };
  int64_t apart = 1;  // of each other, in tiles
  while (count > 1) {
    typename Product::Acc* const mine = tile(part * apart);
#pragma unroll
    for (int s = 0; s < sums; ++s) mine[s * kThreads] = product.sum[s / columns][s % columns];
    const int group = part / kFan;
    const int members = count - group * kFan < kFan ? count - group * kFan : kFan;
    if (!draws_last_ticket(tickets + group, static_cast<unsigned>(members))) return false;
    clear(product);
#pragma unroll 1
    for (int member = 0; member < members; ++member) {
      const typename Product::Acc* const other = tile((group * kFan + member) * apart);
#pragma unroll
      for (int s = 0; s < sums; ++s)  // past the first-level cache: other processors wrote them
        product.sum[s / columns][s % columns] += __ldcg(other + s * kThreads);
    }
    count = (count + kFan - 1) / kFan;
    tickets += count;
    part = group;
    apart *= kFan;
  }
  return true;
}

// Of a part of the columns, [first_k, end_k), a tile (i, j) of the Gram but for its scale. What it
// has of samples beyond the last is for nobody to read.
template <class T, class Product>
IMCL_DEVICE void add_columns(const DependenceArguments& in, const GramLayer& layer, int i, int j,
                             int first_k, int end_k, GramShared<typename Product::Operand>& shared,
                             Product& product) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  constexpr int depth = kDepth<Operand>;
  const View<T> view{Matrix<const T>(in, layer, kInput, static_cast<const T*>(layer.x), 0), true};
  const int samples = view.lanes() < kTile ? view.lanes() : kTile;
  Acc* const means = means_of<T>(in, layer);
  // Of the first tile both panels are of the same rows, one after the other.
  const bool ahead = j == 0, has_begin = i > 0;
  const int step = ahead ? 2 * depth : depth, panels = ahead || i != j ? 2 : 1;
  const int first[2] = {i * kTile, j * kTile}, further = ahead ? depth : 0;
  PanelReader<T, Operand> reader[2], begin_reader;
  for (int k = first_k - step, round = 0; k < end_k; k += step, round ^= 1) {
    uint4(&panel)[2][kPanelUnits] = shared.panel[round];
    if (k >= first_k) {
#pragma unroll
      for (int b = 0; b < 2; ++b)
        if (b < panels) reader[b].store(view, first[b], k + b * further, true, panel[b]);
      if (has_begin) begin_reader.store(view, 0, k, true, shared.begin);
      __syncthreads();  // the panels are there for whoever makes their means
    }
    if (k + step < end_k) {  // what follows is another block's
#pragma unroll
      for (int b = 0; b < 2; ++b)
        if (b < panels) reader[b].load(view, first[b], k + step + b * further);
      if (has_begin) begin_reader.load(view, 0, k + step);
    }
    if (k < first_k) continue;
#pragma unroll 1
    for (int b = 0; b < (ahead ? 2 : 1); ++b)
      column_means<Operand>(has_begin ? shared.begin : panel[b], samples, shared.shift[b]);
    __syncthreads();  // the shifts are there
    if (ahead && thread() < step && k + thread() < layer.columns)
      means[k + thread()] = shared.shift[thread() / depth][thread() % depth];
#pragma unroll 1
    for (int b = 0; b < panels; ++b)
      change_panel<Operand, Operand>(
          panel[b], [&](Acc x, int, int at) { return x - shared.shift[ahead ? b : 0][at]; });
    __syncthreads();  // all numbers are centred
#pragma unroll 1
    for (int b = 0; b < (ahead ? 2 : 1); ++b) product.add(panel[b], panel[ahead ? b : panels - 1]);
  }
}

template <class T, class Product>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    gram_kernel(IMCL_PARAMETER(DependenceArguments) in) {
  using Acc = imcl::Acc<T>;
  IMCL_SHARED(shared, GramShared<typename Product::Operand>);
  const int program = static_cast<int>(blockIdx.x);
  const GramLayer& layer = layer_of(in, program);
  const DependenceCall& call = in.call;
  const int tiles = static_cast<int>(gram_tiles(layer.rows));
  const int parts = static_cast<int>(gram_parts(layer.columns, call.span));
  const int local = program - layer.first_program;
  const int tile = local % tiles, part = local / tiles;  // tiles of the same columns run together
  int i, j;
  upper_tile(tile, i, j);
  const int64_t first_k = part * call.span, left = layer.columns - first_k;
  Product product;
  clear(product);
  add_columns<T>(in, layer, i, j, static_cast<int>(first_k),
                 static_cast<int>(first_k + (left < call.span ? left : call.span)), shared,
                 product);

  if (parts > 1) {
    const int64_t mine = call.first_program + layer.first_program + int64_t{tile} * parts;
    Acc* const tiles_of_parts = static_cast<Acc*>(call.partials) + mine * (kTile * kTile);
    if (!added_up(product, tiles_of_parts, call.tickets + mine, part, parts)) return;
  }
  const bool diagonal = i == j;
  if (is_left_out(diagonal)) return;
  const Matrix<Acc> out = gram_of(in, layer, kGradient, static_cast<Acc*>(call.grams.dx));
  const Acc scale = static_cast<Acc>(layer.scale);
#pragma unroll
  for (int at = 0; at < Product::kRows; ++at)
#pragma unroll
    for (int to = 0; to < Product::kColumns; ++to) {
      const int row = i * kTile + Product::row(at), column = j * kTile + Product::column(to);
      // Both of a pair are written by one thread, which makes the matrix symmetric to the bit.
      if (column >= layer.rows || row > column) continue;
      const Acc value = scale * product.sum[at][to];
      out.at(row, column) = value;
      if (row != column) out.at(column, row) = value;
    }
}

// ---- product ----

template <class T>
union ProductShared {
  uint4 panel[2][2][kPanelUnits];  // two rounds of a panel of S and one of X
  Tile<T> tile;                    // of dx
};

template <class T, class Product>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    product_kernel(IMCL_PARAMETER(DependenceArguments) in) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  constexpr int depth = kDepth<Operand>;
  IMCL_SHARED(shared, ProductShared<T>);
  const int program = static_cast<int>(blockIdx.x);
  const GramLayer& layer = layer_of(in, program);
  const int local = program - layer.first_program, n = layer.rows;
  const int tiles_p = static_cast<int>(divide_up(n, kTile));
  const int p0 = local % tiles_p * kTile;
  const int64_t first_q = local / tiles_p * in.call.span, left = layer.columns - first_q;
  const int end_q = static_cast<int>(first_q + (left < in.call.span ? left : in.call.span));
  const Acc* const means = means_of<T>(in, layer);
  const View<Acc> s{gram_of(in, layer, kInput, static_cast<const Acc*>(in.call.grams.x)), true};
  const View<T> z{Matrix<const T>(in, layer, kInput, static_cast<const T*>(layer.x), 0), false};
  const Matrix<T> dx(in, layer, kGradient, static_cast<T*>(layer.dx), 0);

  PanelReader<Acc, Operand> reader_s;
  PanelReader<T, Operand> reader_z;
  Product product;
  struct {
    int q, k;
  } next{static_cast<int>(first_q), 0};
  // One round before the first there is nothing but to load.
  for (int round = -1; true; ++round) {
    const auto at = next;
    if (at.q >= end_q) break;
    uint4(&panel)[2][kPanelUnits] = shared.panel[round & 1];
    if (round >= 0) {
      next.k += depth;
      if (next.k >= n) next = {at.q + kTile, 0};
      reader_s.store(s, p0, at.k, true, panel[0]);
      reader_z.store(z, at.q, at.k, true, panel[1]);
      __syncthreads();  // the panels are there
    }
    if (next.q < end_q) {
      reader_s.load(s, p0, next.k);
      reader_z.load(z, next.q, next.k);
    }
    if (round < 0) continue;
    // Beyond the last sample S is 0, and this is finite.
    change_panel<Operand, Operand>(panel[1], [&](Acc x, int lane, int) {
      const int column = at.q + lane;
      return column < layer.columns ? x - __ldg(means + column) : x;
    });
    __syncthreads();  // X is centred
    if (at.k == 0) clear(product);
    product.add(panel[0], panel[1]);
    if (at.k + depth < n) continue;
    write_product<Product>(shared.tile, dx, true, p0, at.q,
                           [&](int i, int j) { return product.sum[i][j]; });
  }
}

// ---- launches ----

template <class T_, class Product_>
struct Types {
  using T = T_;
  using Product = Product_;
};

// Calls run with the types for a dtype.
template <class Run>
cudaError_t with_types(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(Types<double, Simt<double>>());
    case DType::kBFloat16: return run(Types<__nv_bfloat16, TensorCore<SplitTf32>>());
    case DType::kFloat16: return run(Types<__half, TensorCore<SplitTf32>>());
    default: return run(Types<float, Simt<float>>());
  }
}

// A kernel on all layers; kernel_of(types) is the one for a dtype, programs_of(layer, span) how
// many blocks a layer takes.
template <class Programs, class Kernel>
cudaError_t launch(const DependenceCall& call, const GramLayer* layers, int64_t count,
                   const Dimension* dimensions, cudaStream_t stream, const Programs& programs_of,
                   const Kernel& kernel_of) {
  return with_types(call.dtype, [&](auto types) {
    return for_launches<DependenceArguments>(
        call, layers, count, dimensions,
        [&](const Layer& layer) { return programs_of(layer, call.span); },
        [&](const DependenceArguments& arguments, unsigned programs) {
          const auto kernel = kernel_of(types);
          IMCL_LAUNCH(kernel, programs, kThreads, 0, stream)(arguments);
        });
  });
}

}  // namespace
}  // namespace imcl

extern "C" cudaError_t imcl_cuda_gram_forward(const imcl::DependenceCall* call,
                                              const imcl::GramLayer* layers, int64_t count,
                                              const imcl::Dimension* dimensions,
                                              cudaStream_t stream) {
  using namespace imcl;
  return launch(*call, layers, count, dimensions, stream, gram_programs, [](auto types) {
    using Chosen = decltype(types);
    return gram_kernel<typename Chosen::T, typename Chosen::Product>;
  });
}

extern "C" cudaError_t imcl_cuda_gram_backward(const imcl::DependenceCall* call,
                                               const imcl::GramLayer* layers, int64_t count,
                                               const imcl::Dimension* dimensions,
                                               cudaStream_t stream) {
  using namespace imcl;
  return launch(*call, layers, count, dimensions, stream, product_programs, [](auto types) {
    using Chosen = decltype(types);
    return product_kernel<typename Chosen::T, typename Chosen::Product>;
  });
}
