// The same of several samples at a time, one in each lane of a vector: for pixels, whose classes
// lie far apart, and for few classes, of which a vector would be half empty.
//
// A block of samples is read into [head][class][sample] as it lies, along the samples or along
// the classes, and its gradient is written back from there. What consistency_kernels.cpp has as
// numbers of a head are vectors here, and there are no chunks: all classes are at hand.
//
// Loops over the classes keep what they need in locals: a store could change any member.
#pragma once

#include <algorithm>

#include "consistency.h"
#include "consistency_divergences.h"
#include "exp.h"
#include "logits.h"
#include "scratch.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

// Values of strided samples, to and from [class][sample], `pitch` samples to a class.
template <class T>
struct ClassMajor {
  using Acc = AccOf<T>;
  static constexpr int width = kLanes<Acc>;

  const int64_t* offsets;  // of each of `count` samples
  int64_t count, class_stride, classes, pitch;

  bool adjacent(int64_t first) const {
    if (first + width > count) return false;
    for (int lane = 1; lane < width; ++lane)
      if (offsets[first + lane] != offsets[first] + lane) return false;
    return true;
  }

  void read(const T* from, Acc* to) const {
    int64_t first = 0;
    for (; first < count; first += width) {
      const auto lanes = static_cast<int>(std::min<int64_t>(width, count - first));
      if (adjacent(first)) {
        for (int64_t k = 0; k < classes; ++k)
          store(to + k * pitch + first, load_acc(from + offsets[first] + k * class_stride));
        continue;
      }
      int64_t k = 0;
      if (class_stride == 1 && lanes == width) {
        for (; k + width <= classes; k += width) {
          Vec<Acc> rows[width];
          for (int lane = 0; lane < width; ++lane)
            rows[lane] = load_acc(from + offsets[first + lane] + k);
          transpose<Acc>(rows);
          for (int i = 0; i < width; ++i) store(to + (k + i) * pitch + first, rows[i]);
        }
      }
      for (; k < classes; ++k)
        for (int lane = 0; lane < lanes; ++lane)
          to[k * pitch + first + lane] = to_acc(from[offsets[first + lane] + k * class_stride]);
    }
  }

  void write(const Acc* from, KeptOf<T>* to) const {
    for (int64_t first = 0; first < count; first += width) {
      const auto lanes = static_cast<int>(std::min<int64_t>(width, count - first));
      if (adjacent(first)) {
        for (int64_t k = 0; k < classes; ++k)
          store_acc(to + offsets[first] + k * class_stride, load(from + k * pitch + first));
        continue;
      }
      int64_t k = 0;
      if (class_stride == 1 && lanes == width) {
        for (; k + width <= classes; k += width) {
          Vec<Acc> rows[width];
          for (int i = 0; i < width; ++i) rows[i] = load(from + (k + i) * pitch + first);
          transpose<Acc>(rows);
          for (int lane = 0; lane < width; ++lane)
            store_acc(to + offsets[first + lane] + k, rows[lane]);
        }
      }
      for (; k < classes; ++k)
        for (int lane = 0; lane < lanes; ++lane)
          to[offsets[first + lane] + k * class_stride] =
              from_acc<KeptOf<T>>(from[k * pitch + first + lane]);
    }
  }
};

// One group of heads on a block of samples.
template <class T>
class Lanes {
 public:
  using Acc = AccOf<T>;
  using V = Vec<Acc>;
  static constexpr int width = kLanes<Acc>;

