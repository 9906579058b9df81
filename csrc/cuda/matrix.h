// How a kernel finds and addresses its matrices: the layers of a launch.
#pragma once

#include "operand.h"
#include "pairwise.h"

// That a kernel takes here; devices and drivers of today allow 32764, but a driver that was given
// more than these in a graph is known to end in a segmentation fault (openxla/xla#19252), and each
// launch copies all of them. Room for some 20 layers.
#define IMCL_PARAMETER_BYTES 4096

namespace imcl {

constexpr int kThreads = 128;  // of a block

enum Side { kInput, kGradient };  // which of a layer's two tensors

// What a kernel is passed by value: the call, and those of its layers that fit.
template <class Call_, class Each_>
struct LaunchArguments {
  using Call = Call_;
  using Each = Each_;
  static constexpr int kDimensions = 64;
  static constexpr int kLayers = (IMCL_PARAMETER_BYTES - static_cast<int>(sizeof(Call)) - 8 -
                                  kDimensions * static_cast<int>(sizeof(Dimension))) /
                                 static_cast<int>(sizeof(Each));

  Call call;  // first_program is the launch's
  int32_t count;
  Dimension dimensions[kDimensions];
  Each layers[kLayers];
};
struct PairwiseArguments : LaunchArguments<PairwiseCall, Layer> {};
static_assert(sizeof(PairwiseArguments) <= IMCL_PARAMETER_BYTES);

// Fills launches with layers and calls launch(arguments, programs) for each.
template <class Arguments, class Programs, class Launch>
cudaError_t for_launches(const typename Arguments::Call& call,
                         const typename Arguments::Each* layers, int64_t count,
                         const Dimension* dimensions, const Programs& programs_of,
                         const Launch& launch) {
  Arguments arguments;
  arguments.call = call;
  for (int64_t i = 0; i < count;) {
    int64_t programs = 0;
    int used = 0;
    for (arguments.count = 0; i < count && arguments.count < Arguments::kLayers; ++i) {
      typename Arguments::Each layer = layers[i];
      const int64_t more = layer.batch * programs_of(layer);
      if (more == 0) continue;
      if (more > INT32_MAX || layer.dimensions > Arguments::kDimensions)
        return cudaErrorInvalidValue;
      if (programs + more > INT32_MAX || used + layer.dimensions > Arguments::kDimensions) break;
      for (int d = 0; d < layer.dimensions; ++d)
        arguments.dimensions[used + d] = dimensions[layer.first_dimension + d];
      layer.first_dimension = used;
      layer.first_program = static_cast<int32_t>(programs);
      used += layer.dimensions;
      programs += more;
      arguments.layers[arguments.count++] = layer;
    }
    if (programs == 0) continue;
    launch(arguments, static_cast<unsigned>(programs));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    arguments.call.first_program += programs;
  }
  return cudaSuccess;
}

// How products of float32 are taken. Centred ones are nothing coarser than TensorFloat-32,
// whose numbers take as much room as the unrounded ones.
inline Precision precision_of(const PairwiseSettings& settings) {
  const bool medium = settings.precision == Precision::kMedium;
  return medium && settings.center ? Precision::kHigh : settings.precision;
}

// The same number, of which the compiler knows nothing: what it makes of it for one form it won't
// keep in registers for the others.
IMCL_DEVICE int opaque(int x) {
#if !defined(IMCL_CUDA_ON_CPU)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The layer whose program this is.
template <class Arguments>
IMCL_DEVICE const typename Arguments::Each& layer_of(const Arguments& in, int program) {
  int low = 0, high = in.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (in.layers[middle].first_program <= program) low = middle;
    else high = middle - 1;
  }
  return in.layers[low];
}

// One matrix, of x or of dx. What describes it is read where it lies, in constant memory, and
// takes no registers.
template <class T>
struct Matrix {
  const Dimension* dimensions;  // of all layers
  const Layer& layer;
  Side side;
  T* data;

  template <class Arguments>
  IMCL_DEVICE Matrix(const Arguments& in, const Layer& layer, Side side, T* base, int64_t index)
      : dimensions(in.dimensions),
        layer(layer),
        side(side),
        data(base + index * layer.batch_stride[side]) {}

  IMCL_DEVICE int rows() const { return layer.rows; }
  IMCL_DEVICE int columns() const { return layer.columns; }
  IMCL_DEVICE int64_t row_stride() const { return layer.row_stride[side]; }
  IMCL_DEVICE int64_t column_stride() const { return layer.column_stride[side]; }
  IMCL_DEVICE bool vectors() const {
    return layer.access[side] == Access::kColumnVectors ||
           layer.access[side] == Access::kRowVectors;
  }
  IMCL_DEVICE bool along_rows() const {
    return layer.access[side] == Access::kRows || layer.access[side] == Access::kRowVectors;
  }

  IMCL_DEVICE int64_t column_offset(int j) const {
    if (layer.dimensions == 0) return j * layer.column_stride[side];
    int64_t offset = 0;
#pragma unroll 1
    for (int d = layer.dimensions - 1; d >= 0; --d) {
      const Dimension& dimension = dimensions[layer.first_dimension + d];
      offset += j % dimension.size * dimension.stride[side];
      j /= dimension.size;
    }
    return offset;
  }
  IMCL_DEVICE T& at(int i, int j) const { return data[i * row_stride() + column_offset(j)]; }
};

// What is kept of one matrix; see state_size.
template <class Acc>
struct State {
  Acc *core, *diagonals, *inverse, *means;  // diagonals: primal only; inverse: the others
  int64_t stride;                           // of the rows of core and of diagonals

  IMCL_DEVICE State(const PairwiseArguments& in, const Layer& layer, int64_t index) {
    const bool primal = layer.form == Form::kPrimal;
    const int64_t rows = padded(layer.rows);
    stride = primal ? rows : padded(layer.columns);
    core = static_cast<Acc*>(in.call.state);
    if (!core) {
      diagonals = inverse = means = nullptr;
      return;
    }
    core += layer.state +
            index * state_size(layer.form, in.call.settings.center, layer.rows, layer.columns);
    inverse = diagonals = core + (primal                      ? layer.rows * stride
                                  : layer.form == Form::kDual ? layer.columns * stride
                                                              : stride);
    means = inverse + (primal ? divide_up(layer.rows, kTile) * stride : rows);
  }
};

// A thread's number, and the compiler's knowledge of how large it can be.
IMCL_DEVICE int thread() { return static_cast<int>(threadIdx.x % kThreads); }

// The penalty's factor 1/(layers * batch * rows * (rows - 1)).
IMCL_DEVICE double scale_of(const PairwiseArguments& in, const Layer& layer) {
  const double n = layer.rows;
  return 1.0 / (static_cast<double>(in.call.layers) * layer.batch * n * (n - 1));
}

}  // namespace imcl
