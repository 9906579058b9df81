// Collaborative consistency of one sample, compiled once per ISA.
//
// loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h / T), and
//
// others   q_h = softmax(t_h), t_h = sum_{j != h} z_j / (T (n - 1))
// mean     q_h = softmax(t),   t = sum_j z_j / (T n)
// final    q_h = p_n, and no KL for head n itself
// pairwise KL is the mean of KL(p_j || p_h) over j != h; with P = sum_j p_j and
//          Q = sum_j p_j log p_j it is sum_k (Q - P log p_h) / (n - 1): O(n K)
//
// dz_h = ce_h (softmax(z_h) - y) + kl_h T (p_h - q_h), and where a teacher is not detached
// T kl_h q_h (log q_h - log p_h - KL_h) goes into t_h and on to the logits t_h averages.
//
// A sample's logits are taken in chunks of classes that fit the first cache, of all heads
// of a group together; maxima and sums run along (online softmax), so that forward and
// backward each read the logits once, for any number of classes. Only pairwise teachers
// need the normalised p_j in the forward and so a second look.
#include "consistency.h"

#include <algorithm>

#include "exp.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

constexpr int64_t kChunk = 512;  // classes

// One chunk of the classes of all heads of a group, in the accumulation type. The last
// vector is filled up with copies of the last class: harmless to maxima, and `keep`
// takes them out of sums.
template <class T>
struct Chunk {
  using Acc = AccOf<T>;
  static constexpr int width = kLanes<Acc>;

  int64_t first = 0, count = 0;
  const Acc** z;  // (heads) pointers to `padded()` values each
  Acc* copies;    // (heads, kChunk)

  Chunk(Scratch& scratch, int64_t heads)
      : z(scratch.get<const Acc*>(heads)), copies(scratch.get<Acc>(heads * kChunk)) {}

  int64_t padded() const { return (count + width - 1) / width * width; }

  Vec<Acc> keep(int64_t i) const {
    Vec<Acc> mask = {};
    for (int lane = 0; lane < width; ++lane) mask[lane] = i + lane < count ? Acc(1) : Acc(0);
    return mask;
  }

  void read(const Consistency& problem, const Group& group, int64_t sample, int64_t from) {
    first = from;
    count = std::min(kChunk, problem.classes - from);
    for (int64_t h = 0; h < group.size; ++h) {
      const Head& head = problem.heads[static_cast<std::size_t>(group.first + h)];
      const T* row = static_cast<const T*>(head.z) + sample * head.z_row + from * head.z_class;
      if constexpr (std::is_same_v<T, Acc>) {
        if (head.z_class == 1 && count % width == 0) {
          z[h] = row;
          continue;
        }
      }
      Acc* copy = copies + h * kChunk;
      int64_t i = 0;
      if (head.z_class == 1)
        for (; i + width <= count; i += width) store(copy + i, load_acc(row + i));
      for (; i < count; ++i) copy[i] = to_acc(row[i * head.z_class]);
      for (; i < padded(); ++i) copy[i] = copy[count - 1];
      z[h] = copy;
    }
  }

  // Calls body(i, keep) for every vector of the chunk.
  template <class Body>
  IMCL_INLINE void each(const Body& body) const {
    int64_t i = 0;
    for (; i + width <= count; i += width) body(i, splat(Acc(1)));
    if (i < count) body(i, keep(i));
  }
};

// A running maximum and sums of exp(x - maximum).
template <class Acc>
struct Online {
  Acc max = -std::numeric_limits<Acc>::infinity();
  double sum = 0;

  // Takes in a chunk's maximum; returns what the sums so far shrink by, per unit of x.
  Acc raise(Acc chunk_max) {
    // A NaN must become the maximum: everything that follows it is NaN.
    const Acc old = max;
    if (!(chunk_max <= max)) max = chunk_max;
    return old == max ? Acc(0) : old - max;
  }
};

template <class Acc>
IMCL_INLINE Vec<Acc> max_of(Vec<Acc> a, Vec<Acc> b) {
  return b <= a ? a : b;  // NaN in b wins
}