  // Samples [first, first + count), count <= pitch, a multiple of the width.
  Lanes(const Consistency& problem, const Group& group, int64_t first, int64_t count, int64_t pitch,
        const Scale* scales, bool wants_gradient)
      : problem_(problem),
        labels_(problem.labels),
        group_(group),
        first_(first),
        count_(count),
        pitch_(pitch),
        n_(group.size),
        classes_(problem.classes),
        given_(problem.binary ? 1 : classes_),
        scales_(scales),
        gradient_(wants_gradient),
        is_(labels_, group),
        inverse_t_(static_cast<Acc>(1 / group.temperature)),
        uniform_(static_cast<Acc>(labels_.smoothing / static_cast<double>(classes_))),
        sharp_(static_cast<Acc>(1 - labels_.smoothing)),
        offsets_(scratch_.get<int64_t>(pitch)),
        indices_(labels_.target ? scratch_.get<int64_t>(pitch) : nullptr),
        z_(scratch_.get<Acc>(n_ * classes_ * pitch)),
        y_(is_.soft ? scratch_.get<Acc>(classes_ * pitch) : nullptr),
        heads_(scratch_.get<State>(n_)),
        tempered_(is_.kl ? scratch_.get<V>(n_ * classes_) : nullptr),
        plain_(is_.plain ? scratch_.get<V>(n_ * classes_) : nullptr),
        teacher_(is_.taught ? scratch_.get<V>(teachers() * classes_) : nullptr),
        t_(is_.taught ? scratch_.get<V>(teachers() * classes_) : nullptr),
        log_p_(is_.pairwise || is_.other ? scratch_.get<V>(n_) : nullptr),
        parts_(is_.other ? scratch_.get<Parts<V>>(n_) : nullptr),
        p_(is_.other ? scratch_.get<V>(2 * n_) : nullptr),
        shares_(is_.other ? scratch_.get<Acc>(n_) : nullptr) {
    if (is_.other) shares_of(problem, group, shares_);
  }

  // Adds, in their order, the weighted terms of these samples to sums (2, heads) of the problem,
  // and to each sample's loss in `losses` unless it is null; writes their gradients.
  void run(double* sums, double* losses) {
    for (int64_t h = 0; h < n_; ++h) {
      const Head& from = head(h);
      locate(from.z_sample);
      class_major<T>(from.z_class, given_).read(static_cast<const T*>(from.z), z_of(h, 0));
      if (given_ < classes_) std::fill_n(z_of(h, given_), pitch_, Acc(0));
    }
    if (is_.soft && labels_.probabilities) {
      locate(labels_.probability_sample);
      class_major<Acc>(labels_.probability_class, classes_)
          .read(static_cast<const Acc*>(labels_.probabilities), y_);
    }
    if (labels_.target) {
      locate(labels_.target_sample);
      for (int64_t i = 0; i < count_; ++i) indices_[i] = labels_.target[offsets_[i]];
    }
    for (int64_t lane = 0; lane < count_; lane += width) {
      at_ = lane;
      read_labels();
      mask();
      statistics();
      if (is_.other) other_divergences();
      else if (is_.pairwise) divergences();
      terms(sums, losses);
      if (gradient_) gradient();
    }
    for (int64_t h = 0; gradient_ && h < n_; ++h) {
      const Head& to = head(h);
      locate(to.dz_sample);
      class_major<T>(to.dz_class, given_).write(z_of(h, 0), static_cast<KeptOf<T>*>(to.dz));
    }
  }

 private:
  // What is known of one head, of each lane's sample.
  struct State {
    V shift;            // its maximum; 0 where all classes are masked
    V plain, tempered;  // sums of exp(z - shift) and exp((z - shift) / T)
    V label_logit;      // sum of y (z - shift), y the soft labels or 1/K
    V teacher;          // sum of q = exp(t - its maximum)
    V log_tempered, kl, toward;
    V head_sum, teacher_sum, log_teacher;                 // of another divergence
    V of_plain, of_tempered, of_teacher, rest, kl_scale;  // of the gradient
  };

  const Head& head(int64_t h) const {
    return problem_.heads[static_cast<std::size_t>(group_.first + h)];
  }
  int64_t teachers() const { return is_.own_teacher ? n_ : 1; }
  Acc* z_of(int64_t h, int64_t k) const { return z_ + (h * classes_ + k) * pitch_; }
  IMCL_INLINE V z(int64_t h, int64_t k) const { return load(z_of(h, k) + at_); }
  IMCL_INLINE V shifted(int64_t h, int64_t k) const { return z(h, k) - heads_[h].shift; }
  IMCL_INLINE V log_p(int64_t h, int64_t k) const {
    return shifted(h, k) * splat(inverse_t_) - heads_[h].log_tempered;
  }
  static V finite(V x) { return max_vector(splat(std::numeric_limits<Acc>::lowest()), x); }

  void locate(const Strides& strides) {
    Walk sample(problem_.samples, first_);
    for (int64_t i = 0; i < count_; ++i) {
      offsets_[i] = sample.offset(strides);
      sample.next();
    }
  }
  template <class From>
  ClassMajor<From> class_major(int64_t class_stride, int64_t classes) const {
    return {offsets_, count_, class_stride, classes, pitch_};
  }

