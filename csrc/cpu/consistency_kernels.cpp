// Collaborative consistency of one sample, value and gradient, compiled once per ISA.
//
// loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h/T), q_h = softmax(t_h)
// dz_h = ce_h (softmax(z_h) sum(y) - y) + kl_h T (p_h - q_h)
//
// with t_h, what teachers learn that aren't detached, and P, Q, V and W of pairwise ones as in
// docs/math.md, "Collaborative consistency". Labels y are an index, smoothed or not, or soft: any
// number for each class, class weights included.
//
// The classes are taken in chunks of all heads of a group together, maxima and sums running
// along (online softmax). Up to some thousand classes that is one chunk: the logits are read
// once and every exponential is taken once, kept in cache, and made into the gradient as soon
// as its sum is known. Beyond that a second pass takes the exponentials again.
//
// The logit of a masked class is -inf, or the lowest number of its type, which becomes -inf here:
// its exponentials are 0, and what a 0 is multiplied with is left out of sums of x log x.
#include <algorithm>

#include "consistency.h"
#include "consistency_chunk.h"
#include "consistency_divergences.h"
#include "consistency_lanes.h"
#include "exp.h"
#include "logits.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

// Heads up to which the teachers are products of the heads' own exponentials. A rounding error
// grows with the power that is taken of them.
constexpr int64_t kMostProducts = 5;

// One group of heads on one sample.
template <class T>
class Work {
 public:
  using Acc = AccOf<T>;
  using Kept = KeptOf<T>;
  static constexpr int width = kLanes<Acc>;

  Work(const Consistency& problem, const Group& group, int64_t sample, bool wants_gradient)
      : problem_(problem),
        group_(group),
        sample_(sample),
        n_(group.size),
        is_(problem.labels, group),
        inverse_t_(static_cast<Acc>(1 / group.temperature)),
        teacher_share_(static_cast<Acc>(
            1 / (group.temperature * static_cast<double>(is_.own_teacher ? n_ - 1 : n_)))),
        chunk_(scratch_, n_, problem.classes),
        running_(scratch_.get<Running>(n_)),
        total_(scratch_.get<Acc>(chunk_.size)),
        t_(scratch_.get<Acc>(chunk_.size)),
        teacher_(scratch_.get<Acc>(chunk_.size * (is_.own_teacher ? n_ : 1))),
        soft_(is_.soft ? scratch_.get<Acc>(chunk_.size) : nullptr),
        shares_(is_.other ? scratch_.get<Acc>(n_) : nullptr) {
    if (is_.other) shares_of(problem, group, shares_);
    for (int64_t h = 0; h < n_; ++h) running_[h] = Running{};
    if (wants_gradient && problem.classes <= chunk_.size) {
      tempered_ = is_.kl ? scratch_.get<Acc>(n_ * chunk_.size) : nullptr;
      plain_ = is_.plain ? scratch_.get<Acc>(n_ * chunk_.size) : nullptr;
      kept_ = true;
    }
  }

  // Maxima and sums of every head, and KL where the teacher's logits are known in advance.
  void read() {
    for (int64_t from = 0; from < problem_.classes; from += chunk_.size) {
      chunk_.read(problem_, group_, sample_, from);
      // The sum of the labels, without this chunk's.
      const double labels_before =
          soft_ ? label_size_ : static_cast<double>(from) / static_cast<double>(problem_.classes);
      if (soft_) label_size_ += read_labels();
      survey();
      if (kept_ && is_.own_teacher && n_ <= kMostProducts && !extreme_ && read_products()) {
        if (!group_.detach || is_.other) sum_heads();  // for the teachers' logits
        break;
      }
      if (is_.taught) sum_heads();
      double teacher_drop = 0;
      double sum_before = 0;  // the teacher's sum without this chunk
      for (int64_t h = 0; h < n_; ++h) {
        Running& run = running_[h];
        const double drop = run.plain.raise(run.chunk_max);
        run.shift = run.plain.shift();
        if (drop != 0) {
          run.tempered *= std::exp(drop / group_.temperature);
          run.label_logit += drop * labels_before;
        }
        sum_head(h);
        if (!is_.taught) continue;
        if (h == 0 || is_.own_teacher) {
          const Acc max = teacher_logits(h);
          sum_before = run.teacher.sum;
          teacher_drop = run.teacher.raise(max);
        }
        if (sum_before > 0) {
          run.gap += (teacher_drop - drop / group_.temperature) * sum_before;
          const double shrunk = std::exp(teacher_drop);
          run.gap = shrunk > 0 ? run.gap * shrunk : 0;  // it may be infinite
        }
        if (h == 0 || is_.own_teacher) {
          sum_teacher(h);
        } else {
          sum_gap(h);
        }
      }
    }
    for (int64_t h = 0; h < n_; ++h) {
      Running& run = running_[h];
      run.log_sum = std::log(run.plain.sum);
      run.log_tempered = std::log(run.tempered);
      const Online<Acc>& teacher = running_[is_.teacher_of(h)].teacher;
      run.teacher_sum = teacher.sum;
      run.teacher_max = teacher.shift();
      if (is_.other) {
        run.log_teacher = static_cast<Acc>(std::log(teacher.sum));
        run.inverse_teacher = static_cast<Acc>(1 / teacher.sum);
        run.inverse_tempered = static_cast<Acc>(1 / run.tempered);
      }
      if (is_.taught && !is_.other && is_.has_kl(h))
        run.kl = run.gap / teacher.sum - std::log(teacher.sum) + run.log_tempered;
    }
    if (is_.other) as_constant(group_.divergence, [&](auto kind) { read_other<kind.value>(); });
    else if (is_.pairwise) read_pairwise();
  }

