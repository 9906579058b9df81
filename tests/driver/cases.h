// Cases for the kernels of any device: their memory, and what plain loops in double make of it.
//
// Every buffer is a heap allocation of exactly the bytes its layout reaches, so that
// AddressSanitizer sees any overrun. Outputs, and the gaps between strided elements, are
// filled with a NaN that no arithmetic makes: an output that keeps it was not written, a gap
// that loses it was.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/types.h"
#include "../../csrc/problem.h"

using imcl::Axis;
using imcl::Divergence;
using imcl::DType;
using imcl::Form;
using imcl::Penalty;
using imcl::Precision;
using imcl::Reduction;
using imcl::Teacher;

namespace {

// All bits set are a NaN in each of the four dtypes, and no index or pointer either.
constexpr int kPoison = 0xff;

std::string doing;  // the case under way

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  std::fprintf(stderr, "FAILED: %s: ", doing.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::exit(1);
}

// The same numbers on every machine, which the standard's distributions don't promise.
struct Random {
  uint64_t state;

  double operator()() {  // in [-1, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state >> 11) * 0x1p-52 - 1;
  }
};

std::size_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

DType acc_of(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

const char* name_of(DType dtype) {
  return dtype == DType::kFloat64    ? "float64"
         : dtype == DType::kFloat32  ? "float32"
         : dtype == DType::kBFloat16 ? "bfloat16"
                                     : "float16";
}

// Relative distance of 1 from the next number.
double epsilon_of(DType dtype) {
  return dtype == DType::kFloat64    ? 0x1p-52
         : dtype == DType::kFloat32  ? 0x1p-23
         : dtype == DType::kBFloat16 ? 0x1p-7
                                     : 0x1p-10;
}

// The rounding of what is accumulated in this dtype. The loops here round as float64 does, so
// that it is allowed some hundred times its own.
double unit_of(DType acc) { return acc == DType::kFloat64 ? 1e-13 : epsilon_of(acc); }

// Elements of one dtype in an allocation of exactly their size, poisoned at first.
class Buffer {
 public:
  explicit Buffer(DType dtype = DType::kFloat32, int64_t count = 0)
      : dtype_(dtype), count_(count), data_(new char[bytes()]) {
    std::memset(data(), kPoison, bytes());
  }

  void* data() const { return data_.get(); }
  int64_t count() const { return count_; }
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * bytes_of(dtype_); }
  bool poisoned(int64_t i) const {
    constexpr int64_t set = -1;
    return !std::memcmp(at(i), &set, bytes_of(dtype_));
  }
  bool same_bits(const Buffer& other) const {
    return bytes() == other.bytes() && !std::memcmp(data(), other.data(), bytes());
  }
  Buffer copy() const {
    Buffer result(dtype_, count_);
    std::memcpy(result.data(), data(), bytes());
    return result;
  }

  double get(int64_t i) const {
    if (dtype_ == DType::kFloat64) return read<double>(i);
    if (dtype_ == DType::kFloat32) return static_cast<double>(read<float>(i));
    const uint32_t half = read<uint16_t>(i);
    if (dtype_ == DType::kBFloat16) {
      const uint32_t bits = half << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return static_cast<double>(value);
    }
    const int exponent = static_cast<int>(half >> 10 & 31), mantissa = half & 1023;
    const double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
    return sign *
           (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }

  // The value rounded to the dtype; it must be small enough not to overflow.
  void set(int64_t i, double value) {
    if (dtype_ == DType::kFloat64) return write(i, value);
    if (dtype_ == DType::kFloat32) return write(i, static_cast<float>(value));
    if (dtype_ == DType::kBFloat16) {
      const float rounded = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      return write(i, static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
    }
    const double size = std::fabs(value);
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    // The mantissa's leading 1, where there is one, adds 1 to the exponent before it.
    const int bits =
        ((exponent + 14) << 10) + static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    write(i, static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0)));
  }

 private:
  char* at(int64_t i) const { return data_.get() + static_cast<std::size_t>(i) * bytes_of(dtype_); }
  template <class T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, at(i), sizeof value);
    return value;
  }
  template <class T>
  void write(int64_t i, T value) {
    std::memcpy(at(i), &value, sizeof value);
  }

  DType dtype_;
  int64_t count_;
  std::unique_ptr<char[]> data_;
};

// Where the elements of a (batch, rows, columns) tensor lie.
enum Layout { kRows, kColumns, kRowTable, kColumnTable, kBothTables, kGaps, kExpanded, kLayouts };
[[maybe_unused]] const char* const kLayoutNames[] = {
    "NCHW", "channels last", "NCHW sliced", "channels last sliced", "tables", "gaps", "expanded"};

struct Placed {
  Axis batch, row, column;
  int64_t reach = 0;  // elements
  std::vector<int64_t> row_table, column_table;