  // ---- what is given of the lanes ----

  // Their weights, indices and labels. A lane without a sample is one that doesn't count.
  void read_labels() {
    ce_scale_ = kl_scale_ = V{};
    size_ = splat(Acc(1));
    for (int lane = 0; lane < width; ++lane) {
      const int64_t i = at_ + lane;
      counts_[lane] = i < count_ && scales_[i].share != 0;
      index_[lane] = 0;
      if (!counts_[lane]) continue;
      ce_scale_[lane] = static_cast<Acc>(scales_[i].cross_entropy);
      kl_scale_[lane] = static_cast<Acc>(scales_[i].kl);
      if (!labels_.target) continue;
      index_[lane] = indices_[i];
      if (index_[lane] >= 0 && index_[lane] < classes_) {
        if (labels_.weight && !is_.soft) size_[lane] = class_weight(index_[lane]);
      } else {
        index_[lane] = -1;
        ce_scale_[lane] = std::numeric_limits<Acc>::quiet_NaN();
      }
    }
    if (!is_.soft) return;
    size_ = V{};
    for (int64_t k = 0; k < classes_; ++k) {
      V y = {};
      if (labels_.probabilities) y = load(y_ + k * pitch_ + at_);
      else
        for (int lane = 0; lane < width; ++lane) y[lane] = index_[lane] == k;
      y = y * splat(sharp_) + splat(uniform_);
      if (labels_.weight) y *= splat(class_weight(k));
      for (int lane = 0; lane < width; ++lane)
        if (!counts_[lane]) y[lane] = 0;
      store(y_ + k * pitch_ + at_, y);
      size_ += y;
    }
  }

  Acc class_weight(int64_t k) const {
    return static_cast<const Acc*>(labels_.weight)[k * labels_.weight_stride];
  }

  // The lowest number becomes -inf; samples that don't count 0, for they may hold anything.
  void mask() {
    const int64_t rows = n_ * classes_, pitch = pitch_;
    Acc* place = z_ + at_;
    for (int64_t i = 0; i < rows; ++i, place += pitch) {
      const V x = load(place);
      store(place, x <= splat(kLowest<T>) ? splat(kMasked<Acc>) : x);
    }
    for (int lane = 0; lane < width; ++lane)
      if (!counts_[lane])
        for (int64_t i = 0; i < n_ * classes_; ++i) z_[i * pitch_ + at_ + lane] = 0;
  }

  // ---- the sums of every head ----

  void statistics() {
    for (int64_t h = 0; h < n_; ++h) sum_head(h);
    for (int64_t h = 0; is_.taught && h < n_; ++h) {
      if (h == 0 || is_.own_teacher) sum_teacher(h);
      if (is_.other) heads_[h].log_teacher = log_of(heads_[is_.teacher_of(h)].teacher);
      else if (is_.has_kl(h)) sum_gap(h);
    }
  }

  static V max_of(const Acc* x, int64_t classes, int64_t pitch) {
    V max = splat(kMasked<Acc>);
    for (int64_t k = 0; k < classes; ++k) max = max_vector(load(x + k * pitch), max);
    return max;
  }
  static V shift_of(V max) { return max == splat(kMasked<Acc>) ? V{} : max; }

  void sum_head(int64_t h) {
    State& state = heads_[h];
    state.shift = shift_of(max_of(z_of(h, 0) + at_, classes_, pitch_));
    V plain = {}, tempered = {};
    const Acc* z = z_of(h, 0) + at_;
    const V shift = state.shift, inverse_t = splat(inverse_t_);
    const int64_t classes = classes_, pitch = pitch_;
    if (is_.kl) {
      V* kept = tempered_ + h * classes;
      for (int64_t k = 0; k < classes; ++k) {
        const V e = exp_of((load(z + k * pitch) - shift) * inverse_t);
        kept[k] = e;
        tempered += e;
        plain += e * e;  // what it should be at T = 2 only
      }
    }
    if (is_.plain) {
      V* kept = plain_ + h * classes;
      plain = V{};
      for (int64_t k = 0; k < classes; ++k) {
        const V e = exp_of(load(z + k * pitch) - shift);
        kept[k] = e;
        plain += e;
      }
    }
    state.plain = plain;
    state.tempered = tempered;
    state.log_tempered = is_.kl ? log_of(tempered) : V{};
    state.kl = state.toward = state.label_logit = V{};
    const V of_class = splat(static_cast<Acc>(1.0 / static_cast<double>(classes_)));
    for (int64_t k = 0; is_.summed && k < classes_; ++k) {
      const V y = is_.soft ? load(y_ + k * pitch_ + at_) : of_class;
      state.label_logit += unless_0(y, y * shifted(h, k));
    }
  }