template <class Acc>
Acc max_lanes(Vec<Acc> v) {
  Acc result = v[0];
  for (int i = 1; i < kLanes<Acc>; ++i) result = v[i] <= result ? result : v[i];
  return result;
}

template <class Acc>
struct Coefficients {
  Acc inverse_t, share;  // t_h = (S - z_h) share, or S share

  explicit Coefficients(const Group& g)
      : inverse_t(static_cast<Acc>(1 / g.temperature)),
        share(static_cast<Acc>(
            1 / (g.temperature *
                 static_cast<double>(g.teacher == Teacher::kOthers ? g.size - 1 : g.size)))) {}
};

bool has_kl(const Group& group, int64_t h) {
  return group.size > 1 && !(group.teacher == Teacher::kFinal && h == group.size - 1);
}

// total[i] = sum over the heads of z_i.
template <class T>
void sum_heads(const Chunk<T>& chunk, int64_t heads, AccOf<T>* total) {
  for (int64_t i = 0; i < chunk.padded(); i += chunk.width) {
    Vec<AccOf<T>> sum = load(chunk.z[0] + i);
    for (int64_t h = 1; h < heads; ++h) sum += load(chunk.z[h] + i);
    store(total + i, sum);
  }
}

// The teacher's logits t of head h for one chunk.
template <class T>
void teacher_logits(const Chunk<T>& chunk, const Group& group, int64_t h,
                    const Coefficients<AccOf<T>>& c, const AccOf<T>* total, AccOf<T>* t) {
  using Acc = AccOf<T>;
  for (int64_t i = 0; i < chunk.padded(); i += chunk.width) {
    Vec<Acc> value;
    if (group.teacher == Teacher::kFinal) {
      value = load(chunk.z[group.size - 1] + i) * splat(c.inverse_t);
    } else if (group.teacher == Teacher::kMean) {
      value = load(total + i) * splat(c.share);
    } else {
      value = (load(total + i) - load(chunk.z[h] + i)) * splat(c.share);
    }
    store(t + i, value);
  }
}

template <class T>
AccOf<T> chunk_max(const Chunk<T>& chunk, const AccOf<T>* x) {
  using Acc = AccOf<T>;
  Vec<Acc> max = load(x);
  for (int64_t i = chunk.width; i < chunk.padded(); i += chunk.width)
    max = max_of<Acc>(max, load(x + i));
  return max_lanes<Acc>(max);
}