  // Columns in dimensions of these sizes and strides, the last of which runs fastest.
  struct Dimension {
    int64_t size, stride;
  };
  Placed(int64_t batch_stride, int64_t row_stride, const std::vector<Dimension>& dimensions,
         int64_t batches, int64_t rows) {
    column_table = {0};
    for (const Dimension& dimension : dimensions) {
      std::vector<int64_t> longer;
      for (const int64_t before : column_table)
        for (int64_t i = 0; i < dimension.size; ++i)
          longer.push_back(before + i * dimension.stride);
      column_table = longer;
    }
    batch = {batch_stride, nullptr};
    row = {row_stride, nullptr};
    column = {0, column_table.data()};
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t i = 0; i < rows; ++i)
        for (const int64_t at : column_table) reach = std::max(reach, batch[b] + row[i] + at + 1);
  }

  Placed(Layout layout, int64_t batches, int64_t rows, int64_t columns) {
    // A sliced image: five columns of every seven.
    const auto sliced = [](int64_t i) { return i / 5 * 7 + i % 5; };
    row = {columns, nullptr};
    column = {1, nullptr};
    if (layout == kColumns) {
      row.stride = 1;
      column.stride = rows;
    } else if (layout == kGaps) {
      column.stride = 2;
      row.stride = 2 * columns + 3;
    } else if (layout == kExpanded) {
      row.stride = 0;  // one row stands for all: inputs only
    } else if (layout != kRows) {
      row.stride = layout == kColumnTable ? 1 : sliced(columns) + 1;
      const int64_t step = layout == kColumnTable ? rows : 1;
      for (int64_t j = 0; j < columns; ++j) column_table.push_back(sliced(j) * step);
      column.table = column_table.data();
    }
    if (layout == kBothTables) {
      // Tables needn't be in order: the rows lie the other way round.
      for (int64_t i = 0; i < rows; ++i) row_table.push_back((rows - 1 - i) * row.stride);
      row.table = row_table.data();
    }
    int64_t last = 0;
    batch = {0, nullptr};
    if (batches * rows * columns == 0) return;
    for (int64_t i : {int64_t{0}, rows - 1})
      for (int64_t j : {int64_t{0}, columns - 1}) last = std::max(last, row[i] + column[j]);
    batch = {last + (layout == kGaps ? 6 : 1), nullptr};
    reach = (batches - 1) * batch.stride + last + 1;
  }
  Placed(const Placed&) = delete;

  int64_t operator()(int64_t b, int64_t i, int64_t j) const {
    return batch[b] + row[i] + column[j];
  }
};

// Every element that the layout reaches was written, and every other one left alone.
template <class Offsets>
void check_written(const char* what, const Buffer& out, int64_t reach, const Offsets& offsets) {
  std::vector<bool> covered(static_cast<std::size_t>(reach));
  offsets([&](int64_t at) { covered[static_cast<std::size_t>(at)] = true; });
  for (int64_t at = 0; at < reach; ++at) {
    if (covered[static_cast<std::size_t>(at)] != out.poisoned(at)) continue;
    fail("%s: element %lld was %s", what, static_cast<long long>(at),
         out.poisoned(at) ? "not written" : "written, though it is no part of the tensor");
  }
}

struct Tally {
  int64_t cases = 0;
  double worst = 0;                       // error, in parts of what is allowed
  uint64_t bits = 14695981039346656037u;  // FNV-1a of what was handed to hash()

  void hash(const void* data, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i)
      bits = (bits ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  }
};

void compare(Tally& tally, const char* what, int64_t at, double got, double expected,
             double allowed) {
  if (std::isnan(expected) && std::isnan(got)) return;
  const double error = std::fabs(got - expected);
  if (!(error <= allowed))
    fail("%s %lld: got %.9g, expected %.9g, off by %.3g where %.3g is allowed", what,
         static_cast<long long>(at), got, expected, error, allowed);
  if (allowed > 0) tally.worst = std::max(tally.worst, error / allowed);
}

// ---- The pairwise penalty --------------------------------------------------------------

struct Shape {
  int64_t batch, rows, columns;
};

// Strides of a tensor, and of the dimensions of its columns.
struct Strides {
  int64_t batch, row;
  std::vector<Placed::Dimension> columns;
};

// One tensor of a case: its memory, and what the loops in double make of it.
struct Tensor {
  Shape shape;
  Placed in, out;
  Buffer x, before;
  double scale;
  double loss = 0, loss_bound = 0;        // bounds are in roundings
  std::vector<double> dx, bound, unsure;  // (batch, rows, columns), (batch, rows) twice

  Tensor(DType dtype, const Shape& s, Layout layout, Layout out_layout, Random& random)
      : shape(s),
        in(layout, s.batch, s.rows, s.columns),
        out(out_layout, s.batch, s.rows, s.columns),
        x(dtype, in.reach),
        scale(1.0 / static_cast<double>(s.rows)) {
    fill(random);
  }

  Tensor(DType dtype, const Shape& s, const Strides& from, const Strides& to, double factor,
         Random& random)
      : shape(s),
        in(from.batch, from.row, from.columns, s.batch, s.rows),
        out(to.batch, to.row, to.columns, s.batch, s.rows),
        x(dtype, in.reach),
        scale(factor) {
    fill(random);
  }