  // The teacher of head h, or of all: t less its maximum, and exp of that.
  void sum_teacher(int64_t h) {
    V *t = t_ + h * classes_, *q = teacher_ + h * classes_;
    const double averaged = static_cast<double>(is_.own_teacher ? n_ - 1 : n_);
    const V teacher_share = splat(static_cast<Acc>(1 / (group_.temperature * averaged)));
    V max = splat(kMasked<Acc>), sum = {};
    const int64_t classes = classes_, pitch = pitch_, head = classes * pitch, n = n_;
    const int64_t left_out = is_.own_teacher ? h : -1;
    const bool final = group_.teacher == Teacher::kFinal;
    const V factor = final ? splat(inverse_t_) : teacher_share;
    for (int64_t k = 0; k < classes; ++k) {
      const Acc* z = z_ + k * pitch + at_;
      V x = {};
      for (int64_t j = final ? n - 1 : 0; j < n; ++j)
        if (j != left_out) x += load(z + j * head) * factor;
      t[k] = x;
      max = max_vector(x, max);
    }
    const V shift = shift_of(max);
    for (int64_t k = 0; k < classes; ++k) {
      const V x = t[k] - shift, e = exp_of(x);
      t[k] = x;
      q[k] = e;
      sum += e;
    }
    heads_[h].teacher = sum;
  }

  // Both differences of a gap are small where they weigh most: nothing large is cancelled.
  void sum_gap(int64_t h) {
    State& state = heads_[h];
    const int64_t by = is_.teacher_of(h);
    const V *t = t_ + by * classes_, *q = teacher_ + by * classes_;
    const Acc* z = z_of(h, 0) + at_;
    const V shift = state.shift, inverse_t = splat(inverse_t_);
    V gap = {};
    for (int64_t k = 0; k < classes_; ++k)
      gap += unless_0(q[k], q[k] * (t[k] - (load(z + k * pitch_) - shift) * inverse_t));
    const V sum = heads_[by].teacher;
    state.rest = log_of(sum);
    state.kl = gap / sum - state.rest + state.log_tempered;
  }

  // Pairwise teachers need the normalised p_j, so a second look at the logits.
  void divergences() {
    Acc weights = 0;
    for (int64_t h = 0; h < n_; ++h) weights += static_cast<Acc>(head(h).kl_weight);
    const V others = splat(static_cast<Acc>(1.0 / static_cast<double>(n_ - 1)));
    for (int64_t k = 0; k < classes_; ++k) {
      V entropy = {}, sum = {}, weighted = {};
      for (int64_t h = 0; h < n_; ++h) {
        const V lp = log_p_[h] = log_p(h, k);
        const V p = tempered_[h * classes_ + k] / heads_[h].tempered;
        sum += p;
        entropy += p * finite(lp);
        weighted += finite(lp) * splat(static_cast<Acc>(head(h).kl_weight));
      }
      for (int64_t h = 0; h < n_; ++h) {
        State& state = heads_[h];
        state.kl += unless_0(sum, entropy - sum * log_p_[h]) * others;
        if (group_.detach) continue;
        const V p = tempered_[h * classes_ + k] / state.tempered;
        state.toward += unless_0(p, p * (log_p_[h] * splat(weights) - weighted));
      }
    }
  }

