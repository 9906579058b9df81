// The Gram of the samples of one representation and its gradient, compiled once per ISA.
//
// X has B rows, the samples, of D columns, the features; m_k is the mean of column k and
// X_c = X - 1 m^T.
//
// forward   G = scale X_c X_c^T     (B, B)   the upper panels only, then mirrored
// backward  dX = S X_c              (B, D)   for the symmetric S = scale H (dG + dG^T) H,
//                                            H = I - 1 1^T/B
#include "dependence.h"
#include "pairwise_backward.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

template <class T>
Matrix<T> columns_of(const Representation& s, int64_t first, int64_t count) {
  const Matrix<T> all{static_cast<const T*>(s.x.x), s.x.row_axis, s.x.column_axis, s.x.rows,
                      s.x.columns};
  return columns_of(all, first, count);
}

// mean[k] of the columns k: rows are read one after the other where they are dense.
template <class T>
void column_means(const Matrix<T>& x, AccOf<T>* mean) {
  using Acc = AccOf<T>;
  constexpr int64_t width = kLanes<Acc>;
  if (!x.column.is_unit())
    return row_means(Matrix<T>{x.x, x.column, x.row, x.columns, x.rows}, mean);
  std::fill_n(mean, x.columns, Acc(0));
  for (int64_t i = 0; i < x.rows; ++i) {
    const T* row = x.x + x.row[i];
    int64_t k = 0;
    for (; k + width <= x.columns; k += width) store(mean + k, load(mean + k) + load_acc(row + k));
    for (; k < x.columns; ++k) mean[k] += to_acc(row[k]);
  }
  for (int64_t k = 0; k < x.columns; ++k) mean[k] /= static_cast<Acc>(x.rows);
}

// Columns whose means are taken and that are multiplied while they are in cache.
inline constexpr int64_t kGramColumns = 128;

template <class Acc>
int64_t padded_rows(const Representation& s) {
  return divide_up(s.x.rows, kPanel<Acc>) * kPanel<Acc>;
}

template <class T>
void partial_of(const Representation& s, int64_t first, int64_t count, void* partial) {
  using Acc = AccOf<T>;
  Acc* upper = static_cast<Acc*>(partial);
  for (int64_t done = 0; done < count; done += kGramColumns) {
    const Matrix<T> x = columns_of<T>(s, first + done, std::min(kGramColumns, count - done));
    Acc* mean = static_cast<Acc*>(s.mean) + first + done;
    column_means(x, mean);
    const Source<T> source{x.x, x.row, x.column, nullptr, mean};
    gram<Acc>(source, x.rows, x.columns, upper, padded_rows<Acc>(s), one_thread(), done > 0);
  }
}

template <class Acc>
void finish_gram(const Representation& s, const Acc* partials, int64_t count) {
  constexpr int64_t width = kLanes<Acc>;
  const int64_t n = s.x.rows, padded = padded_rows<Acc>(s);
  const Vec<Acc> scale = splat(static_cast<Acc>(s.x.scale));
  Acc* g = static_cast<Acc*>(s.gram);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i / width * width; j < n; j += width) {
      Vec<Acc> sum = {};
      for (int64_t p = 0; p < count; ++p) sum += load(partials + (p * padded + i) * padded + j);
      sum *= scale;
      for (int64_t v = std::max<int64_t>(0, i - j); v < std::min(width, n - j); ++v)
        g[i * n + j + v] = g[(j + v) * n + i] = sum[v];
    }
  }
}

// Columns of a product that are copied first where they lie side by side. Panel by panel a few
// bytes of many distant rows would be read, which neither the hardware foresees nor, with strides
// that are powers of two, the caches hold: the rows fall into the same few sets.
template <class T>
int64_t copied_columns(int64_t rows) {
  constexpr int64_t panel = kPanel<AccOf<T>>, kBytes = 128 * 1024, kMost = 256;
  const int64_t columns = kBytes / (std::max<int64_t>(rows, 1) * static_cast<int64_t>(sizeof(T)));
  return std::clamp(columns / panel * panel, panel, kMost);
}

template <class T>
void product_of(const Representation& s, int64_t first, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t panel = kPanel<Acc>, kLine = 64 / static_cast<int64_t>(sizeof(T));
  Backward<Acc, T> work{};
  work.dx_k = s.x.dx_row_axis;
  work.k_count = s.x.rows;
  work.grad = 1;

  const int64_t panels = divide_up(work.k_count, panel), panel_size = panel * work.depth();
  Scratch scratch;
  Acc* packed = scratch.get<Acc>(panels * panel_size);
  const Source<Acc> symmetric{
      static_cast<const Acc*>(s.gram), {1, nullptr}, {work.k_count, nullptr}};
  for (int64_t p = 0; p < panels; ++p)
    pack(symmetric, p * panel, std::min(panel, work.k_count - p * panel), 0, work.k_count,
         packed + p * panel_size);
  work.symmetric = packed;
  work.s = static_cast<const Acc*>(s.gram);

  const bool copied = s.x.column_axis.is_unit();
  const int64_t step = copied ? copied_columns<T>(s.x.rows) : count;
  const Axis copy_row{step + kLine, nullptr};  // not a power of two
  T* copy = copied ? scratch.get<T>(s.x.rows * copy_row.stride) : nullptr;
  for (int64_t at = first; at < first + count; at += step) {
    const Matrix<T> x = columns_of<T>(s, at, std::min(step, first + count - at));
    for (int64_t i = 0; copied && i < x.rows; ++i)
      std::copy_n(x.x + x.row[i], x.columns, copy + copy_row[i]);
    const Rest out = rest_of(s.x.dx_column_axis, at);
    work.x = {copied ? copy : x.x, x.column, copied ? copy_row : x.row,
              static_cast<const Acc*>(s.mean) + at};
    work.dx = static_cast<T*>(s.x.dx) + out.offset;
    work.dx_free = out.axis;
    work.free_count = x.columns;
    work.run(one_thread());
  }
}

int64_t partial_size(const Representation& s) {
  return with_type(s.x.dtype, [&](auto* x) {
    using Acc = AccOf<std::remove_pointer_t<decltype(x)>>;
    return padded_rows<Acc>(s) * padded_rows<Acc>(s) * static_cast<int64_t>(sizeof(Acc));
  });
}

void partial(const Representation& s, int64_t first, int64_t count, void* out) {
  with_type(s.x.dtype,
            [&](auto* x) { partial_of<std::remove_pointer_t<decltype(x)>>(s, first, count, out); });
}

void finish(const Representation& s, const void* partials, int64_t count) {
  with_type(s.x.dtype, [&](auto* x) {
    using Acc = AccOf<std::remove_pointer_t<decltype(x)>>;
    finish_gram(s, static_cast<const Acc*>(partials), count);
  });
}

void product(const Representation& s, int64_t first, int64_t count) {
  with_type(s.x.dtype,
            [&](auto* x) { product_of<std::remove_pointer_t<decltype(x)>>(s, first, count); });
}

}  // namespace

extern const DependenceKernels dependence_kernels;
const DependenceKernels dependence_kernels = {partial_size, partial, finish, product};

}  // namespace IMCL_ISA
}  // namespace imcl