  void fill(Random& random) {
    const Shape& s = shape;
    const double offset = 0.25 * random();
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < s.columns; ++j)  // every seventh row is dead
          x.set(in(b, i, j), i % 7 == 5 ? 0.0 : random() + offset);
    before = x.copy();
  }

  // c_ij = <u_i, u_j>, u_i = x_i/n_i; dx_i = (g_i - <g_i, u_i> u_i)/n_i where
  // g_i = 2 scale sum_j phi'(c_ij) u_j. A cosine carries a rounding of 1, not of itself.
  void expect(Penalty penalty, bool center, double eps, double grad, double sign_unsure) {
    const auto n = static_cast<std::size_t>(shape.rows),
               d = static_cast<std::size_t>(shape.columns);
    loss = loss_bound = 0;
    dx.clear(), bound.clear(), unsure.clear();
    std::vector<double> u(n * d), inverse(n), largest(n), g(d);
    for (int64_t b = 0; b < shape.batch; ++b) {
      double condition = 1;  // what centring loses
      for (std::size_t i = 0; i < n; ++i) {
        double* row = u.data() + i * d;
        double mean = 0, raw = 0, square = 0;
        for (std::size_t j = 0; j < d; ++j) {
          row[j] = x.get(in(b, static_cast<int64_t>(i), static_cast<int64_t>(j)));
          mean += row[j] / static_cast<double>(d);
          raw += row[j] * row[j];
        }
        if (!center) mean = 0;
        for (std::size_t j = 0; j < d; ++j) square += (row[j] - mean) * (row[j] - mean);
        const double limit = center ? std::max(eps, 1e-5 * std::sqrt(raw)) : eps;
        inverse[i] = std::sqrt(square) <= limit ? 0 : 1 / std::sqrt(square);
        condition = std::max(condition, std::sqrt(raw) * inverse[i]);
        largest[i] = 0;
        for (std::size_t j = 0; j < d; ++j) {
          row[j] = (row[j] - mean) * inverse[i];
          largest[i] = std::max(largest[i], std::fabs(row[j]));
        }
      }
      for (std::size_t i = 0; i < n; ++i) {
        std::fill(g.begin(), g.end(), 0.0);
        double along = 0, weights = 1, reach = largest[i], doubt = 0;
        for (std::size_t k = 0; k < n; ++k) {
          if (k == i || inverse[i] == 0 || inverse[k] == 0) continue;
          double c = 0;
          for (std::size_t j = 0; j < d; ++j) c += u[i * d + j] * u[k * d + j];
          const double value = penalty == Penalty::kSquare ? c * c
                               : penalty == Penalty::kAbs  ? std::fabs(c)
                                                           : c;
          const double slope = penalty == Penalty::kSquare ? 2 * c
                               : penalty == Penalty::kAbs  ? (c > 0) - (c < 0)
                                                           : 1.0;
          loss += scale * value;
          loss_bound += scale * (std::fabs(value) + (std::fabs(slope) + 0.1) * condition);
          along += slope * c;
          weights += std::fabs(slope * c);
          reach += (std::fabs(slope) + 2) * condition * largest[k];
          if (penalty == Penalty::kAbs && std::fabs(c) < sign_unsure * condition)
            doubt += 2 * largest[k];
          for (std::size_t j = 0; j < d; ++j) g[j] += slope * u[k * d + j];
        }
        loss_bound += scale;  // the diagonal, which two of the forms subtract
        const double factor = 2 * scale * inverse[i] * grad;
        for (std::size_t j = 0; j < d; ++j) dx.push_back(factor * (g[j] - along * u[i * d + j]));
        bound.push_back(factor * (reach + weights * condition * largest[i]));
        unsure.push_back(factor * doubt);
      }
    }
  }

  // That `got` is the gradient, up to some roundings to `unit`, and x as it was.
  void check(Tally& tally, const Buffer& got, DType dtype, double unit) const {
    if (!x.same_bits(before)) fail("an input was written");
    check_written("gradient", got, out.reach, [&](auto cover) {
      for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t r = 0; r < shape.rows; ++r)
          for (int64_t c = 0; c < shape.columns; ++c) cover(out(b, r, c));
    });
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t r = 0; r < shape.rows; ++r) {
        const auto row = static_cast<std::size_t>(b * shape.rows + r);
        for (int64_t c = 0; c < shape.columns; ++c) {
          const int64_t at = static_cast<int64_t>(row) * shape.columns + c;
          const double expected = dx[static_cast<std::size_t>(at)];
          const double allowed = 16 * unit * bound[row] + unsure[row] +
                                 epsilon_of(dtype) * std::fabs(expected) +
                                 (dtype == DType::kFloat16 ? 0x1p-24 : 0.0);
          // The gradient of a dead row is 0 exactly.
          compare(tally, "gradient", at, got.get(out(b, r, c)), expected,
                  bound[row] == 0 ? 0 : allowed);
        }
      }
  }
};

// ---- Grams of samples ------------------------------------------------------------------

// A random symmetric matrix, in place of what comes back to a Gram.
void fill_symmetric(Buffer& s, int64_t first, int64_t n, Random& random) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) {
      s.set(first + i * n + j, random());
      s.set(first + j * n + i, s.get(first + i * n + j));
    }
}