  void terms(double* sums, double* losses) const {
    const auto t2 = static_cast<Acc>(group_.temperature * group_.temperature);
    const auto heads = static_cast<int64_t>(problem_.heads.size());
    for (int64_t h = 0; h < n_; ++h) {
      const State& state = heads_[h];
      V ce = is_.mixture ? label_kl_ : V{};
      if (is_.labelled) {
        const V log_sum = log_of(state.plain);
        if (is_.soft) {
          ce = unless_0(size_, size_ * log_sum) - state.label_logit;
        } else {
          V of_label = {};
          for (int lane = 0; lane < width; ++lane)
            of_label[lane] = z_of(h, std::max<int64_t>(index_[lane], 0))[at_ + lane];
          ce = log_sum - (of_label - state.shift);
          if (labels_.smoothing > 0)
            ce = splat(sharp_) * ce +
                 splat(static_cast<Acc>(labels_.smoothing)) * (log_sum - state.label_logit);
          if (labels_.weight) ce = unless_0(size_, size_ * ce);
        }
      }
      const V kl = is_.has_kl(h) ? state.kl * splat(t2) : V{};
      for (int lane = 0; lane < width; ++lane) {
        if (!counts_[lane]) continue;
        const Scale& scale = scales_[at_ + lane];
        const double of_ce = index_[lane] < 0 ? std::numeric_limits<double>::quiet_NaN()
                                              : static_cast<double>(ce[lane]);
        const double ce_term = scale.share * of_ce;
        const double kl_term = scale.share * static_cast<double>(kl[lane]);
        sums[group_.first + h] += ce_term;
        sums[heads + group_.first + h] += kl_term;
        if (losses)
          losses[at_ + lane] +=
              weighted(head(h).ce_weight, ce_term) + weighted(head(h).kl_weight, kl_term);
      }
    }
  }

  // ---- the gradient, in place of the logits ----

  static V quotient(V weight, V sum) { return weight == V{} ? V{} : weight / sum; }

  void gradient() {
    V weights = {};  // of pairwise teachers
    for (int64_t h = 0; h < n_; ++h) {
      State& state = heads_[h];
      const V ce = splat(static_cast<Acc>(head(h).ce_weight)) * ce_scale_ * size_;
      const V kl = is_.has_kl(h)
                       ? splat(static_cast<Acc>(head(h).kl_weight * group_.temperature)) * kl_scale_
                       : V{};
      const V teacher = is_.taught ? heads_[is_.teacher_of(h)].teacher : splat(Acc(1));
      state.of_plain = is_.labelled ? quotient(ce, state.plain) : V{};
      state.of_tempered = is_.kl ? quotient(kl, state.tempered) : V{};
      state.of_teacher = quotient(kl, teacher);
      state.rest += state.kl;
      state.kl_scale = kl;
      weights += kl;
    }
    if (is_.other) {
      gradient_of_other();
    } else if (is_.pairwise || (is_.taught && !group_.detach)) {
      for (int64_t k = 0; k < classes_; ++k) gradient_of_class(k, weights);
    } else {
      for (int64_t h = 0; h < n_; ++h) gradient_of_head(h);
    }
    if (!is_.labelled || is_.soft) return;
    for (int lane = 0; lane < width; ++lane) {
      const int64_t y = index_[lane];
      if (!counts_[lane] || y < 0) continue;
      for (int64_t h = 0; h < n_; ++h)
        z_of(h, y)[at_ + lane] -=
            static_cast<Acc>(head(h).ce_weight) * ce_scale_[lane] * size_[lane] * sharp_;
    }
  }

  // Where no head needs another's: without a KL, or of teachers that are detached.
  void gradient_of_head(int64_t h) {
    const State& state = heads_[h];
    const int64_t classes = classes_, pitch = pitch_;
    const V of_plain = state.of_plain, of_tempered = state.of_tempered;
    const V of_teacher = state.of_teacher;
    const V ce = splat(static_cast<Acc>(head(h).ce_weight)) * ce_scale_;
    const V uniform = is_.labelled && !is_.soft ? ce * size_ * splat(uniform_) : V{};
    const V* tempered = is_.kl ? tempered_ + h * classes : nullptr;
    const V* plain = is_.plain ? plain_ + h * classes : nullptr;
    const V* q = is_.taught ? teacher_ + is_.teacher_of(h) * classes : nullptr;
    Acc* out = z_of(h, 0) + at_;
    for (int64_t k = 0; k < classes; ++k) {
      V dz = V{} - uniform;
      if (plain) dz += plain[k] * of_plain;
      if (tempered) {
        const V e = tempered[k];
        dz += plain ? e * of_tempered : e * (e * of_plain + of_tempered);
      }
      if (q) dz -= q[k] * of_teacher;
      store(out + k * pitch, dz);
    }
    if (!is_.soft) return;
    const Acc* y = y_ + at_;
    for (int64_t k = 0; k < classes; ++k)
      store(out + k * pitch, load(out + k * pitch) - ce * load(y + k * pitch));
  }

