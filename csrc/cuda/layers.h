// Tensors as the kernels of matrices take them: (batch, rows, columns) whose columns, if they
// lie in any regular way, collapse into one dimension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../tensors.h"
#include "dependence.h"
#include "pairwise.h"

namespace imcl {

// The layers of one dtype, in the order of the tensors.
template <class Each>
struct Typed {
  ScalarType dtype;
  const Tensor* first;  // of its tensors
  std::vector<Each> layers;
  std::vector<Dimension> dimensions;
  int64_t state_size = 0, forward_programs = 0;
};
using TypedLayers = Typed<Layer>;
using TypedGramLayers = Typed<GramLayer>;

// A tensor (B, N, *) or (N, *), and its gradient where there is one, but for their data.
//
// The columns are taken in the order of their strides: nothing depends on their order, as long
// as x and dx agree, and more dimensions then collapse.
inline Layer layer_of(const Tensor& x, const Tensor* dx, bool batched,
                      std::vector<Dimension>& dimensions) {
  const int64_t row = batched ? 1 : 0;
  STD_TORCH_CHECK(x.dim() > row, "xs: expected (B, N, *) or (N, *)");
  const Tensor* const sides[] = {&x, dx ? dx : &x};
  Layer layer{};
  layer.batch = batched ? static_cast<int32_t>(x.size(0)) : 1;
  layer.rows = static_cast<int32_t>(x.size(row));
  std::vector<Dimension> all;
  int64_t columns = 1;
  for (int64_t d = row + 1; d < x.dim(); ++d) {
    columns *= x.size(d);
    if (x.size(d) != 1)
      all.push_back({static_cast<int32_t>(x.size(d)), {sides[0]->stride(d), sides[1]->stride(d)}});
  }
  constexpr int64_t kMost = int64_t{1} << 30;  // indices of rows and columns are int32
  STD_TORCH_CHECK(
      layer.batch == (batched ? x.size(0) : 1) && x.size(row) <= kMost && columns <= kMost,
      "xs: expected at most 2^30 rows and columns for the CUDA kernel, got ", x.size(row), " and ",
      columns, "; pass impl=\"torch\"");
  layer.columns = static_cast<int32_t>(columns);
  std::stable_sort(all.begin(), all.end(), [](const Dimension& a, const Dimension& b) {
    return a.stride[0] != b.stride[0] ? a.stride[0] > b.stride[0] : a.stride[1] > b.stride[1];
  });
  std::vector<Dimension> collapsed;
  for (const Dimension& d : all) {
    if (!collapsed.empty() && collapsed.back().stride[0] == d.size * d.stride[0] &&
        collapsed.back().stride[1] == d.size * d.stride[1]) {
      collapsed.back() = {collapsed.back().size * d.size, {d.stride[0], d.stride[1]}};
    } else {
      collapsed.push_back(d);
    }
  }
  for (int side = 0; side < 2; ++side) {
    layer.batch_stride[side] = layer.batch > 1 ? sides[side]->stride(0) : 0;
    layer.row_stride[side] = sides[side]->stride(row);
    layer.column_stride[side] = collapsed.empty() ? 0 : collapsed.back().stride[side];
    layer.access[side] = access_of(sides[side]->const_data_ptr(), x.element_size(), layer, side,
                                   collapsed.size() <= 1);
  }
  if (collapsed.size() > 1) {
    layer.first_dimension = static_cast<int32_t>(dimensions.size());
    layer.dimensions = static_cast<int16_t>(collapsed.size());
    dimensions.insert(dimensions.end(), collapsed.begin(), collapsed.end());
  }
  return layer;
}

// All layers by dtype, in the order in which the dtypes first appear; dxs may be null. What else a
// kernel wants to know of tensor i is filled in by complete(type, layer, i).
template <class Each, class Complete>
std::vector<Typed<Each>> by_dtype(const std::vector<Tensor>& xs, const std::vector<Tensor>* dxs,
                                  bool batched, const Complete& complete) {
  std::vector<Typed<Each>> types;
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const Tensor& x = xs[i];
    auto type = std::find_if(types.begin(), types.end(), [&](const Typed<Each>& each) {
      return each.dtype == x.scalar_type();
    });
    if (type == types.end()) {
      types.push_back({});
      type = types.end() - 1;
      type->dtype = x.scalar_type();
      type->first = &x;
    }
    Each each{};
    static_cast<Layer&>(each) = layer_of(x, dxs ? &(*dxs)[i] : nullptr, batched, type->dimensions);
    each.x = x.const_data_ptr();
    if (dxs) each.dx = (*dxs)[i].mutable_data_ptr();
    complete(*type, each, i);
    type->layers.push_back(each);
  }
  return types;
}

// How long a block of the forward takes: columns of a tile of the primal form, or as many rows
// of 64.
inline int64_t length_of(const Layer& layer) {
  if (layer.form == Form::kPrimal) return layer.columns;
  return int64_t{layer.rows} * layer.columns / kTile;
}

inline std::vector<TypedLayers> layers_by_dtype(const std::vector<Tensor>& xs,
                                                const std::vector<Tensor>* dxs,
                                                const PairwiseSettings& settings, bool batched) {
  auto types = by_dtype<Layer>(xs, dxs, batched, [&](TypedLayers& type, Layer& layer, std::size_t) {
    layer.form = form_of(settings.penalty, layer.rows, layer.columns);
    layer.state = type.state_size;
    type.state_size +=
        layer.batch * state_size(layer.form, settings.center, layer.rows, layer.columns);
    type.forward_programs += layer.batch * forward_programs(layer);
  });
  // The blocks that take longest begin first: none is left to run alone in the end.
  for (TypedLayers& type : types)
    std::stable_sort(type.layers.begin(), type.layers.end(),
                     [](const Layer& a, const Layer& b) { return length_of(a) > length_of(b); });
  return types;
}

// Without scales, which are the forward's.
inline std::vector<TypedGramLayers> gram_layers_by_dtype(const std::vector<Tensor>& xs,
                                                         const std::vector<Tensor>* dxs,
                                                         const std::vector<double>* scale) {
  return by_dtype<GramLayer>(xs, dxs, false,
                             [&](TypedGramLayers& type, GramLayer& layer, std::size_t i) {
                               layer.place = static_cast<int32_t>(i);
                               layer.scale = scale ? (*scale)[i] : 1;
                               layer.state = type.state_size;
                               type.state_size += padded(layer.columns);
                             });
}

// All Grams, or what takes their place: a layer of n matrices.
inline Layer grams_layer(const Tensor& grams) {
  Layer layer{};
  layer.x = grams.const_data_ptr();
  layer.batch = static_cast<int32_t>(grams.size(0));
  layer.rows = static_cast<int32_t>(grams.size(1));
  layer.columns = layer.rows;
  for (int side = 0; side < 2; ++side) {
    layer.batch_stride[side] = grams.stride(0);
    layer.row_stride[side] = grams.stride(1);
    layer.column_stride[side] = 1;
    layer.access[side] = access_of(layer.x, grams.element_size(), layer, side, true);
  }
  return layer;
}

}  // namespace imcl