// That scale X_a X_a^T lies in `grams`, and S X_a in dx, where X_a is X less the means of its
// columns over the first rows, `of` at most. Both (n, n) matrices begin at `first`.
void check_gram(Tally& tally, const Tensor& t, DType dtype, int64_t of, const Buffer& grams,
                const Buffer& s, int64_t first, const Buffer& dx) {
  const double unit = unit_of(acc_of(dtype));
  const int64_t n = t.shape.rows, d = t.shape.columns;
  check_written("gradient", dx, t.out.reach, [&](auto cover) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < d; ++k) cover(t.out(0, i, k));
  });
  const auto x = [&](int64_t i, int64_t k) { return t.x.get(t.in(0, i, k)); };
  of = std::min(of, n);
  std::vector<double> mean(static_cast<std::size_t>(d)), size(static_cast<std::size_t>(d));
  for (int64_t k = 0; k < d; ++k)
    for (int64_t i = 0; i < of; ++i) {
      mean[static_cast<std::size_t>(k)] += x(i, k) / static_cast<double>(of);
      size[static_cast<std::size_t>(k)] += std::fabs(x(i, k)) / static_cast<double>(of);
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double expected = 0, bound = 0;
      for (int64_t k = 0; k < d; ++k) {
        const double m = mean[static_cast<std::size_t>(k)], all = size[static_cast<std::size_t>(k)];
        expected += t.scale * (x(i, k) - m) * (x(j, k) - m);
        bound += t.scale * (std::fabs(x(i, k)) + all) * (std::fabs(x(j, k)) + all);
      }
      compare(tally, "gram", i * n + j, grams.get(first + i * n + j), expected, 16 * unit * bound);
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d; ++k) {
      double expected = 0, bound = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double each = s.get(first + i * n + j);
        expected += each * (x(j, k) - mean[static_cast<std::size_t>(k)]);
        bound += std::fabs(each) * (std::fabs(x(j, k)) + size[static_cast<std::size_t>(k)]);
      }
      compare(tally, "gradient", i * d + k, dx.get(t.out(0, i, k)), expected,
              16 * unit * bound + epsilon_of(dtype) * std::fabs(expected) +
                  (dtype == DType::kFloat16 ? 0x1p-24 : 0.0));
    }
  if (!t.x.same_bits(t.before)) fail("an input was written");
}

// ---- Collaborative consistency ---------------------------------------------------------

struct GroupSpec {
  int64_t size;
  double temperature;
  Teacher teacher;
  bool detach;
  Divergence divergence = Divergence::kKl;
};

struct ConsistencySpec {
  DType dtype;
  int64_t batch, classes;
  std::vector<GroupSpec> groups;
  bool target, ignored, out_of_range;
  double smoothing;
  int64_t z_class, dz_class;  // strides
  Reduction reduction;
  // Probabilities in place of indices; weights of the classes, and of the samples.
  bool probabilities = false, weighted = false, shared = false;
  int64_t pixels = 0;   // dense: images of so many, (images, classes, pixels), whose sum is batch
  bool binary = false;  // the second class is nowhere
};

constexpr int64_t kIgnored = -100;

// The case's memory, and what the loops in double make of it.
class ConsistencyCase {
 public:
  ConsistencyCase(const ConsistencySpec& spec, Random& random) : spec_(spec) {
    for (const GroupSpec& g : spec.groups) heads_ += g.size;
    // A stride other than 1 comes with gaps between the rows too.
    z_row_ = spec.classes * spec.z_class + (spec.z_class > 1 ? 3 : 0);
    dz_row_ = spec.classes * spec.dz_class + (spec.dz_class > 1 ? 5 : 0);
    for (int64_t h = 0; h < heads_; ++h) {
      z_.emplace_back(spec.dtype, reach(z_row_, spec.z_class));
      for (int64_t b = 0; b < spec.batch; ++b)
        for (int64_t k = 0; k < spec.classes; ++k) z_.back().set(z_at(b, k), 4 * random());
      z_before_.push_back(z_.back().copy());
      ce_weight_.push_back(1.25 + random());
      kl_weight_.push_back(h % 5 == 4 ? 0 : 1.25 + random());
    }
    const auto classes = static_cast<std::size_t>(spec.classes);
    const auto batch = static_cast<std::size_t>(spec.batch);
    if (spec.probabilities)
      for (std::size_t i = 0; i < batch * classes; ++i) probabilities_.push_back(1 + random());
    if (spec.weighted)
      for (std::size_t k = 0; k < classes; ++k) weight_.push_back(k % 4 == 3 ? 0 : 1.25 + random());
    if (spec.shared)
      for (std::size_t b = 0; b < batch; ++b) share_.push_back(b % 5 == 2 ? 0 : 1.25 + random());
    given_.push_back(numbers(probabilities_, 3));
    given_.push_back(numbers(weight_, 2));
    given_.push_back(numbers(share_, 2));
    if (spec.target && !spec.probabilities) {
      target_.reset(new int64_t[static_cast<std::size_t>(spec.batch ? 2 * spec.batch - 1 : 0)]);
      for (int64_t b = 0; b < spec.batch; ++b) {
        int64_t& y = target_[static_cast<std::size_t>(2 * b)];
        y = b == 0 ? spec.classes - 1 : (7 * b + 3) % spec.classes;
        if (spec.ignored && b % 3 == 1) y = kIgnored;
        // One before and one beyond the classes: reading there would be an overrun.
        if (spec.out_of_range && b % 4 == 2) y = b % 8 == 2 ? spec.classes : -1;
        if (2 * b + 1 < 2 * spec.batch - 1) target_[static_cast<std::size_t>(2 * b + 1)] = 1 << 30;
      }
    }
    expect();
  }