  // Where a head needs the others': pairwise teachers, and those that aren't detached.
  void gradient_of_class(int64_t k, V weights) {
    V sum = {}, passed = {};  // over the heads: of p and of kl log p; of what goes into teachers
    if (is_.pairwise) {
      for (int64_t h = 0; h < n_; ++h) {
        log_p_[h] = log_p(h, k);
        sum += tempered_[h * classes_ + k] / heads_[h].tempered;
        if (!group_.detach) passed += finite(log_p_[h]) * heads_[h].kl_scale;
      }
    } else {
      for (int64_t h = 0; h < n_; ++h) passed += into_teacher(h, k);
    }
    const double averaged = static_cast<double>(is_.own_teacher || is_.pairwise ? n_ - 1 : n_);
    const V average = splat(static_cast<Acc>(1 / averaged));
    for (int64_t h = 0; h < n_; ++h) {
      const State& state = heads_[h];
      const int64_t i = h * classes_ + k, by = is_.own_teacher ? i : k;
      V dz = {};
      if (is_.labelled) {
        const V e = is_.squared ? tempered_[i] * tempered_[i] : plain_[i];
        const V ce = splat(static_cast<Acc>(head(h).ce_weight)) * ce_scale_;
        dz = e * state.of_plain -
             ce * (is_.soft ? load(y_ + k * pitch_ + at_) : size_ * splat(uniform_));
      }
      if (is_.pairwise) {
        const V p = tempered_[i] / state.tempered;
        dz += unless_0(state.kl_scale, state.kl_scale * (p - (sum - p) * average));
        if (!group_.detach) {
          const V toward = state.toward * splat(static_cast<Acc>(group_.temperature)) * kl_scale_;
          dz += unless_0(p, p * average * (weights * log_p_[h] - passed - toward));
        }
      } else {
        dz += tempered_[i] * state.of_tempered - teacher_[by] * state.of_teacher;
        if (is_.own_teacher) dz += (passed - into_teacher(h, k)) * average;
        else if (group_.teacher == Teacher::kMean) dz += passed * average;
        else if (h == n_ - 1) dz += passed;
      }
      // In place, but for what later heads of this class still need.
      pending_[h] = dz;
    }
    for (int64_t h = 0; h < n_; ++h) store(z_of(h, k) + at_, pending_[h]);
  }

  // ---- other divergences than KL ----

  void other_divergences() {
    label_kl_ = V{};
    for (int64_t h = 0; h < n_; ++h) heads_[h].head_sum = heads_[h].teacher_sum = V{};
    as_constant(group_.divergence, [&](auto kind) {
      for (int64_t k = 0; k < classes_; ++k) {
        parts_of_class<kind.value>(k);
        for (int64_t h = 0; h < n_; ++h) {
          heads_[h].kl += parts_[h].value;
          heads_[h].head_sum += parts_[h].head;
          heads_[h].teacher_sum += parts_[h].teacher;
        }
      }
    });
  }

  // p_, and parts_.
  template <Divergence kind>
  void parts_of_class(int64_t k) {
    for (int64_t h = 0; h < n_; ++h) {
      log_p_[h] = log_p(h, k);
      p_[h] = tempered_[h * classes_ + k] / heads_[h].tempered;
    }
    const Mixed<Acc> part(group_);
    if constexpr (kind == Divergence::kMixture) {
      const V y = load(y_ + k * pitch_ + at_);
      label_kl_ += mixture_parts<Acc>(n_, log_p_, p_, shares_, part, y, parts_);
    } else if (is_.pairwise) {
      pairwise_parts<kind, Acc>(n_, log_p_, p_, shares_, part, parts_);
    } else {
      for (int64_t h = 0; h < n_; ++h) {
        parts_[h] = Parts<V>{};
        if (!is_.has_kl(h)) continue;
        const int64_t by = is_.teacher_of(h);
        const V q = p_[n_ + h] = teacher_[by * classes_ + k] / heads_[by].teacher;
        const V log_q = t_[by * classes_ + k] - heads_[h].log_teacher;
        parts_[h] = parts_of<kind>(log_q, q, log_p_[h], p_[h], part);
      }
    }
  }