// Maxima and sums of all heads, and KL where the teacher's logits are known in advance.
template <class T>
void forward_group(const Consistency& problem, const Group& group, int64_t sample,
                   AccOf<T>* stats, double* cross_entropy, double* kl) {
  using Acc = AccOf<T>;
  const int64_t n = group.size;
  const bool one_pass_kl = n > 1 && group.teacher != Teacher::kPairwise;
  const bool own_teacher = group.teacher == Teacher::kOthers;
  const Coefficients<Acc> c(group);
  Scratch scratch;
  Chunk<T> chunk(scratch, n);
  Acc* total = scratch.get<Acc>(kChunk);
  Acc* t = scratch.get<Acc>(kChunk);   // teacher logits
  Acc* et = scratch.get<Acc>(kChunk);  // exp(t - their maximum)
  struct Running {
    Online<Acc> plain, tempered, teacher;  // softmax(z), softmax(z/T), softmax(t)
    double gap = 0;  // sum exp(t - max t) ((t - max t) - (z - max z)/T)
    double logits = 0;
  };
  Running* running = scratch.get<Running>(n);
  for (int64_t h = 0; h < n; ++h) running[h] = Running{};

  for (int64_t from = 0; from < problem.classes; from += kChunk) {
    chunk.read(problem, group, sample, from);
    if (one_pass_kl && group.teacher != Teacher::kFinal) sum_heads(chunk, n, total);
    Acc shrink = 0;               // of the teacher's maximum
    double sum_before = 0;        // the teacher's sum without this chunk
    for (int64_t h = 0; h < n; ++h) {
      Running& run = running[h];
      const Acc* z = chunk.z[h];
      const Acc drop = run.plain.raise(chunk_max(chunk, z));
      run.plain.sum *= std::exp(static_cast<double>(drop));
      run.tempered.sum *= std::exp(static_cast<double>(drop) / group.temperature);
      Vec<Acc> plain = {}, tempered = {}, logits = {};
      chunk.each([&](int64_t i, Vec<Acc> keep) {
        const Vec<Acc> x = load(z + i) - splat(run.plain.max);
        if (problem.target) plain += exp_of(x) * keep;
        if (n > 1) tempered += exp_of(x * splat(c.inverse_t)) * keep;
        logits += load(z + i) * keep;
      });
      run.plain.sum += static_cast<double>(sum_lanes<Acc>(plain));
      run.tempered.sum += static_cast<double>(sum_lanes<Acc>(tempered));
      if (problem.label_smoothing > 0) run.logits += static_cast<double>(sum_lanes<Acc>(logits));
      if (!one_pass_kl) continue;

      if (h == 0 || own_teacher) {
        teacher_logits(chunk, group, h, c, total, t);
        Online<Acc>& teacher = run.teacher;
        sum_before = teacher.sum;
        shrink = teacher.raise(chunk_max(chunk, t));
        Vec<Acc> sum = {};
        chunk.each([&](int64_t i, Vec<Acc> keep) {
          const Vec<Acc> e = exp_of(load(t + i) - splat(teacher.max)) * keep;
          store(et + i, e);
          sum += e;
        });
        teacher.sum = teacher.sum * std::exp(static_cast<double>(shrink)) +
                      static_cast<double>(sum_lanes<Acc>(sum));
      }
      // Both differences are small where they weigh most: nothing large is cancelled.
      const Vec<Acc> teacher_max = splat(running[own_teacher ? h : 0].teacher.max);
      const Vec<Acc> max = splat(run.plain.max);
      Vec<Acc> gap = {};
      for (int64_t i = 0; i < chunk.padded(); i += chunk.width)
        gap += load(et + i) * ((load(t + i) - teacher_max) -
                               (load(z + i) - max) * splat(c.inverse_t));
      if (sum_before > 0) {
        const double shift =
            static_cast<double>(shrink) - static_cast<double>(drop) / group.temperature;
        run.gap = (run.gap + shift * sum_before) * std::exp(static_cast<double>(shrink));
      }
      run.gap += static_cast<double>(sum_lanes<Acc>(gap));
    }
  }

  const double classes = static_cast<double>(problem.classes);
  const int64_t y = problem.target ? problem.target[sample * problem.target_stride] : 0;
  for (int64_t h = 0; h < n; ++h) {
    const Running& run = running[h];
    const Online<Acc>& teacher = running[own_teacher ? h : 0].teacher;
    const double max = static_cast<double>(run.plain.max);
    const double log_sum = std::log(run.plain.sum), log_sum_t = std::log(run.tempered.sum);
    const double teacher_log_sum = std::log(teacher.sum);
    double divergence = 0;
    if (one_pass_kl && has_kl(group, h))
      divergence = run.gap / teacher.sum - teacher_log_sum + log_sum_t;
    Acc* stat = stats + (group.first + h) * kStatsPerHead;
    stat[kMax] = run.plain.max;
    stat[kLogSum] = static_cast<Acc>(log_sum);
    stat[kLogSumT] = static_cast<Acc>(log_sum_t);
    stat[kTeacherMax] = teacher.max;
    stat[kTeacherLogSum] = static_cast<Acc>(teacher_log_sum);
    stat[kKL] = static_cast<Acc>(divergence);
    kl[group.first + h] = group.temperature * group.temperature * divergence;
    double ce = 0;
    if (problem.target) {
      if (y < 0 || y >= problem.classes) {
        ce = std::numeric_limits<double>::quiet_NaN();
      } else {
        const Head& head = problem.heads[static_cast<std::size_t>(group.first + h)];
        const T* row = static_cast<const T*>(head.z) + sample * head.z_row;
        const double zy = static_cast<double>(to_acc(row[y * head.z_class]));
        const double smoothing = problem.label_smoothing;
        ce = log_sum - (zy - max);
        if (smoothing > 0)
          ce = (1 - smoothing) * ce + smoothing * (log_sum - (run.logits / classes - max));
      }
    }
    cross_entropy[group.first + h] = ce;
  }
}