  // Runs it by call(problem, reduction, losses, terms, way), which may put one loss in place of
  // all samples'; several `ways` to run it must give the same bits.
  template <class Call>
  void run(Tally& tally, int ways, const Call& call) const {
    std::vector<Result> with(static_cast<std::size_t>(ways));
    Result without;
    for (int way = 0; way < ways; ++way) fill(true, with[static_cast<std::size_t>(way)], way, call);
    fill(false, without, ways - 1, call);
    const Result& first = with[0];
    if (!first.losses.same_bits(without.losses) || !first.terms.same_bits(without.terms)) {
      // Without a gradient nothing is kept; only rounding may differ.
      check_values(tally, without);
    }
    for (const Result& other : with)
      if (!first.losses.same_bits(other.losses) || !first.terms.same_bits(other.terms))
        fail("loss or terms depend on how the work is shared out");
    check_values(tally, first);
    for (int64_t h = 0; h < heads_; ++h) {
      const auto head = static_cast<std::size_t>(h);
      if (!z_[head].same_bits(z_before_[head])) fail("the logits of head %zu were written", head);
      const Buffer& dz = first.dz[head];
      for (const Result& other : with)
        if (!dz.same_bits(other.dz[head]))
          fail("the gradient depends on how the work is shared out");
      check_written("gradient", dz, reach(dz_row_, spec_.dz_class), [&](auto cover) {
        for (int64_t b = 0; b < spec_.batch; ++b)
          for (int64_t k = 0; k < (spec_.binary ? 1 : spec_.classes); ++k) cover(dz_at(b, k));
      });
      for (int64_t b = 0; valued() && b < spec_.batch; ++b)
        for (int64_t k = 0; k < spec_.classes; ++k) {
          const int64_t at = (h * spec_.batch + b) * spec_.classes + k;
          const double expected = dz_[static_cast<std::size_t>(at)];
          compare(
              tally, "gradient", at, dz.get(dz_at(b, k)), expected,
              unit() * dz_bound_[static_cast<std::size_t>(at)] + kept_unit() * std::abs(expected));
        }
    }
    ++tally.cases;
  }

 private:
  struct Result {
    std::vector<Buffer> dz;
    Buffer losses, terms;
  };

  // Whether it is known here what comes out: tests/test_divergences.py looks at the others.
  bool valued() const {
    bool all = !spec_.binary;
    for (const GroupSpec& g : spec_.groups) all = all && g.divergence == Divergence::kKl;
    return all;
  }

  double unit() const { return 16 * unit_of(acc_of(spec_.dtype)); }
  // What a gradient is off by that was rounded to be kept.
  double kept_unit() const {
    const DType kept = imcl::kept_type(spec_.dtype);
    return kept == acc_of(spec_.dtype) ? 0 : epsilon_of(kept) / 2;
  }
  int64_t z_at(int64_t b, int64_t k) const {
    return spec_.pixels ? dense_at(b, k) : b * z_row_ + k * spec_.z_class;
  }
  int64_t dz_at(int64_t b, int64_t k) const {
    return spec_.pixels ? dense_at(b, k) : b * dz_row_ + k * spec_.dz_class;
  }
  int64_t dense_at(int64_t b, int64_t k) const {
    return (b / spec_.pixels * spec_.classes + k) * spec_.pixels + b % spec_.pixels;
  }
  int64_t reach(int64_t row, int64_t stride) const {
    if (spec_.pixels) return spec_.batch * spec_.classes;
    return spec_.batch ? (spec_.batch - 1) * row + (spec_.classes - 1) * stride + 1 : 0;
  }

  // Numbers a stride apart in the accumulation type; what is read back is what is expected.
  Buffer numbers(std::vector<double>& values, int64_t stride) const {
    const auto count = static_cast<int64_t>(values.size());
    Buffer buffer(acc_of(spec_.dtype), count ? (count - 1) * stride + 1 : 0);
    for (int64_t i = 0; i < count; ++i) {
      double& value = values[static_cast<std::size_t>(i)];
      buffer.set(i * stride, value);
      value = buffer.get(i * stride);
    }
    return buffer;
  }

  template <class Call>
  void fill(bool wants_gradient, Result& out, int way, const Call& call) const {
    imcl::Consistency problem{};
    problem.dtype = spec_.dtype;
    problem.batch = spec_.batch;
    problem.classes = spec_.classes;
    problem.binary = spec_.binary;
    const int64_t pixels = spec_.pixels;
    problem.samples = {1, {spec_.batch}};
    if (pixels) problem.samples = {2, {spec_.batch / pixels, pixels}};
    // Strides of what each sample has, one of which takes so many elements.
    const auto each = [&](int64_t elements) {
      return pixels ? imcl::Strides{{elements * pixels, elements}} : imcl::Strides{{elements}};
    };
    for (int64_t h = 0; h < heads_; ++h) {
      const auto head = static_cast<std::size_t>(h);
      out.dz.emplace_back(imcl::kept_type(spec_.dtype), reach(dz_row_, spec_.dz_class));
      const int64_t p = spec_.pixels, image = p * spec_.classes;
      problem.heads.push_back(
          {z_[head].data(), p ? imcl::Strides{{image, 1}} : imcl::Strides{{z_row_}},
           p ? p : spec_.z_class, wants_gradient ? out.dz.back().data() : nullptr,
           p ? imcl::Strides{{image, 1}} : imcl::Strides{{dz_row_}}, p ? p : spec_.dz_class,
           ce_weight_[head], kl_weight_[head]});
    }
    int64_t first = 0;
    for (const GroupSpec& g : spec_.groups) {
      problem.groups.push_back(
          {first, g.size, g.temperature, g.teacher, g.detach, g.divergence, 0.3});
      first += g.size;
    }
    problem.labels.target = target_.get();
    problem.labels.target_sample = each(2);
    if (spec_.probabilities) problem.labels.probabilities = given_[0].data();
    problem.labels.probability_sample = each(3 * spec_.classes);
    problem.labels.probability_class = 3;
    if (spec_.weighted) problem.labels.weight = given_[1].data();
    if (spec_.shared) problem.labels.sample_weight = given_[2].data();
    problem.labels.weight_stride = 2;
    problem.labels.weight_sample = each(2);
    problem.labels.smoothing = spec_.smoothing;
    problem.labels.ignore_index = kIgnored;
    call(problem, spec_.reduction, out.losses, out.terms, way);
  }