  void terms(double* cross_entropy, double* kl) const {
    const double smoothing = problem_.labels.smoothing;
    for (int64_t h = 0; h < n_; ++h) {
      const Running& run = running_[h];
      kl[h] = group_.temperature * group_.temperature * run.kl;
      cross_entropy[h] = label_kl_;
      if (!is_.labelled && !is_.mixture) continue;
      if (!target_is_valid()) {
        cross_entropy[h] = std::numeric_limits<double>::quiet_NaN();
        continue;
      }
      if (is_.mixture) continue;
      if (soft_) {
        cross_entropy[h] = weighted(label_size_, run.log_sum) - run.label_logit;
        continue;
      }
      const Head& head = this->head(h);
      const T* row =
          static_cast<const T*>(head.z) + problem_.samples.offset(sample_, head.z_sample);
      const Acc label = to_acc(row[target() * head.z_class]);
      const auto zy = static_cast<double>(label <= kLowest<T> ? kMasked<Acc> : label);
      cross_entropy[h] = run.log_sum - (zy - static_cast<double>(run.plain.max));
      if (smoothing > 0)
        cross_entropy[h] =
            (1 - smoothing) * cross_entropy[h] + smoothing * (run.log_sum - run.label_logit);
      if (problem_.labels.weight)
        cross_entropy[h] = unless_0(label_weight(), label_weight() * cross_entropy[h]);
    }
  }

  // Every dz of this sample, times scale.
  void gradient(Scale scale) {
    if (!target_is_valid()) scale.cross_entropy = std::numeric_limits<double>::quiet_NaN();
    Scratch scratch;
    const int64_t size = chunk_.size;
    Acc* dz = scratch.get<Acc>(n_ * size);
    Acc* p = scratch.get<Acc>(n_ * size);   // pairwise: p_h; else what goes into t_h
    Acc* sum = scratch.get<Acc>(2 * size);  // over the heads, of p; of the weighted log p
    for (int64_t from = 0; from < problem_.classes; from += size) {
      if (!kept_) {
        chunk_.read(problem_, group_, sample_, from);
        if (extreme_) chunk_.mask(n_);
        if (soft_) read_labels();
        if (is_.taught) sum_heads();
      }
      const bool sums = is_.pairwise || is_.other || (is_.taught && !group_.detach);
      if (sums) std::fill_n(sum, 2 * size, Acc(0));
      for (int64_t h = 0; h < n_; ++h) {
        const Head& out = head(h);
        Kept* row = row_of(out) + from * out.dz_class;
        if constexpr (std::is_same_v<Kept, Acc>) {
          if (!sums && out.dz_class == 1) {
            gradient_of_head(h, scale, row, p + h * size, sum);
            continue;
          }
        }
        gradient_of_head(h, scale, dz + h * size, p + h * size, sum);
        if (!sums) store_strided(row, out.dz_class, dz + h * size, chunk_.count);
      }
      if (is_.other)
        as_constant(group_.divergence,
                    [&](auto kind) { add_other<kind.value>(scale, dz, p, sum); });
      for (int64_t h = 0; sums && h < n_; ++h) {
        const Head& out = head(h);
        if (is_.other) {
          if (is_.taught && !group_.detach) add_teacher(h, dz + h * size, p + h * size, sum);
        } else if (is_.pairwise) add_pairwise(h, scale.kl, dz + h * size, p + h * size, sum);
        else add_teacher(h, dz + h * size, p + h * size, sum);
        store_strided(row_of(out) + from * out.dz_class, out.dz_class, dz + h * size, chunk_.count);
      }
    }
  }

 private:
  struct Running {
    Online<Acc> plain, teacher;    // softmax(z), softmax(t)
    double tempered = 0;           // sum exp((z - max z)/T)
    double gap = 0;                // sum exp(t - max t) ((t - max t) - (z - max z)/T)
    double label_logit = 0;        // sum of y (z - max z), y the soft labels or 1/K
    Acc chunk_max = 0, shift = 0;  // shift: of plain
    // Known after the last chunk:
    double log_sum = 0, log_tempered = 0, teacher_sum = 0, kl = 0;
    Acc log_teacher = 0, inverse_teacher = 0, inverse_tempered = 0;  // of another divergence
    double head_parts = 0, teacher_parts = 0;  // sums of those of another divergence
    double toward = 0;  // pairwise: sum_k p_h (W log p_h - V), see docs/math.md
    Acc teacher_max = 0;
  };

  const Head& head(int64_t h) const {
    return problem_.heads[static_cast<std::size_t>(group_.first + h)];
  }
  Kept* row_of(const Head& out) const {
    return static_cast<Kept*>(out.dz) + problem_.samples.offset(sample_, out.dz_sample);
  }
  int64_t target() const {
    const Labels& labels = problem_.labels;
    return labels.target[problem_.samples.offset(sample_, labels.target_sample)];
  }
  bool target_is_valid() const {
    return !problem_.labels.target || (target() >= 0 && target() < problem_.classes);
  }
  // Of an index that is valid.
  double label_weight() const { return static_cast<double>(class_weight(target())); }
  Acc class_weight(int64_t k) const {
    const Labels& labels = problem_.labels;
    return labels.weight ? static_cast<const Acc*>(labels.weight)[k * labels.weight_stride]
                         : Acc(1);
  }
  // exp(t - its maximum) of the teacher of head h, (size).
  Acc* teacher(int64_t h) const { return teacher_ + is_.teacher_of(h) * chunk_.size; }

