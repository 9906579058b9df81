// The gradient of the pairwise cosine penalty, many matrices in a launch.
//
// primal  dX = A X;  A_ij lies in the state, and A_ii is minus the sum of what the tiles of
//         row i left there
//         one block for 64 rows by some tiles of 64 columns, one after the other
// dual    dx_i = 4k/n_i^2 (y_i - <y_i, x_i>/n_i^2 x_i), y_i = x_i M
// signed  dx_i = 2k/n_i (s - <s, x_i>/n_i^2 x_i)
//         one block for some tiles of 64 rows, one after the other
//
// all times the incoming gradient, which is read where it lies. Row means are taken off while
// loading; nothing else comes of centring (docs/math.md, "Centred rows").
//
// Both products are Y^T = S Z for a symmetric S, of 64 p by 64 q: primal p are rows and q
// columns, dual the other way round, and Z (k, q) is X with its axes named alike.
#include "gradient.h"
#include "product.h"
#include "reduction.h"

namespace imcl {
namespace {

template <class T>
struct Shared {
  union {
    uint4 panel[2][2][kPanelUnits];  // two rounds of a panel of S and one of Z
    Tile<T> tile;                    // of dx
  };
  Acc<T> diagonal[kTile];
  Acc<T> along[2][kTile];  // <y, x> of the rows q, from the upper and the lower half of the p
};

// Carries panels of S (rows of `stride` elements, a multiple of 4) like a PanelReader; what
// it finds on S's diagonal is replaced.
template <class Acc, class Operand>
class SymmetricReader {
 public:
  IMCL_DEVICE void load(const Acc* s, int64_t stride, int edge, int first_p, int first_k) {
    const int p = first_p + row(0), k = first_k + column();
    int left = k < stride ? edge - p : 0;
    const Acc* pack = s + p * stride + k;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      packs_[j] = uint4{0, 0, 0, 0};
      if (left > 0) packs_[j] = __ldg(whole<const uint4>(pack));  // [kVector]
      left -= kRowStep;
      pack += kRowStep * stride;
    }
  }

  IMCL_DEVICE void store(int first_p, int first_k, const Acc* diagonal, uint4* panel) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      struct Elements {
        Acc element[kVector];
      };
      struct Piece {
        typename Operand::Bits bits[kVector];
      } piece;
      const auto elements = bits_of<Elements>(packs_[j]);
      const int k = column();
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const bool replaced = diagonal && first_p + row(j) == first_k + k + e;
        piece.bits[e] = Operand::encode(replaced ? diagonal[row(j)] : elements.element[e]);
      }
      auto* place = &number<Operand>(panel, row(j), k);
      if constexpr (sizeof(piece) == 8) *whole<uint2>(place) = bits_of<uint2>(piece);
      else *whole<uint4>(place) = bits_of<uint4>(piece);
    }
  }

 private:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Acc));
  static constexpr int kPacks = kTile * kDepth<Operand> / kVector / kThreads;
  static constexpr int kHalf = kDepth<Operand> / kVector / 2;  // packs of half a row
  static constexpr int kRowStep = kThreads / (2 * kHalf);
  // As in PanelReader.
  static IMCL_DEVICE int row(int j) {
    return thread() / (4 * kHalf) * 2 + thread() / kHalf % 2 + j * kRowStep;
  }
  static IMCL_DEVICE int column() {
    return (thread() % kHalf + thread() / (2 * kHalf) % 2 * kHalf) * kVector;
  }

  uint4 packs_[kPacks];
};

// The sum over the lanes that hold the same columns.
template <class Product>
IMCL_DEVICE typename Product::Acc column_sum(typename Product::Acc x) {
  for (int other = 16; other >= Product::kColumnLanes; other /= 2)
    x += __shfl_xor_sync(kAllLanes, x, other);
  return x;
}

// Where a block is in its work: tile q, pass over the p, tile p, and k, the last fastest.
struct Position {
  int q, pass, p, k;
};

// A block's backward of one matrix, but for the loop over its products.
template <class T, class Product, bool kPrimal>
struct Backward {
  using Acc = imcl::Acc<T>;
  static constexpr int kRows = Product::kRows, kColumns = Product::kColumns;

  const PairwiseArguments& in;
  const Layer& layer;
  int index;
  Acc grad;
  Shared<T>& shared;

  IMCL_DEVICE State<Acc> state() const { return {in, layer, index}; }
  // Z has the q for lanes.
  IMCL_DEVICE View<T> z() const {
    const auto x = static_cast<const T*>(layer.x);
    return {Matrix<const T>(in, layer, kInput, x, index), !kPrimal};
  }