  void check_values(Tally& tally, const Result& got) const {
    const auto all = [](int64_t count) {
      return [count](auto cover) {
        for (int64_t at = 0; at < count; ++at) cover(at);
      };
    };
    const int64_t losses = got.losses.count();
    check_written("loss", got.losses, losses, all(losses));
    check_written("terms", got.terms, 2 * heads_, all(2 * heads_));
    if (!valued()) return;
    double sum = 0, bound = 0;
    for (int64_t b = 0; b < spec_.batch; ++b) {
      const auto i = static_cast<std::size_t>(b);
      sum += losses_[i];
      bound += loss_bound_[i];
      if (losses == spec_.batch)
        compare(tally, "loss", b, got.losses.get(b), losses_[i], unit() * loss_bound_[i]);
    }
    if (losses != spec_.batch) compare(tally, "loss", 0, got.losses.get(0), sum, unit() * bound);
    for (int64_t i = 0; i < 2 * heads_; ++i)
      compare(tally, "term", i, got.terms.get(i), terms_[static_cast<std::size_t>(i)],
              unit() * term_bound_[static_cast<std::size_t>(i)]);
  }

  void expect() {
    const auto classes = static_cast<std::size_t>(spec_.classes);
    const auto heads = static_cast<std::size_t>(heads_);
    const auto batch = static_cast<std::size_t>(spec_.batch);
    losses_.assign(batch, 0), loss_bound_.assign(batch, 0);
    terms_.assign(2 * heads, 0), term_bound_.assign(2 * heads, 0);
    dz_.assign(heads * batch * classes, 0), dz_bound_.assign(heads * batch * classes, 0);
    double of_ce = 0, of_kl = 0;
    for (std::size_t b = 0; b < batch; ++b) {
      of_kl += share(b);
      of_ce += share(b) * label_weight(b);
    }
    const double ce_mean = of_ce == 0 ? 0 : 1 / of_ce, kl_mean = of_kl == 0 ? 0 : 1 / of_kl;
    const bool mean = spec_.reduction == Reduction::kMean, sum = spec_.reduction == Reduction::kSum;
    for (std::size_t b = 0; b < batch; ++b) {
      if (share(b) == 0) continue;
      const double ce_scale = share(b) * (mean ? ce_mean : 1);
      const double kl_scale = share(b) * (mean ? kl_mean : 1);
      const double ce_term = share(b) * (sum ? 1 : ce_mean),
                   kl_term = share(b) * (sum ? 1 : kl_mean);
      std::size_t first = 0;
      for (const GroupSpec& group : spec_.groups) {
        const auto n = static_cast<std::size_t>(group.size);
        std::vector<double> ce(n), kl(n);
        double spread = 1 + std::log(static_cast<double>(classes));
        double largest = 0;
        for (std::size_t h = 0; h < n; ++h)
          for (std::size_t k = 0; k < classes; ++k)
            largest = std::max(largest, std::fabs(z(first + h, b, k)));
        for (std::size_t h = 0; h < n; ++h) cross_entropy(first + h, b, ce_scale, largest, ce[h]);
        if (n > 1) collaborate(group, first, b, kl_scale, spread + largest / group.temperature, kl);
        for (std::size_t h = 0; h < n; ++h) {
          const std::size_t i = first + h;
          const double t2 = group.temperature * group.temperature;
          const double ce_bound = spec_.target ? label_size(b) * (spread + largest) : 0;
          const double kl_bound = n > 1 ? t2 * spread + group.temperature * largest : 0;
          losses_[b] += ce_scale * ce_weight_[i] * ce[h] + kl_scale * kl_weight_[i] * kl[h];
          loss_bound_[b] +=
              ce_scale * ce_weight_[i] * ce_bound + kl_scale * kl_weight_[i] * kl_bound;
          terms_[i] += ce_term * ce[h], term_bound_[i] += ce_term * ce_bound;
          terms_[heads + i] += kl_term * kl[h];
          term_bound_[heads + i] += kl_term * kl_bound;
        }
        first += n;
      }
    }
  }

  double share(std::size_t b) const {
    if (target_ && target_[2 * b] == kIgnored) return 0;
    return spec_.shared ? share_[b] : 1;
  }
  bool known(std::size_t b) const {
    return !target_ || (target_[2 * b] >= 0 && target_[2 * b] < spec_.classes);
  }
  double label_weight(std::size_t b) const {
    if (!target_ || !spec_.weighted) return 1;
    return known(b) ? weight_[static_cast<std::size_t>(target_[2 * b])] : 0;
  }
  // What -log p_k is summed with.
  double label(std::size_t b, std::size_t k) const {
    const double y = spec_.probabilities
                         ? probabilities_[b * static_cast<std::size_t>(spec_.classes) + k]
                         : static_cast<int64_t>(k) == target_[2 * b];
    const double smooth =
        y * (1 - spec_.smoothing) + spec_.smoothing / static_cast<double>(spec_.classes);
    return spec_.weighted ? smooth * weight_[k] : smooth;
  }
  double label_size(std::size_t b) const {
    double sum = 0;
    for (std::size_t k = 0; k < static_cast<std::size_t>(spec_.classes); ++k) sum += label(b, k);
    return sum;
  }
  double z(std::size_t h, std::size_t b, std::size_t k) const {
    return z_[h].get(z_at(static_cast<int64_t>(b), static_cast<int64_t>(k)));
  }
  std::size_t at(std::size_t h, std::size_t b, std::size_t k) const {
    return (h * static_cast<std::size_t>(spec_.batch) + b) *
               static_cast<std::size_t>(spec_.classes) +
           k;
  }