  IMCL_INLINE Vec<Acc> shifted(int64_t h, int64_t i) const {
    return load(chunk_.z[h] + i) - splat(running_[h].shift);
  }
  IMCL_INLINE Vec<Acc> log_p(int64_t h, int64_t i) const {
    return shifted(h, i) * splat(inverse_t_) - splat(static_cast<Acc>(running_[h].log_tempered));
  }
  // 0 times it is 0.
  IMCL_INLINE static Vec<Acc> finite(Vec<Acc> log_p) {
    return max_vector(splat(std::numeric_limits<Acc>::lowest()), log_p);
  }
  // exp(z - max) and its T-th root; kept by sum_head() if the chunk is the only one.
  IMCL_INLINE Vec<Acc> plain(int64_t h, int64_t i) const {
    return kept_ ? load(plain_ + h * chunk_.size + i) : exp_of(shifted(h, i));
  }
  IMCL_INLINE Vec<Acc> tempered(int64_t h, int64_t i) const {
    return kept_ ? load(tempered_ + h * chunk_.size + i)
                 : exp_of(shifted(h, i) * splat(inverse_t_));
  }

  // A vector of the chunk that may be the last one, to memory that has no padding.
  IMCL_INLINE void put(Acc* row, int64_t i, Vec<Acc> v) const {
    if (i + width <= chunk_.count) return store(row + i, v);
    for (int64_t lane = 0; lane < chunk_.count - i; ++lane) row[i + lane] = v[lane];
  }

  // The maxima of this chunk, and whether there are extreme logits, whose masks it then makes.
  void survey() {
    Vec<Acc> least = {};
    Acc most = 0;
    for (int64_t h = 0; h < n_; ++h) {
      running_[h].chunk_max = max_of(chunk_.z[h], chunk_.padded(), least);
      most = std::max(most, running_[h].chunk_max);
    }
    if (most > kModerate || min_lanes<Acc>(least) < -kModerate) extreme_ = true;
    if (!extreme_) return;
    chunk_.mask(n_);
    for (int64_t h = 0; h < n_; ++h)
      if (running_[h].chunk_max <= kLowest<T>) running_[h].chunk_max = kMasked<Acc>;
  }

