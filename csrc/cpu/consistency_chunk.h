// Some classes of all heads of a group, of one sample, and the maxima that run along from chunk to
// chunk (online softmax).
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "consistency.h"
#include "logits.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

constexpr int64_t kChunkLogits = 32768;  // of all heads: with their exponentials 512 KiB

// One chunk of the classes of all heads of a group, in the accumulation type. The last
// vector is filled up with copies of the last class: harmless to maxima, and `keep`
// takes them out of sums.
template <class T>
struct Chunk {
  using Acc = AccOf<T>;
  static constexpr int width = kLanes<Acc>;

  int64_t size;  // classes at most, a multiple of the width
  int64_t first = 0, count = 0;
  const Acc** z;  // (heads) pointers to `padded()` values each
  Acc* copies;    // (heads, size)

  Chunk(Scratch& scratch, int64_t heads, int64_t classes)
      : size((std::min(classes, kChunkLogits / heads) / width + 1) * width),
        z(scratch.get<const Acc*>(heads)),
        copies(scratch.get<Acc>(heads * size)) {}

  int64_t padded() const { return (count + width - 1) / width * width; }

  void read(const Consistency& problem, const Group& group, int64_t sample, int64_t from) {
    first = from;
    count = std::min(size, problem.classes - from);
    for (int64_t h = 0; h < group.size; ++h) {
      const Head& head = problem.heads[static_cast<std::size_t>(group.first + h)];
      const T* row = static_cast<const T*>(head.z) + problem.samples.offset(sample, head.z_sample) +
                     from * head.z_class;
      if constexpr (std::is_same_v<T, Acc>) {
        if (head.z_class == 1 && count % width == 0) {
          z[h] = row;
          continue;
        }
      }
      Acc* copy = copies + h * size;
      int64_t i = 0;
      if (head.z_class == 1)
        for (; i + width <= count; i += width) store(copy + i, load_acc(row + i));
      for (; i < count; ++i) copy[i] = to_acc(row[i * head.z_class]);
      for (; i < padded(); ++i) copy[i] = copy[count - 1];
      z[h] = copy;
    }
  }

  // Makes the lowest number -inf, in the copies.
  void mask(int64_t heads) {
    for (int64_t h = 0; h < heads; ++h) {
      Acc* copy = copies + h * size;
      for (int64_t i = 0; i < padded(); i += width) {
        const Vec<Acc> x = load(z[h] + i);
        store(copy + i, x <= splat(kLowest<T>) ? splat(kMasked<Acc>) : x);
      }
      z[h] = copy;
    }
  }

  // Calls body(i, keep) for every vector of the chunk; keep is 1, or 0 in the padding.
  template <class Body>
  IMCL_INLINE void each(const Body& body) const {
    int64_t i = 0;
    for (; i + width <= count; i += width) body(i, splat(Acc(1)));
    if (i == count) return;
    Vec<Acc> keep = {};
    for (int lane = 0; lane < count - i; ++lane) keep[lane] = 1;
    body(i, keep);
  }
};

// A running maximum and the sum of exp(x - maximum).
template <class Acc>
struct Online {
  Acc max = kMasked<Acc>;
  double sum = 0;

  // Takes in a chunk's maximum and shrinks the sum to it; returns the old maximum less the
  // new, 0 where there was none.
  double raise(Acc chunk_max) {
    const double old = static_cast<double>(max);
    if (!(chunk_max > max)) return 0;
    max = chunk_max;
    if (sum == 0) return 0;
    const double drop = old - static_cast<double>(max);
    sum *= std::exp(drop);
    return drop;
  }

  // What to subtract: as long as all classes are masked, nothing.
  Acc shift() const { return max == kMasked<Acc> ? Acc(0) : max; }
};

// The largest of n values, a multiple of a vector's lanes; `least` goes down to them. NaN may be
// passed over: the sum of exp(x - maximum) comes out NaN all the same.
template <class Acc>
Acc max_of(const Acc* x, int64_t n, Vec<Acc>& least) {
  constexpr int width = kLanes<Acc>, chains = 4;  // a single chain would wait for each compare
  Vec<Acc> max[chains], min[chains];
  for (int u = 0; u < chains; ++u) {
    max[u] = load(x);
    min[u] = least;
  }
  int64_t i = 0;
  for (; i + chains * width <= n; i += chains * width) {
#pragma GCC unroll 4
    for (int u = 0; u < chains; ++u) {
      const Vec<Acc> v = load(x + i + u * width);
      max[u] = max_vector(max[u], v);
      min[u] = min_vector(min[u], v);
    }
  }
  for (; i < n; i += width) {
    max[0] = max_vector(max[0], load(x + i));
    min[0] = min_vector(min[0], load(x + i));
  }
  least = min_vector(min_vector(min[0], min[1]), min_vector(min[2], min[3]));
  return max_lanes<Acc>(max_vector(max_vector(max[0], max[1]), max_vector(max[2], max[3])));
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