  static void log_softmax(std::vector<double>& x) {
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (double v : x) sum += std::exp(v - max);
    for (double& v : x) v -= max + std::log(sum);
  }

  void cross_entropy(std::size_t h, std::size_t b, double scale, double largest, double& value) {
    value = 0;
    if (!spec_.target) return;
    const auto classes = static_cast<std::size_t>(spec_.classes);
    std::vector<double> log_p;
    for (std::size_t k = 0; k < classes; ++k) log_p.push_back(z(h, b, k));
    log_softmax(log_p);
    const double nan = std::numeric_limits<double>::quiet_NaN(), size = label_size(b);
    for (std::size_t k = 0; k < classes; ++k) {
      const double y = label(b, k);
      value -= y * log_p[k];
      const double p = std::exp(log_p[k]) * size, weight = scale * ce_weight_[h];
      dz_[at(h, b, k)] += known(b) ? weight * (p - y) : nan;
      dz_bound_[at(h, b, k)] += weight * ((1 + largest) * p + y) + 1e-30;
    }
    if (!known(b)) value = nan;
  }

  // T^2 KL(q || p) of head h, with q = softmax(t): into `kl`, T (p - q) into its gradient,
  // and the gradient of t, of the logits j with share c_j, into theirs.
  template <class Share>
  double teach(std::size_t h, std::size_t b, double weight, double temperature,
               const std::vector<double>& log_p, const std::vector<double>& log_q, bool detach,
               double spread, std::size_t first, std::size_t n, const Share& share) {
    double kl = 0;
    for (std::size_t k = 0; k < log_p.size(); ++k) kl += std::exp(log_q[k]) * (log_q[k] - log_p[k]);
    for (std::size_t k = 0; k < log_p.size(); ++k) {
      const double p = std::exp(log_p[k]), q = std::exp(log_q[k]);
      dz_[at(h, b, k)] += weight * temperature * (p - q);
      dz_bound_[at(h, b, k)] += weight * temperature * spread * (p + q) + 1e-30;
      if (detach) continue;
      const double into = weight * temperature * temperature * q * (log_q[k] - log_p[k] - kl);
      const double bound = weight * temperature * temperature * q * spread * spread;
      for (std::size_t j = 0; j < n; ++j) {
        dz_[at(first + j, b, k)] += share(j) * into;
        dz_bound_[at(first + j, b, k)] += share(j) * bound;
      }
    }
    return temperature * temperature * kl;
  }

  void collaborate(const GroupSpec& group, std::size_t first, std::size_t b, double scale,
                   double spread, std::vector<double>& kl) {
    const std::size_t n = kl.size();
    const auto classes = static_cast<std::size_t>(spec_.classes);
    const double t = group.temperature, others = static_cast<double>(n - 1);
    std::vector<std::vector<double> > log_p(n);
    for (std::size_t h = 0; h < n; ++h) {
      for (std::size_t k = 0; k < classes; ++k) log_p[h].push_back(z(first + h, b, k) / t);
      log_softmax(log_p[h]);
    }
    for (std::size_t h = 0; h < n; ++h) {
      if (group.teacher == Teacher::kFinal && h == n - 1) continue;
      const double weight = scale * kl_weight_[first + h];
      const auto taught_by = [&](const std::vector<double>& log_q, double part, auto share) {
        kl[h] += part * teach(first + h, b, part * weight, t, log_p[h], log_q, group.detach, spread,
                              first, n, share);
      };
      if (group.teacher == Teacher::kPairwise) {
        for (std::size_t j = 0; j < n; ++j)
          if (j != h) taught_by(log_p[j], 1 / others, [&](std::size_t i) { return (i == j) / t; });
        continue;
      }
      const auto share = [&](std::size_t j) {
        if (group.teacher == Teacher::kOthers) return j == h ? 0 : 1 / (t * others);
        if (group.teacher == Teacher::kMean) return 1 / (t * static_cast<double>(n));
        return j == n - 1 ? 1 / t : 0;
      };
      std::vector<double> log_q(classes);
      for (std::size_t j = 0; j < n; ++j)
        for (std::size_t k = 0; k < classes; ++k) log_q[k] += share(j) * z(first + j, b, k);
      log_softmax(log_q);
      taught_by(log_q, 1, share);
    }
  }

  ConsistencySpec spec_;
  int64_t heads_ = 0, z_row_, dz_row_;
  std::vector<Buffer> z_, z_before_;
  std::vector<double> ce_weight_, kl_weight_, probabilities_, weight_, share_;
  std::vector<Buffer> given_;  // the last three
  std::unique_ptr<int64_t[]> target_;
  std::vector<double> losses_, loss_bound_, terms_, term_bound_, dz_, dz_bound_;
};