  void sum_heads() {
    if (group_.teacher == Teacher::kFinal || extreme_) return;
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      Vec<Acc> sum = load(chunk_.z[0] + i);
      for (int64_t h = 1; h < n_; ++h) sum += load(chunk_.z[h] + i);
      store(total_ + i, sum);
    }
  }

  // Writes the teacher's logits to t_ and returns their maximum.
  Acc teacher_logits(int64_t h) {
    Vec<Acc> max = splat(kMasked<Acc>);
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      Vec<Acc> t = {};
      if (extreme_ && group_.teacher != Teacher::kFinal) {
        for (int64_t j = 0; j < n_; ++j)
          if (j != h || !is_.own_teacher) t += load(chunk_.z[j] + i) * splat(teacher_share_);
      } else if (is_.own_teacher) {
        t = (load(total_ + i) - load(chunk_.z[h] + i)) * splat(teacher_share_);
      } else if (group_.teacher == Teacher::kMean) {
        t = load(total_ + i) * splat(teacher_share_);
      } else {
        t = load(chunk_.z[n_ - 1] + i) * splat(inverse_t_);
      }
      store(t_ + i, t);
      max = max_vector(max, t);
    }
    return max_lanes<Acc>(max);
  }

  void sum_head(int64_t h) {
    Running& run = running_[h];
    if (is_.kl) {
      Vec<Acc> plain_sum = {}, tempered_sum = {};
      Acc* out = kept_ ? tempered_ + h * chunk_.size : nullptr;
      const Vec<Acc> max = splat(run.shift), inverse_t = splat(inverse_t_);
      const Acc* z = chunk_.z[h];
      chunk_.each([&](int64_t i, Vec<Acc> keep) {
        const Vec<Acc> e = exp_of((load(z + i) - max) * inverse_t);
        if (out) store(out + i, e);
        tempered_sum += e * keep;
        plain_sum += e * e * keep;  // what it should be at T = 2 only
      });
      run.tempered += static_cast<double>(sum_lanes<Acc>(tempered_sum));
      if (!is_.plain) run.plain.sum += static_cast<double>(sum_lanes<Acc>(plain_sum));
    }
    if (is_.plain) sum_plain(h);
    if (is_.summed) sum_logits(h);
  }

  void sum_plain(int64_t h) {
    Vec<Acc> sum = {};
    Acc* out = kept_ ? plain_ + h * chunk_.size : nullptr;
    const Vec<Acc> max = splat(running_[h].shift);
    const Acc* z = chunk_.z[h];
    chunk_.each([&](int64_t i, Vec<Acc> keep) {
      const Vec<Acc> e = exp_of(load(z + i) - max);
      if (out) store(out + i, e);
      sum += e * keep;
    });
    running_[h].plain.sum += static_cast<double>(sum_lanes<Acc>(sum));
  }

  // Of logits less their maximum, as all else: what they have in common would cost digits.
  void sum_logits(int64_t h) {
    const Vec<Acc> of_class = splat(static_cast<Acc>(1.0 / static_cast<double>(problem_.classes)));
    Vec<Acc> sum = {};
    if (soft_) {
      for (int64_t i = 0; i < chunk_.padded(); i += width)
        sum += unless_0(load(soft_ + i), load(soft_ + i) * shifted(h, i));
    } else {
      chunk_.each(
          [&](int64_t i, Vec<Acc> keep) { sum += unless_0(keep, shifted(h, i)) * of_class; });
    }
    running_[h].label_logit += static_cast<double>(sum_lanes<Acc>(sum));
  }

  // The soft labels of this chunk, 0 in its padding; returns their sum.
  double read_labels() {
    const Labels& labels = problem_.labels;
    const Acc uniform = static_cast<Acc>(labels.smoothing / static_cast<double>(problem_.classes));
    const auto sharp = static_cast<Acc>(1 - labels.smoothing);
    const int64_t first = chunk_.first, count = chunk_.count;
    if (labels.probabilities) {
      const Acc* row = static_cast<const Acc*>(labels.probabilities) +
                       problem_.samples.offset(sample_, labels.probability_sample) +
                       first * labels.probability_class;
      for (int64_t i = 0; i < count; ++i)
        soft_[i] = row[i * labels.probability_class] * sharp + uniform;
    } else {
      std::fill_n(soft_, count, uniform);
      const int64_t y = target() - first;
      if (y >= 0 && y < count) soft_[y] += sharp;
    }
    if (labels.weight)
      for (int64_t i = 0; i < count; ++i) soft_[i] *= class_weight(first + i);
    std::fill(soft_ + count, soft_ + chunk_.padded(), Acc(0));
    Vec<Acc> sum = {};
    for (int64_t i = 0; i < chunk_.padded(); i += width) sum += load(soft_ + i);
    return static_cast<double>(sum_lanes<Acc>(sum));
  }

  // All that read() makes of the only chunk, with one exponential of a logit instead of two:
  // with u_h = exp((z_h - max z_h)/(T (n - 1))), exp(z_h/T) is u_h^(n-1), and a teacher the
  // product of the other heads' u. False, and nothing done, where a product underflows, as it
  // can where the heads contradict each other by hundreds, or where something isn't finite.
  bool read_products() {
    const int64_t n = n_;
    Vec<Acc> max[kMostProducts], plain_sum[kMostProducts] = {}, tempered_sum[kMostProducts] = {};
    Vec<Acc> teacher_sum[kMostProducts] = {}, gap[kMostProducts] = {};
    Acc all_maxima = 0;
    for (int64_t h = 0; h < n; ++h) {
      max[h] = splat(running_[h].chunk_max);
      all_maxima += running_[h].chunk_max;
    }
    const Vec<Acc> share = splat(teacher_share_), both_shares = splat(teacher_share_ + inverse_t_);
    const int64_t size = chunk_.size;
    chunk_.each([&](int64_t i, Vec<Acc> keep) {
      Vec<Acc> shifted[kMostProducts], u[kMostProducts], before[kMostProducts];
      Vec<Acc> total = {}, product = keep;
      for (int64_t h = 0; h < n; ++h) {
        shifted[h] = load(chunk_.z[h] + i) - max[h];
        total += shifted[h];
        u[h] = exp_of(shifted[h] * share);
        before[h] = product;
        product *= u[h];
        Vec<Acc> e = u[h];
        for (int64_t j = 2; j < n; ++j) e *= u[h];
        store(tempered_ + h * size + i, e);
        tempered_sum[h] += e * keep;
        plain_sum[h] += e * e * keep;  // what it should be at T = 2 only
      }
      total *= share;
      Vec<Acc> after = splat(Acc(1));
      for (int64_t h = n - 1; h >= 0; --h) {
        const Vec<Acc> q = before[h] * after;
        after *= u[h];
        store(teacher_ + h * size + i, q);
        teacher_sum[h] += q;
        gap[h] += q * (total - shifted[h] * both_shares);
      }
    });
    for (int64_t h = 0; h < n; ++h) {
      const Acc least = sum_lanes<Acc>(teacher_sum[h]);
      if (!(least > Acc(1e-25)) || !std::isfinite(sum_lanes<Acc>(gap[h]))) return false;
    }
    for (int64_t h = 0; h < n; ++h) {
      Running& run = running_[h];
      run.plain.max = run.shift = run.chunk_max;
      run.teacher.max = (all_maxima - run.chunk_max) * teacher_share_;
      run.teacher.sum = static_cast<double>(sum_lanes<Acc>(teacher_sum[h]));
      run.gap = static_cast<double>(sum_lanes<Acc>(gap[h]));
      run.tempered = static_cast<double>(sum_lanes<Acc>(tempered_sum[h]));
      if (is_.plain) sum_plain(h);
      else run.plain.sum = static_cast<double>(sum_lanes<Acc>(plain_sum[h]));
      if (is_.summed) sum_logits(h);
    }
    return true;
  }

  // exp(t - max t), its sum, and the gap to head h. Both differences of a gap are small
  // where they weigh most: nothing large is cancelled.
  void sum_teacher(int64_t h) {
    Running& run = running_[h];
    Acc* out = teacher(h);
    const Vec<Acc> teacher_max = splat(run.teacher.shift()), max = splat(run.shift);
    const Vec<Acc> inverse_t = splat(inverse_t_);
    const Acc *t = t_, *z = chunk_.z[h];
    Vec<Acc> sum = {}, gap = {};
    chunk_.each([&](int64_t i, Vec<Acc> keep) {
      const Vec<Acc> x = load(t + i) - teacher_max;
      const Vec<Acc> e = exp_of(x) * keep;
      store(out + i, e);
      sum += e;
      gap += unless_0(e, e * (x - (load(z + i) - max) * inverse_t));
    });
    run.teacher.sum += static_cast<double>(sum_lanes<Acc>(sum));
    run.gap += static_cast<double>(sum_lanes<Acc>(gap));
  }

  // The gap to a further head of a teacher that several heads share.
  void sum_gap(int64_t h) {
    const Vec<Acc> teacher_max = splat(running_[0].teacher.shift());
    Vec<Acc> gap = {};
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      const Vec<Acc> e = load(teacher_ + i);
      gap += unless_0(e, e * ((load(t_ + i) - teacher_max) - shifted(h, i) * splat(inverse_t_)));
    }
    running_[h].gap += static_cast<double>(sum_lanes<Acc>(gap));
  }

  // Pairwise teachers need the normalised p_j, so a second look at the logits.
  void read_pairwise() {
    Scratch scratch;
    Acc* log_ps = scratch.get<Acc>(n_ * width);
    Acc* ps = scratch.get<Acc>(n_ * width);
    Vec<Acc>* partial = scratch.get<Vec<Acc>>(2 * n_);
    Acc weight_sum = 0;
    for (int64_t h = 0; h < n_; ++h) weight_sum += static_cast<Acc>(head(h).kl_weight);
    for (int64_t from = 0; from < problem_.classes; from += chunk_.size) {
      if (!kept_) {
        chunk_.read(problem_, group_, sample_, from);
        if (extreme_) chunk_.mask(n_);
      }
      for (int64_t h = 0; h < 2 * n_; ++h) partial[h] = Vec<Acc>{};
      chunk_.each([&](int64_t i, Vec<Acc> keep) {
        Vec<Acc> entropy = {}, sum = {}, weighted = {};
        for (int64_t h = 0; h < n_; ++h) {
          const Vec<Acc> lp = log_p(h, i);
          const Vec<Acc> e =
              tempered(h, i) * keep * splat(static_cast<Acc>(1 / running_[h].tempered));
          store(log_ps + h * width, lp);
          store(ps + h * width, e);
          sum += e;
          entropy += e * finite(lp);
          if (!group_.detach) weighted += finite(lp) * splat(static_cast<Acc>(head(h).kl_weight));
        }
        for (int64_t h = 0; h < n_; ++h) {
          const Vec<Acc> lp = load(log_ps + h * width);
          partial[h] += unless_0(sum, entropy - sum * lp);
          if (group_.detach) continue;
          const Vec<Acc> e = load(ps + h * width);
          partial[n_ + h] += unless_0(e, e * (lp * splat(weight_sum) - weighted));
        }
      });
      for (int64_t h = 0; h < n_; ++h) {
        running_[h].kl +=
            static_cast<double>(sum_lanes<Acc>(partial[h])) / static_cast<double>(n_ - 1);
        running_[h].toward += static_cast<double>(sum_lanes<Acc>(partial[n_ + h]));
      }
    }
  }

  // ---- other divergences than KL: they need the normalised p and q, so a second look as well ----

  template <Divergence kind>
  void read_other() {
    Scratch scratch;
    Joint joint(scratch, n_);
    for (int64_t from = 0; from < problem_.classes; from += chunk_.size) {
      if (!kept_) {
        chunk_.read(problem_, group_, sample_, from);
        if (extreme_) chunk_.mask(n_);
        if (is_.mixture) read_labels();
        if (is_.taught) sum_heads();
      }
      for (int64_t h = 0; h < n_; ++h) joint.sums[h] = Parts<Vec<Acc>>{};
      Vec<Acc> of_label = {};
      if constexpr (kind != Divergence::kMixture) {
        for (int64_t h = 0; is_.taught && h < n_; ++h) {
          if (h == 0 || is_.own_teacher) teacher_logits(h);
          if (!is_.has_kl(h)) continue;
          Parts<Vec<Acc>> sums{};
          chunk_.each(
              [&](int64_t i, Vec<Acc> keep) { sums.add(taught_parts<kind>(h, i).parts, keep); });
          joint.sums[h] = sums;
        }
      }
      if (!is_.taught) {
        chunk_.each([&](int64_t i, Vec<Acc> keep) {
          of_label += joint_parts<kind>(i, joint) * keep;
          for (int64_t h = 0; h < n_; ++h) joint.sums[h].add(joint.parts[h], keep);
        });
      }
      label_kl_ += static_cast<double>(sum_lanes<Acc>(of_label));
      for (int64_t h = 0; h < n_; ++h) {
        running_[h].kl += static_cast<double>(sum_lanes<Acc>(joint.sums[h].value));
        running_[h].head_parts += static_cast<double>(sum_lanes<Acc>(joint.sums[h].head));
        running_[h].teacher_parts += static_cast<double>(sum_lanes<Acc>(joint.sums[h].teacher));
      }
    }
  }

  // One vector of classes of all heads, and sums.
  struct Joint {
    Vec<Acc>*log_p, *p;
    Parts<Vec<Acc>>*parts, *sums;

    Joint(Scratch& scratch, int64_t n)
        : log_p(scratch.get<Vec<Acc>>(n)),
          p(scratch.get<Vec<Acc>>(n)),
          parts(scratch.get<Parts<Vec<Acc>>>(n)),
          sums(scratch.get<Parts<Vec<Acc>>>(n)) {}
  };

  IMCL_INLINE Vec<Acc> p_of(int64_t h, int64_t i) const {
    return tempered(h, i) * splat(running_[h].inverse_tempered);
  }

  // Of heads that have no teacher but one another, and the label; returns its KL.
  template <Divergence kind>
  IMCL_INLINE Vec<Acc> joint_parts(int64_t i, Joint& joint) const {
    const Mixed<Acc> part(group_);
    for (int64_t h = 0; h < n_; ++h) {
      joint.log_p[h] = log_p(h, i);
      joint.p[h] = p_of(h, i);
    }
    if constexpr (kind == Divergence::kMixture) {
      return mixture_parts<Acc>(n_, joint.log_p, joint.p, shares_, part, load(soft_ + i),
                                joint.parts);
    } else {
      pairwise_parts<kind, Acc>(n_, joint.log_p, joint.p, shares_, part, joint.parts);
      return Vec<Acc>{};
    }
  }

  struct Taught {
    Vec<Acc> p, q;
    Parts<Vec<Acc>> parts;
  };

  // Of a head whose teacher's logits are in t_.
  template <Divergence kind>
  IMCL_INLINE Taught taught_parts(int64_t h, int64_t i) const {
    const Running& run = running_[h];
    const Vec<Acc> log_p = this->log_p(h, i), p = p_of(h, i);
    const Vec<Acc> log_q = load(t_ + i) - splat(run.teacher_max) - splat(run.log_teacher);
    const Vec<Acc> q = kept_ ? load(teacher(h) + i) * splat(run.inverse_teacher) : exp_of(log_q);
    return {p, q, parts_of<kind>(log_q, q, log_p, p, Mixed<Acc>(group_))};
  }

  // To dz (heads, size); of teachers that aren't detached also what goes into them, to own and sum.
  template <Divergence kind>
  void add_other(Scale scale, Acc* dz, Acc* own, Acc* sum) {
    Scratch scratch;
    Joint joint(scratch, n_);
    const int64_t size = chunk_.size, padded = chunk_.padded();
    if constexpr (kind != Divergence::kMixture) {
      for (int64_t h = 0; is_.taught && h < n_; ++h) {
        const Running& run = running_[h];
        if (h == 0 || is_.own_teacher) teacher_logits(h);
        Acc *row = dz + h * size, *into = own + h * size;
        if (!is_.has_kl(h)) {
          std::fill_n(into, padded, Acc(0));
          continue;
        }
        const Vec<Acc> weight = splat(static_cast<Acc>(kl_scale(h, scale.kl)));
        const Vec<Acc> head_sum = splat(static_cast<Acc>(run.head_parts));
        const Vec<Acc> teacher_sum = splat(static_cast<Acc>(run.teacher_parts));
        for (int64_t i = 0; i < padded; i += width) {
          const Taught of = taught_parts<kind>(h, i);
          store(row + i, load(row + i) + pull(weight, of.parts.head, of.p, head_sum));
          if (group_.detach) continue;
          const Vec<Acc> passed = pull(weight, of.parts.teacher, of.q, teacher_sum);
          store(into + i, passed);
          store(sum + i, load(sum + i) + passed);
        }
      }
      if (is_.taught) return;
    }
    const double all = group_.temperature * scale.kl;
    for (int64_t i = 0; i < padded; i += width) {
      joint_parts<kind>(i, joint);
      for (int64_t h = 0; h < n_; ++h) {
        const Running& run = running_[h];
        // The label's scale is not a number where a label is unknown.
        const double weight =
            is_.mixture ? head(h).kl_weight * scale.cross_entropy : kl_scale(h, scale.kl);
        Vec<Acc> d = pull(splat(static_cast<Acc>(weight)), joint.parts[h].head, joint.p[h],
                          splat(static_cast<Acc>(run.head_parts)));
        if (is_.pairwise && !group_.detach)
          d += pull(splat(static_cast<Acc>(all)), joint.parts[h].teacher, joint.p[h],
                    splat(static_cast<Acc>(run.teacher_parts)));
        store(dz + h * size + i, load(dz + h * size + i) + d);
      }
    }
  }

  double kl_scale(int64_t h, double scale) const {
    return is_.has_kl(h) ? head(h).kl_weight * group_.temperature * scale : 0.0;
  }

  // weight / sum; of no weight 0, even where all classes are masked.
  static Vec<Acc> quotient(double weight, double sum) {
    return splat(static_cast<Acc>(weight == 0 ? 0.0 : weight / sum));
  }

  // Cross entropy and KL of one head; what other heads need of it into own and sum.
  void gradient_of_head(int64_t h, Scale scale, Acc* dz, Acc* own, Acc* sum) {
    const Running& run = running_[h];
    const Labels& labels = problem_.labels;
    double ce = is_.labelled ? head(h).ce_weight * scale.cross_entropy : 0.0;
    const double kl = is_.other ? 0.0 : kl_scale(h, scale.kl);
    const bool taught = is_.taught && !is_.other;
    if (labels.weight && labels.target && !soft_ && target_is_valid()) ce *= label_weight();
    const Vec<Acc> uniform = splat(static_cast<Acc>(
        soft_ ? 0.0 : ce * labels.smoothing / static_cast<double>(problem_.classes)));
    const Vec<Acc> of_plain = quotient(soft_ ? ce * label_size_ : ce, run.plain.sum);
    if (!is_.kl) {
      for (int64_t i = 0; i < chunk_.padded(); i += width)
        put(dz, i, is_.labelled ? plain(h, i) * of_plain - uniform : Vec<Acc>{});
    } else {
      Acc* q = teacher(h);
      if (taught && (!kept_ || !group_.detach) && (h == 0 || is_.own_teacher)) {
        teacher_logits(h);
        if (!kept_) {
          for (int64_t i = 0; i < chunk_.padded(); i += width)
            store(q + i, exp_of(load(t_ + i) - splat(run.teacher_max)));
        }
      }
      const Vec<Acc> of_tempered = quotient(is_.pairwise ? 0.0 : kl, run.tempered);
      const Vec<Acc> of_teacher = quotient(taught ? kl : 0.0, run.teacher_sum);
      if (is_.squared) {
        for (int64_t i = 0; i < chunk_.padded(); i += width) {
          const Vec<Acc> e = tempered(h, i);
          Vec<Acc> d = e * (e * of_plain + of_tempered) - uniform;
          if (taught) d -= load(q + i) * of_teacher;
          put(dz, i, d);
        }
      } else {
        for (int64_t i = 0; i < chunk_.padded(); i += width) {
          Vec<Acc> d = tempered(h, i) * of_tempered - uniform;
          if (is_.labelled) d += plain(h, i) * of_plain;
          if (taught) d -= load(q + i) * of_teacher;
          put(dz, i, d);
        }
      }
      if (is_.pairwise && !is_.other) keep_pairwise(h, kl, own, sum);
      else if (taught && !group_.detach) keep_teacher(h, q, of_teacher, own, sum);
    }
    if (soft_ && is_.labelled) {
      const auto factor = static_cast<Acc>(ce);
      for (int64_t i = 0; i < chunk_.count; ++i) dz[i] -= factor * soft_[i];
    } else if (is_.labelled) {
      const int64_t y = target() - chunk_.first;
      if (y >= 0 && y < chunk_.count) dz[y] -= static_cast<Acc>(ce * (1 - labels.smoothing));
    }
  }

  // own = p_h; sum += p_h; sum[size:] += kl_h log p_h.
  void keep_pairwise(int64_t h, double kl, Acc* own, Acc* sum) const {
    const Vec<Acc> inverse = splat(static_cast<Acc>(1 / running_[h].tempered));
    Acc* weighted = sum + chunk_.size;
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      const Vec<Acc> p = tempered(h, i) * inverse;
      store(own + i, p);
      store(sum + i, load(sum + i) + p);
      if (!group_.detach)
        store(weighted + i, load(weighted + i) + finite(log_p(h, i)) * splat(static_cast<Acc>(kl)));
    }
  }

  // own = T kl_h q_h (log q_h - log p_h - KL_h), what goes into t_h; sum += own.
  void keep_teacher(int64_t h, const Acc* q, Vec<Acc> of_teacher, Acc* own, Acc* sum) const {
    const Running& run = running_[h];
    const Vec<Acc> shift = splat(run.teacher_max);
    const Vec<Acc> rest = splat(static_cast<Acc>(std::log(run.teacher_sum) + run.kl));
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      const Vec<Acc> gap = (load(t_ + i) - shift) - rest - log_p(h, i);
      const Vec<Acc> weight = load(q + i) * of_teacher, into = unless_0(weight, weight * gap);
      store(own + i, into);
      store(sum + i, load(sum + i) + into);
    }
  }

  void add_pairwise(int64_t h, double scale, Acc* dz, const Acc* p, const Acc* sum) const {
    const double weight = kl_scale(h, scale);
    double weights = 0;
    for (int64_t j = 0; j < n_; ++j) weights += kl_scale(j, scale);
    const Vec<Acc> kl = splat(static_cast<Acc>(weight));
    const Vec<Acc> others = splat(static_cast<Acc>(1.0 / static_cast<double>(n_ - 1)));
    const Vec<Acc> weight_sum = splat(static_cast<Acc>(weights));
    const Vec<Acc> toward =
        splat(static_cast<Acc>(running_[h].toward * group_.temperature * scale));
    const Acc* weighted = sum + chunk_.size;
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      const Vec<Acc> p_h = load(p + i);
      Vec<Acc> d = unless_0(kl, kl * (p_h - (load(sum + i) - p_h) * others));
      if (!group_.detach)
        d += unless_0(p_h, p_h * others * (weight_sum * log_p(h, i) - load(weighted + i) - toward));
      store(dz + i, load(dz + i) + d);
    }
  }

  void add_teacher(int64_t h, Acc* dz, const Acc* own, const Acc* sum) const {
    if (group_.teacher == Teacher::kFinal && h < n_ - 1) return;
    const double average = group_.teacher == Teacher::kFinal ? 1.0
                           : is_.own_teacher                 ? 1.0 / static_cast<double>(n_ - 1)
                                                             : 1.0 / static_cast<double>(n_);
    const Vec<Acc> factor = splat(static_cast<Acc>(average));
    for (int64_t i = 0; i < chunk_.padded(); i += width) {
      const Vec<Acc> into = is_.own_teacher ? load(sum + i) - load(own + i) : load(sum + i);
      store(dz + i, load(dz + i) + into * factor);
    }
  }

  Scratch scratch_;
  const Consistency& problem_;
  const Group& group_;
  const int64_t sample_, n_;
  const Roles is_;
  const Acc inverse_t_, teacher_share_;  // t_h = (S - z_h) teacher_share, or S times it
  Chunk<T> chunk_;
  Running* running_;
  Acc *total_, *t_;                             // (size) sum of the heads; the teacher's logits
  Acc* teacher_;                                // (size), or (heads, size): exp(t - its maximum)
  Acc* soft_;                                   // (size) soft labels, or null
  Acc* shares_;                                 // (heads) of another divergence, or null
  double label_size_ = 0;                       // their sum over all classes
  double label_kl_ = 0;                         // of the label to the mixture
  Acc *plain_ = nullptr, *tempered_ = nullptr;  // (heads, size) exponentials, if kept
  bool kept_ = false;     // one chunk holds all classes, and a gradient is wanted
  bool extreme_ = false;  // some logit seen so far is
};