// log p_h, from the statistics of the forward, of one vector.
template <class Acc>
IMCL_INLINE Vec<Acc> log_p_of(const Acc* z, const Acc* stat, Acc inverse_t) {
  return (load(z) - splat(stat[kMax])) * splat(inverse_t) - splat(stat[kLogSumT]);
}

// The KL of pairwise teachers, and for teachers that aren't detached the sum over the
// classes of p_h (W log p_h - L), W = sum_j kl_j and L = sum_j kl_j log p_j, in kKL.
template <class T>
void forward_pairwise(const Consistency& problem, const Group& group, int64_t sample,
                      AccOf<T>* stats, double* kl) {
  using Acc = AccOf<T>;
  const int64_t n = group.size;
  const Coefficients<Acc> c(group);
  Scratch scratch;
  Chunk<T> chunk(scratch, n);
  Acc* log_p = scratch.get<Acc>(n * chunk.width);
  Acc* p = scratch.get<Acc>(n * chunk.width);
  double* divergence = scratch.get<double>(2 * n);
  double* toward = divergence + n;
  std::fill_n(divergence, 2 * n, 0.0);
  Vec<Acc>* partial = scratch.get<Vec<Acc>>(2 * n);
  Acc weight_sum = 0;
  for (int64_t h = 0; h < n; ++h)
    weight_sum += static_cast<Acc>(
        problem.heads[static_cast<std::size_t>(group.first + h)].kl_weight);

  for (int64_t from = 0; from < problem.classes; from += kChunk) {
    chunk.read(problem, group, sample, from);
    std::fill_n(partial, 2 * n, Vec<Acc>{});
    chunk.each([&](int64_t i, Vec<Acc> keep) {
      Vec<Acc> entropy = {}, sum = {}, weighted = {};
      for (int64_t h = 0; h < n; ++h) {
        const Vec<Acc> lp = log_p_of(chunk.z[h] + i,
                                     stats + (group.first + h) * kStatsPerHead, c.inverse_t);
        const Vec<Acc> e = exp_of(lp) * keep;
        store(log_p + h * chunk.width, lp);
        store(p + h * chunk.width, e);
        sum += e;
        entropy += e * lp;
        weighted +=
            lp * static_cast<Acc>(
                     problem.heads[static_cast<std::size_t>(group.first + h)].kl_weight);
      }
      for (int64_t h = 0; h < n; ++h) {
        const Vec<Acc> lp = load(log_p + h * chunk.width);
        partial[h] += entropy - sum * lp;
        if (!group.detach)
          partial[n + h] += load(p + h * chunk.width) * (lp * weight_sum - weighted);
      }
    });
    for (int64_t h = 0; h < 2 * n; ++h)
      divergence[h] += static_cast<double>(sum_lanes<Acc>(partial[h]));
  }
  for (int64_t h = 0; h < n; ++h) {
    stats[(group.first + h) * kStatsPerHead + kKL] = static_cast<Acc>(toward[h]);
    kl[group.first + h] = group.temperature * group.temperature * divergence[h] /
                          static_cast<double>(n - 1);
  }
}

template <class T>
void forward_sample(const Consistency& problem, int64_t sample, void* stats,
                    double* cross_entropy, double* kl) {
  using Acc = AccOf<T>;
  for (const Group& group : problem.groups) {
    forward_group<T>(problem, group, sample, static_cast<Acc*>(stats), cross_entropy, kl);
    if (group.teacher == Teacher::kPairwise && group.size > 1)
      forward_pairwise<T>(problem, group, sample, static_cast<Acc*>(stats), kl);
  }
}