std::string name_of(const ConsistencySpec& spec) {
  std::string name = std::string("consistency ") + name_of(spec.dtype) + " (" +
                     std::to_string(spec.batch) + ", " + std::to_string(spec.classes) + ")";
  for (const GroupSpec& g : spec.groups) {
    const char* const teachers[] = {"others", "mean", "final", "pairwise"};
    name += std::string(" ") + std::to_string(g.size) + " " +
            teachers[static_cast<int>(g.teacher)] + (g.detach ? " detached" : "") +
            " T=" + std::to_string(g.temperature) + " divergence " +
            std::to_string(static_cast<int>(g.divergence));
  }
  return name + (spec.target ? " target" : "") + (spec.ignored ? " ignored" : "") +
         (spec.out_of_range ? " out of range" : "") + (spec.smoothing > 0 ? " smoothed" : "") +
         (spec.probabilities ? " probabilities" : "") + (spec.weighted ? " class weights" : "") +
         (spec.shared ? " sample weights" : "") + (spec.pixels ? " dense" : "") +
         (spec.binary ? " binary" : "") + " strides " + std::to_string(spec.z_class) + " " +
         std::to_string(spec.dz_class);
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// Calls one(spec) for every case of the sweep.
template <class One>
void consistency_sweep(const One& one) {
  constexpr Teacher teachers[] = {Teacher::kOthers, Teacher::kMean, Teacher::kFinal,
                                  Teacher::kPairwise};
  const Reduction reductions[] = {Reduction::kMean, Reduction::kSum, Reduction::kNone};
  int64_t turn = 0;
  for (const DType dtype : kDTypes) {
    for (const int64_t classes : {1, 2, 7, 16, 17, 63, 1000}) {
      for (const Teacher teacher : teachers)
        for (const bool detach : {false, true})
          for (const double temperature : {2.0, 3.0}) {
            const bool strided = turn % 2, target = turn % 5 != 4;
            one(ConsistencySpec{dtype,
                                classes == 1000 ? 3 : 5,
                                classes,
                                {{2 + turn % 3, temperature, teacher, detach}},
                                target,
                                target && turn % 3 == 0,
                                target && turn % 7 == 1,
                                turn % 4 == 2 ? 0.1 : 0.0,
                                strided ? 2 : 1,
                                turn / 2 % 2 ? 3 : 1,
                                reductions[turn % 3],
                                target && turn % 6 == 2,
                                turn % 8 > 4,
                                turn % 9 > 6});
            ++turn;
          }
      // One head; groups of every kind, one of them a single head; an empty batch.
      one(ConsistencySpec{dtype,
                          4,
                          classes,
                          {{1, 2.0, Teacher::kMean, true}},
                          true,
                          true,
                          true,
                          0.2,
                          1,
                          1,
                          Reduction::kMean});
      one(ConsistencySpec{dtype,
                          4,
                          classes,
                          {{1, 1.0, Teacher::kMean, true}},
                          false,
                          false,
                          false,
                          0.0,
                          2,
                          2,
                          Reduction::kSum});
      one(ConsistencySpec{dtype,
                          4,
                          classes,
                          {{2, 2.0, Teacher::kOthers, false},
                           {1, 3.0, Teacher::kFinal, true},
                           {3, 1.5, Teacher::kFinal, false},
                           {2, 2.0, Teacher::kPairwise, false}},
                          true,
                          false,
                          true,
                          0.1,
                          1,
                          1,
                          Reduction::kNone});
      one(ConsistencySpec{dtype,
                          0,
                          classes,
                          {{2, 2.0, Teacher::kMean, true}},
                          true,
                          false,
                          false,
                          0.0,
                          1,
                          1,
                          Reduction::kMean});
    }
    // Few classes of many samples, and dense ones: whole vectors of samples, and a rest.
    for (const Teacher teacher : teachers)
      for (const bool detach : {false, true})
        for (const int64_t pixels : {0, 35}) {
          one(ConsistencySpec{dtype,
                              105,
                              pixels ? 19 : 9,
                              {{3, detach ? 2.0 : 1.5, teacher, detach}},
                              true,
                              turn % 2 == 0,
                              turn % 3 == 0,
                              turn % 4 == 0 ? 0.1 : 0.0,
                              1,
                              1,
                              reductions[turn % 3],
                              turn % 5 == 2,
                              turn % 3 == 1,
                              turn % 4 > 1,
                              pixels});
          ++turn;
        }
    // More classes than a chunk of all heads holds: 32768 logits.
    for (const Teacher teacher : teachers)
      for (const bool detach : {false, true}) {
        const bool strided = (turn++ / 2) % 2;
        one(ConsistencySpec{dtype,
                            2,
                            8203,
                            {{5, detach ? 2.0 : 2.5, teacher, detach}},
                            true,
                            false,
                            false,
                            strided ? 0.1 : 0.0,
                            strided ? 2 : 1,
                            strided ? 1 : 2,
                            Reduction::kMean,
                            detach,
                            true,
                            strided});
      }
    one(ConsistencySpec{dtype,
                        1,
                        33001,
                        {{1, 2.0, Teacher::kMean, true}},
                        true,
                        false,
                        false,
                        0.0,
                        1,
                        1,
                        Reduction::kMean});
  }
  // Many heads, and so a small chunk; many samples, and so several to a task.
  one(ConsistencySpec{DType::kFloat32,
                      2,
                      1999,
                      {{17, 2.0, Teacher::kOthers, false}},
                      true,
                      false,
                      false,
                      0.0,
                      1,
                      1,
                      Reduction::kMean});
  one(ConsistencySpec{DType::kFloat32,
                      3000,
                      10,
                      {{3, 2.0, Teacher::kOthers, true}},
                      true,
                      true,
                      false,
                      0.0,
                      1,
                      1,
                      Reduction::kMean});
}

}  // namespace