// Asks for the rows of the next sample and for those of the gradient that this one will write:
// the hardware doesn't foresee where the next row of each head begins.
template <class T>
void prefetch_rows(const Consistency& problem, int64_t sample) {
  constexpr int64_t kLine = 64, kMostBytes = 16384;  // beyond, the hardware has caught up
  const auto ask = [&](const void* base, int64_t row, int64_t size, auto write) {
    const char* from = static_cast<const char*>(base) + row * size;
    const int64_t bytes = std::min(problem.classes * size, kMostBytes);
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i, write.value, 2);
  };
  for (const Head& head : problem.heads) {
    if (head.z_class == 1 && sample + 1 < problem.batch)
      ask(head.z, problem.samples.offset(sample + 1, head.z_sample), sizeof(T), std::false_type{});
    if (head.dz && head.dz_class == 1)
      ask(head.dz, problem.samples.offset(sample, head.dz_sample), sizeof(KeptOf<T>),
          std::true_type{});
  }
}

template <class T>
void sample_of(const Consistency& problem, int64_t sample, Scale scale, double* cross_entropy,
               double* kl) {
  const bool wants_gradient = problem.heads.front().dz != nullptr;
  prefetch_rows<T>(problem, sample);
  for (const Group& group : problem.groups) {
    Work<T> work(problem, group, sample, wants_gradient);
    work.read();
    work.terms(cross_entropy + group.first, kl + group.first);
    if (wants_gradient) work.gradient(scale);
  }
}