template <class T>
void store_row(const Head& head, int64_t sample, int64_t first, const AccOf<T>* x, int64_t n) {
  store_strided(static_cast<T*>(head.dz) + sample * head.dz_row + first * head.dz_class,
                head.dz_class, x, n);
}

template <class T>
void backward_group(const Consistency& problem, const Group& group, int64_t sample,
                    const AccOf<T>* stats, double scale) {
  using Acc = AccOf<T>;
  const int64_t n = group.size;
  const bool pairwise = group.teacher == Teacher::kPairwise;
  const bool own_teacher = group.teacher == Teacher::kOthers;
  const Coefficients<Acc> c(group);
  const Acc others = n > 1 ? Acc(1) / static_cast<Acc>(n - 1) : Acc(0);
  Scratch scratch;
  Chunk<T> chunk(scratch, n);
  Acc* total = scratch.get<Acc>(kChunk);
  Acc* t = scratch.get<Acc>(kChunk);
  Acc* q = scratch.get<Acc>(kChunk);
  Acc* dz = scratch.get<Acc>(n * kChunk);
  Acc* p = scratch.get<Acc>(n * kChunk);     // pairwise: p_h; else what goes into t_h
  Acc* sum = scratch.get<Acc>(2 * kChunk);   // sum over the heads of p; of the weighted log p
  const auto head = [&](int64_t h) -> const Head& {
    return problem.heads[static_cast<std::size_t>(group.first + h)];
  };
  const auto kl_scale = [&](int64_t h) {
    return has_kl(group, h) ? static_cast<Acc>(head(h).kl_weight * group.temperature * scale)
                            : Acc(0);
  };
  Acc weight_sum = 0;
  for (int64_t h = 0; h < n; ++h) weight_sum += kl_scale(h);

  for (int64_t from = 0; from < problem.classes; from += kChunk) {
    chunk.read(problem, group, sample, from);
    const int64_t padded = chunk.padded();
    if (n > 1 && !pairwise && group.teacher != Teacher::kFinal) sum_heads(chunk, n, total);
    std::fill_n(sum, 2 * kChunk, Acc(0));

    for (int64_t h = 0; h < n; ++h) {
      const Acc *z = chunk.z[h], *stat = stats + (group.first + h) * kStatsPerHead;
      const Acc ce = problem.target ? static_cast<Acc>(head(h).ce_weight * scale) : Acc(0);
      const Acc uniform = ce * static_cast<Acc>(problem.label_smoothing /
                                                static_cast<double>(problem.classes));
      const Acc kl = kl_scale(h);
      Acc *out = dz + h * kChunk, *own = p + h * kChunk;
      if (n > 1 && !pairwise && (h == 0 || own_teacher)) {
        teacher_logits(chunk, group, h, c, total, t);
        const Vec<Acc> shift = splat(stat[kTeacherMax]), log_sum = splat(stat[kTeacherLogSum]);
        for (int64_t i = 0; i < padded; i += chunk.width) {
          const Vec<Acc> log_q = load(t + i) - shift - log_sum;
          store(t + i, log_q);
          store(q + i, exp_of(log_q));
        }
      }
      for (int64_t i = 0; i < padded; i += chunk.width) {
        Vec<Acc> d = {};
        if (problem.target) {
          const Vec<Acc> x = load(z + i) - splat(stat[kMax]) - splat(stat[kLogSum]);
          d = exp_of(x) * splat(ce) - splat(uniform);
        }
        if (n > 1) {
          const Vec<Acc> log_p = log_p_of(z + i, stat, c.inverse_t);
          const Vec<Acc> p_h = exp_of(log_p);
          if (pairwise) {
            store(own + i, p_h);
            store(sum + i, load(sum + i) + p_h);
            store(sum + kChunk + i, load(sum + kChunk + i) + log_p * splat(kl));
          } else {
            const Vec<Acc> q_h = load(q + i);
            d += (p_h - q_h) * splat(kl);
            if (!group.detach) {
              const Vec<Acc> into =
                  splat(kl) * q_h * (load(t + i) - log_p - splat(stat[kKL]));
              store(own + i, into);
              store(sum + i, load(sum + i) + into);
            }
          }
        }
        store(out + i, d);
      }
      if (problem.target) {
        const int64_t y = problem.target[sample * problem.target_stride] - from;
        if (y >= 0 && y < chunk.count)
          out[y] -= ce * static_cast<Acc>(1 - problem.label_smoothing);
      }
    }

    for (int64_t h = 0; h < n; ++h) {
      const Acc *z = chunk.z[h], *stat = stats + (group.first + h) * kStatsPerHead;
      const Acc *own = p + h * kChunk, kl = kl_scale(h);
      Acc* out = dz + h * kChunk;
      if (n > 1 && pairwise) {
        for (int64_t i = 0; i < padded; i += chunk.width) {
          const Vec<Acc> p_h = load(own + i);
          Vec<Acc> d = splat(kl) * (p_h - (load(sum + i) - p_h) * splat(others));
          if (!group.detach) {
            const Vec<Acc> log_p = log_p_of(z + i, stat, c.inverse_t);
            const Acc dot = stat[kKL] * static_cast<Acc>(group.temperature * scale);
            d += p_h * splat(others) *
                 (splat(weight_sum) * log_p - load(sum + kChunk + i) - splat(dot));
          }
          store(out + i, load(out + i) + d);
        }
      } else if (n > 1 && !group.detach) {
        const bool last = h == n - 1;
        for (int64_t i = 0; i < padded; i += chunk.width) {
          const Vec<Acc> all = load(sum + i);
          Vec<Acc> d = {};
          if (own_teacher) d = (all - load(own + i)) * splat(others);
          if (group.teacher == Teacher::kMean) d = all * splat(Acc(1) / static_cast<Acc>(n));
          if (group.teacher == Teacher::kFinal && last) d = all;
          store(out + i, load(out + i) + d);
        }
      }
      store_row<T>(head(h), sample, from, out, chunk.count);
    }
  }
}