  // Leaves dx of the tile where it belongs.
  template <class Value>
  IMCL_DEVICE void write(int p0, int q0, const Value& value) const {
    const Matrix<T> dx(in, layer, kGradient, static_cast<T*>(layer.dx), index);
    write_product<Product>(shared.tile, dx, kPrimal, p0, q0, value);
  }

  // dual and signed: y of a tile is there. `along` is the thread's part of <y, x>.
  IMCL_DEVICE void finish(const Position& at, int passes, bool last_p, int round, Product& product,
                          Acc (&along)[kColumns]) const {
    using Operand = typename Product::Operand;
    constexpr int depth = kDepth<Operand>;
    const View<T> view = z();
    const auto own = state();
    const bool is_signed = layer.form == Form::kSigned;
    const int p0 = at.p * kTile, q0 = at.q * kTile;
    // Columns that two rounds hold are still in the panels, as the product had them.
    const bool held = !is_signed && layer.columns <= 2 * depth;
    auto& y = product.sum;   // [p, q]
    Acc x[kRows][kColumns];  // [p, q]
    Acc inverse[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int q = q0 + Product::column(j);
      const bool inside = q < layer.rows;
      inverse[j] = inside ? own.inverse[q] : Acc(0);
      const Acc mean = inside && in.call.settings.center ? own.means[q] : Acc(0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int p = p0 + Product::row(i);
        const bool exists = inside && p < layer.columns;
        if (held) {
          uint4* const panel = shared.panel[(round - at.k / depth + p / depth) & 1][1];
          x[i][j] = exists ? Operand::decode(number<Operand>(panel, q - q0, p % depth)) : Acc(0);
        } else {
          x[i][j] = exists ? to_acc(view.at(q, p)) - mean : Acc(0);
        }
        if (is_signed) y[i][j] = exists ? own.core[p] : Acc(0);
      }
    }
    if (at.pass == 0) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int i = 0; i < kRows; ++i) along[j] += y[i][j] * x[i][j];
      if (last_p) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Acc sum = column_sum<Product>(along[j]);
          if (lane() < Product::kColumnLanes)
            shared.along[warp_row() / 32][Product::column(j)] = sum;
          along[j] = 0;
        }  // write() waits before it reads them
      }
    }
    if (at.pass + 1 < passes) return;
    const Acc factor = static_cast<Acc>((is_signed ? 2 : 4) * scale_of(in, layer)) * grad;
    write(p0, q0, [&](int i, int j) {
      const int q = Product::column(j);
      const Acc over_square = inverse[j] * inverse[j];
      const Acc along_q = (shared.along[0][q] + shared.along[1][q]) * over_square;
      return factor * (is_signed ? inverse[j] : over_square) * (y[i][j] - along_q * x[i][j]);
    });
  }
};