void sample(const Consistency& problem, int64_t index, Scale scale, double* cross_entropy,
            double* kl) {
  with_type(problem.dtype, [&](auto* z) {
    sample_of<std::remove_pointer_t<decltype(z)>>(problem, index, scale, cross_entropy, kl);
  });
}

// Samples of a block in lanes, or 0 where one by one is quicker.
template <class T>
int64_t block_of(const Consistency& problem) {
  constexpr int64_t width = kLanes<AccOf<T>>;
  constexpr int64_t kMost = 64, kFewClasses = 32, kMostClasses = 4096;
  constexpr int64_t kBytes = int64_t{128} << 10;  // of the block's logits
  bool spread = false;
  int64_t rows = 0;
  for (const Head& head : problem.heads) spread = spread || head.z_class != 1;
  for (const Group& group : problem.groups) rows = std::max(rows, group.size);
  if (problem.labels.soft()) ++rows;
  const bool few = problem.classes <= (spread ? kMostClasses : kFewClasses);
  if (!problem.binary && (problem.batch < width || !few)) return 0;
  int64_t block = kMost;
  const int64_t each = rows * problem.classes * static_cast<int64_t>(sizeof(AccOf<T>));
  while (block > width && block * each > kBytes) block /= 2;
  return block;
}

template <class T>
void samples_of(const Consistency& problem, int64_t first, int64_t count, const Scale* scales,
                double* sums, double* losses) {
  constexpr int64_t width = kLanes<AccOf<T>>;
  const bool wants_gradient = problem.heads.front().dz != nullptr;
  for (const Group& group : problem.groups)
    Lanes<T>(problem, group, first, count, (count + width - 1) / width * width, scales,
             wants_gradient)
        .run(sums, losses);
}

int64_t block(const Consistency& problem) {
  return with_type(problem.dtype,
                   [&](auto* z) { return block_of<std::remove_pointer_t<decltype(z)>>(problem); });
}

void samples(const Consistency& problem, int64_t first, int64_t count, const Scale* scales,
             double* sums, double* losses) {
  with_type(problem.dtype, [&](auto* z) {
    samples_of<std::remove_pointer_t<decltype(z)>>(problem, first, count, scales, sums, losses);
  });
}

}  // namespace

extern const ConsistencyKernels consistency_kernels;
const ConsistencyKernels consistency_kernels = {sample, block, samples};

}  // namespace IMCL_ISA
}  // namespace imcl