template <class T>
void backward_sample(const Consistency& problem, int64_t sample, const void* stats,
                     double scale) {
  using Acc = AccOf<T>;
  if (problem.target && problem.counts(sample)) {
    const int64_t y = problem.target[sample * problem.target_stride];
    if (y < 0 || y >= problem.classes) scale = std::numeric_limits<double>::quiet_NaN();
  }
  if (!problem.counts(sample)) {
    Scratch scratch;
    Acc* zeros = scratch.get<Acc>(kChunk);
    std::fill_n(zeros, kChunk, Acc(0));
    for (const Head& head : problem.heads)
      for (int64_t from = 0; from < problem.classes; from += kChunk)
        store_row<T>(head, sample, from, zeros, std::min(kChunk, problem.classes - from));
    return;
  }
  for (const Group& group : problem.groups)
    backward_group<T>(problem, group, sample, static_cast<const Acc*>(stats), scale);
}

template <class Run>
void with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(static_cast<double*>(nullptr));
    case DType::kBFloat16: return run(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return run(static_cast<Float16*>(nullptr));
    default: return run(static_cast<float*>(nullptr));
  }
}

void forward(const Consistency& problem, int64_t sample, void* stats, double* cross_entropy,
             double* kl) {
  with_type(problem.dtype, [&](auto* z) {
    forward_sample<std::remove_pointer_t<decltype(z)>>(problem, sample, stats, cross_entropy, kl);
  });
}

void backward(const Consistency& problem, int64_t sample, const void* stats, double scale) {
  with_type(problem.dtype, [&](auto* z) {
    backward_sample<std::remove_pointer_t<decltype(z)>>(problem, sample, stats, scale);
  });
}

}  // namespace

extern const ConsistencyKernels consistency_kernels;
const ConsistencyKernels consistency_kernels = {forward, backward};

}  // namespace IMCL_ISA
}  // namespace imcl