template <class T, class Product, bool kPrimal>
IMCL_DEVICE void run(const Backward<T, Product, kPrimal>& work, int local) {
  using Acc = imcl::Acc<T>;
  using Operand = typename Product::Operand;
  constexpr int depth = kDepth<Operand>;
  const Layer& layer = work.layer;
  const bool is_signed = !kPrimal && layer.form == Form::kSigned;
  const bool center = work.in.call.settings.center;
  const View<T> z = work.z();
  const int edge = z.depth();  // of S
  const int tiles_p = static_cast<int>(divide_up(edge, kTile));
  const int tiles_q = static_cast<int>(divide_up(z.lanes(), kTile));
  const int in_turn = static_cast<int>(tiles_in_turn(layer));
  const int first_p = kPrimal ? local % tiles_p : 0, last_p = kPrimal ? first_p : tiles_p - 1;
  const int first_q = (kPrimal ? local / tiles_p : local) * in_turn;
  const int end_q = first_q + in_turn < tiles_q ? first_q + in_turn : tiles_q;
  // Rows of more than one tile of columns need <y, x> of all of them before any is written.
  const int passes = !kPrimal && tiles_p > 1 ? 2 : 1;

  if (kPrimal && thread() < kTile) {
    const auto state = work.state();
    const int row = first_p * kTile + thread();
    Acc sum = 0;
#pragma unroll 4
    for (int t = 0; t < tiles_p && row < edge; ++t) sum -= state.diagonals[t * state.stride + row];
    work.shared.diagonal[thread()] = sum;
  }
  __syncthreads();  // the diagonal is there for whoever stores S

  SymmetricReader<Acc, Operand> reader_s;
  PanelReader<T, Operand> reader_z;
  Product product;
  Acc along[Product::kColumns] = {};
  Position next{first_q, 0, first_p, 0};
  // One round before the first there is nothing but to load.
  for (int round = -1; true; ++round) {
    const Position at = next;
    if (at.q == end_q) break;
    const int p0 = at.p * kTile, q0 = at.q * kTile;
    uint4(&panel)[2][kPanelUnits] = work.shared.panel[round & 1];
    if (round >= 0) {
      next.k += depth;
      if (is_signed || next.k >= edge) {
        next.k = 0;
        if (next.p++ == last_p) {
          next.p = first_p;
          if (++next.pass == passes) {
            next.pass = 0;
            ++next.q;
          }
        }
      }
      if (!is_signed) {
        reader_s.store(p0, at.k, kPrimal ? work.shared.diagonal : nullptr, panel[0]);
        reader_z.store(z, q0, at.k, center, panel[1]);
        __syncthreads();
      }
    }
    if (!is_signed && next.q < end_q) {
      const auto state = work.state();
      reader_s.load(state.core, state.stride, edge, next.p * kTile, next.k);
      reader_z.load(z, next.q * kTile, next.k);
    }
    if (round < 0) continue;
    if (!is_signed) {
      if (center) {
        const Acc* means = work.state().means;
        change_panel<Operand, Operand>(panel[1], [&](Acc x, int lane, int k) {
          const int row = kPrimal ? at.k + k : q0 + lane;
          return row < layer.rows ? x - means[row] : x;
        });
        __syncthreads();
      }
      if (at.k == 0) clear(product);
      product.add(panel[0], panel[1]);
      if (at.k + depth < edge) continue;
    }
    if constexpr (kPrimal)
      work.write(p0, q0, [&](int i, int j) { return product.sum[i][j] * work.grad; });
    else work.finish(at, passes, at.p == last_p, round, product, along);
  }
}

template <class T, class Product, class FormProduct>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Product>)
    backward(IMCL_PARAMETER(PairwiseArguments) in) {
  using Acc = imcl::Acc<T>;
  IMCL_SHARED(shared, Shared<T>);
  const int program = static_cast<int>(blockIdx.x);
  const Layer& layer = layer_of(in, program);
  const int each = static_cast<int>(backward_programs(layer));
  const int local = program - layer.first_program, index = local / each;
  const Acc grad = static_cast<Acc>(in.call.is_double ? *static_cast<const double*>(in.call.grad)
                                                      : *static_cast<const float*>(in.call.grad));
  if (layer.form == Form::kPrimal)
    run(Backward<T, Product, true>{in, layer, index, grad, shared}, local % each);
  else run(Backward<T, FormProduct, false>{in, layer, index, grad, shared}, local % each);
}

template <class T, class Product, class FormProduct>
cudaError_t launch(const PairwiseCall& call, const Layer* layers, int64_t count,
                   const Dimension* dimensions, cudaStream_t stream) {
  return for_launches<PairwiseArguments>(
      call, layers, count, dimensions, backward_programs,
      [stream](const PairwiseArguments& arguments, unsigned programs) {
        const auto kernel = backward<T, Product, FormProduct>;
        IMCL_LAUNCH(kernel, programs, kThreads, 0, stream)(arguments);
      });
}

}  // namespace
}  // namespace imcl

extern "C" cudaError_t imcl_cuda_pairwise_backward(const imcl::PairwiseCall* call,
                                                   const imcl::Layer* layers, int64_t count,
                                                   const imcl::Dimension* dimensions,
                                                   cudaStream_t stream) {
  using namespace imcl;
  const auto run = [&](auto launcher) {
    return launcher(*call, layers, count, dimensions, stream);
  };
  using BFloat = TensorCore<Plain<__nv_bfloat16>>;
  // The dual and signed forms subtract nearly equal numbers: nothing coarser than float32 will do.
  using Split = TensorCore<SplitTf32>;
  switch (call->dtype) {
    case DType::kFloat64: return run(launch<double, Simt<double>, Simt<double>>);
    case DType::kBFloat16: return run(launch<__nv_bfloat16, BFloat, Split>);
    case DType::kFloat16:  // A would underflow in float16
      return run(launch<__half, TensorCore<Tf32>, Split>);
    default: break;
  }
  switch (precision_of(call->settings)) {
    case Precision::kMedium: return run(launch<float, BFloat, Simt<float>>);
    case Precision::kHigh: return run(launch<float, TensorCore<Tf32>, Simt<float>>);
    default: return run(launch<float, Simt<float>, Simt<float>>);
  }
}