  void gradient_of_other() {
    as_constant(group_.divergence, [&](auto kind) {
      for (int64_t k = 0; k < classes_; ++k) {
        parts_of_class<kind.value>(k);
        gradient_of_parts(k);
      }
    });
  }

  void gradient_of_parts(int64_t k) {
    const bool passes = !group_.detach && (is_.pairwise || is_.taught);
    const V into_all = splat(static_cast<Acc>(group_.temperature)) * kl_scale_;
    V passed = {};
    for (int64_t h = 0; h < n_; ++h) {
      const State& state = heads_[h];
      V& into = parts_[h].teacher;  // now what goes into the teacher of h, or into h as one
      if (passes && is_.pairwise) into = pull(into_all, into, p_[h], state.teacher_sum);
      else if (passes && is_.has_kl(h))
        into = pull(state.kl_scale, into, p_[n_ + h], state.teacher_sum);
      passed += into;
    }
    const double averaged = static_cast<double>(is_.own_teacher ? n_ - 1 : n_);
    const V average = splat(static_cast<Acc>(1 / averaged));
    for (int64_t h = 0; h < n_; ++h) {
      const State& state = heads_[h];
      const V ce = splat(static_cast<Acc>(head(h).ce_weight)) * ce_scale_;
      // The label's scale, of the same samples, is not a number where a label is unknown.
      const V scale =
          is_.mixture ? splat(static_cast<Acc>(head(h).kl_weight)) * ce_scale_ : state.kl_scale;
      V dz = pull(scale, parts_[h].head, p_[h], state.head_sum);
      if (is_.labelled) {
        const V root = tempered_[h * classes_ + k];
        const V e = is_.squared ? root * root : plain_[h * classes_ + k];
        dz += e * state.of_plain -
              ce * (is_.soft ? load(y_ + k * pitch_ + at_) : size_ * splat(uniform_));
      }
      if (passes && is_.pairwise) dz += parts_[h].teacher;
      else if (passes && is_.own_teacher) dz += (passed - parts_[h].teacher) * average;
      else if (passes && group_.teacher == Teacher::kMean) dz += passed * average;
      else if (passes && h == n_ - 1) dz += passed;
      pending_[h] = dz;
    }
    for (int64_t h = 0; h < n_; ++h) store(z_of(h, k) + at_, pending_[h]);
  }

  // T kl_h q_h (log q_h - log p_h - KL_h).
  V into_teacher(int64_t h, int64_t k) const {
    if (!is_.has_kl(h)) return V{};
    const State& state = heads_[h];
    const int64_t by = is_.teacher_of(h) * classes_ + k;
    const V weight = teacher_[by] * state.of_teacher;
    return unless_0(weight, weight * (t_[by] - state.rest - log_p(h, k)));
  }

  Scratch scratch_;
  const Consistency& problem_;
  const Labels& labels_;
  const Group& group_;
  const int64_t first_, count_, pitch_, n_, classes_, given_;  // given_: of the classes
  const Scale* scales_;
  const bool gradient_;
  const Roles is_;
  const Acc inverse_t_, uniform_, sharp_;
  int64_t *offsets_, *indices_;  // (pitch)
  Acc *z_, *y_;           // (heads, classes, pitch), (classes, pitch): logits, and soft labels
  State* heads_;          // (heads)
  V *tempered_, *plain_;  // (heads, classes) exponentials
  V *teacher_, *t_;       // (teachers, classes)
  V *log_p_, *pending_ = scratch_.get<V>(n_);  // (heads)
  Parts<V>* parts_;                            // (heads) of one class
  V* p_;         // (2, heads) of one class: the heads' p, and their teachers'
  Acc* shares_;  // (heads)

  // Of the lanes at hand:
  int64_t at_ = 0;
  bool counts_[width];
  int64_t index_[width];  // -1: out of range
  V ce_scale_, kl_scale_;
  V size_;      // the weight of the class, or the sum of soft labels
  V label_kl_;  // of the label to the mixture
};

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
