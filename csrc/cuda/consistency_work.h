// What a team of threads does with one sample after the other; csrc/cuda/consistency.cu has
// the formulas.
//
// The logit of a masked class is -inf, or the lowest number of its type, which becomes -inf when
// it is read: its exponentials are 0, and times() leaves out what such a 0 is multiplied with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "consistency.h"
#include "consistency_divergences.h"
#include "consistency_state.h"
#include "numbers.h"
#include "reduction.h"

namespace imcl {

// What is not kGeneral has KL and softmax, labels that are no sums, and samples of one axis.
template <class T, bool kGeneral>
class Work {
  using A = Acc<T>;
  // A pack is read at once, and worked on in slices: of half types two.
  using Values = Pack<A>;
  static constexpr int kPack = Pack<T>::kSize, kSlice = Values::kSize, kSlices = kPack / kSlice;

 public:
  __device__ Work(const ConsistencyArguments& arguments, const Team& team, unsigned char* memory)
      : in_(arguments), team_(team), size_(team.size), rank_(team.rank) {
    const Layout<T> layout(in_.head_count, in_.largest_group, size_, in_.packs);
    memory += layout.bytes() * static_cast<std::size_t>(team.index);
    terms_ = reinterpret_cast<double*>(memory);
    states_ = reinterpret_cast<HeadState<A>*>(memory += layout.terms);
    buffer_ = reinterpret_cast<A*>(memory += layout.states);
    sums_ = reinterpret_cast<Values*>(memory += layout.buffer);
    logits_ = reinterpret_cast<Pack<T>*>(memory + layout.sums);
    for (int i = rank_; i < 2 * in_.head_count; i += size_) terms_[i] = 0;
  }

  __device__ void sample(int64_t index, A ce_scale, A kl_scale) {
    sample_ = index;
    const Labels& labels = in_.labels;
    const int64_t label = labels.target ? labels.target[offset(index, labels.target_sample)] : 0;
    share_ = share_of<A>(in_, index);
    const bool counts = share_ != 0;
    label_ = label >= 0 && label < in_.classes ? static_cast<int>(label) : -1;
    ce_scale_ = share_ * ce_scale;
    kl_scale_ = share_ * kl_scale;
    if constexpr (kGeneral) soft_ = labels.soft();
    label_size_ = label_weight<A>(in_, index);
    A value = 0;
    for (int g = 0; g < in_.group_count; ++g) {
      enter(in_.groups[g]);
      if (!counts) {
        clear();
        continue;
      }
      team_.sync();  // nobody still reads what the last group left
      statistics();
      if (other()) other_divergences();
      else if (pairwise()) divergences();
      terms_of_heads();
      if (in_.reduction == Reduction::kNone && rank_ == 0)
        for (int h = 0; h < n_; ++h) value += states_[h].value;
      if (in_.gradient) {
        for (int chunk = 0; chunk < in_.chunks; ++chunk) {
          if (in_.chunks > 1) read(chunk);
          if (other()) gradient_of_other();
          else gradient();
        }
      }
    }
    if (in_.reduction == Reduction::kNone && rank_ == 0) static_cast<A*>(in_.loss)[index] = value;
  }

 private:
  __device__ void enter(const Group& group) {
    first_ = static_cast<int>(group.first);
    n_ = static_cast<int>(group.size);
    teacher_ = group.teacher;
    detach_ = group.detach;
    if constexpr (kGeneral) {
      divergence_ = group.divergence;
      part_ = {static_cast<A>(group.beta), static_cast<A>(1 - group.beta)};
    }
    kl_ = n_ > 1 || mixture();
    squares_ = group.temperature == 2;
    t_ = static_cast<A>(group.temperature);
    inverse_t_ = static_cast<A>(1 / group.temperature);
    const bool without_own = teacher_ == Teacher::kOthers || teacher_ == Teacher::kPairwise;
    const int averaged = teacher_ == Teacher::kFinal ? 1 : without_own ? n_ - 1 : n_;
    average_ = static_cast<A>(1.0 / averaged);
    teacher_share_ = static_cast<A>(1 / (group.temperature * averaged));
    kl_weights_ = 0;
    for (int h = 0; h < n_; ++h) kl_weights_ += static_cast<A>(head(h).kl_weight);
  }

  __device__ const Head& head(int h) const { return in_.heads[first_ + h]; }

  __device__ int64_t offset(int64_t sample, const Strides& strides) const {
    return kGeneral ? in_.samples.offset(sample, strides) : sample * strides.of[0];
  }
  __device__ bool soft() const { return kGeneral && soft_; }

  __device__ bool other() const { return kGeneral && kl_ && divergence_ != Divergence::kKl; }
  __device__ bool mixture() const { return kGeneral && divergence_ == Divergence::kMixture; }
  __device__ bool binary() const { return kGeneral && in_.binary; }
  // Whether there is a cross entropy.
  __device__ bool labelled() const { return in_.labels.any() && !mixture(); }
  // Whether its labels are of more than one class.
  __device__ bool summed() const { return labelled() && (soft() || in_.labels.smoothing > 0); }

  // kl_h, 0 where the teacher is the head itself.
  __device__ A kl_weight(int h) const {
    const bool own = !kl_ || (teacher_ == Teacher::kFinal && h == n_ - 1);
    return own ? A(0) : static_cast<A>(head(h).kl_weight);
  }

  // The group's teachers are averages, of which the sum of all heads is known.
  __device__ bool averages() const {
    return kl_ && !mixture() && (teacher_ == Teacher::kOthers || teacher_ == Teacher::kMean);
  }
  __device__ bool pairwise() const { return kl_ && !mixture() && teacher_ == Teacher::kPairwise; }
  __device__ bool taught(int h) const {
    return kl_ && !mixture() && teacher_ != Teacher::kPairwise &&
           (teacher_ != Teacher::kFinal || h < n_ - 1);
  }

  // Slice of a pack of this thread: its classes are k + i * step, i < count.
  struct Slice {
    int index, k, step, count;
  };

  // t_h from z_h and teacher_sum().
  __device__ Values teacher_logits(int h, const Slice& slice, const Values& z,
                                   const Values& sum) const {
    Values t{};
    if (extreme_ && averages()) {
#pragma unroll 1
      for (int j = 0; j < n_; ++j) {
        if (j == h && teacher_ == Teacher::kOthers) continue;
        const Values other = z_of(j, slice);
        each([&](int i) { t.at[i] += other.at[i] * teacher_share_; });
      }
    } else if (teacher_ == Teacher::kOthers)
      each([&](int i) { t.at[i] = (sum.at[i] - z.at[i]) * teacher_share_; });
    else each([&](int i) { t.at[i] = sum.at[i] * teacher_share_; });
    return t;
  }
  __device__ A teacher_max(int h) const {
    if (teacher_ == Teacher::kOthers) return shift_of(states_[h].teacher_max);
    return teacher_ == Teacher::kMean ? shift_of(states_[0].teacher_max)
                                      : shift_of(states_[n_ - 1].max) * inverse_t_;
  }
  __device__ A teacher_shift(int h) const {
    if (teacher_ == Teacher::kOthers) return states_[h].teacher_shift;
    return teacher_ == Teacher::kMean ? states_[0].teacher_shift
                                      : states_[n_ - 1].max_shift * inverse_t_;
  }

  // ---- chunks ----

  // Calls body(slice) for every slice of the chunk that isn't empty.
  template <class Body>
  __device__ __forceinline__ void each_slice(const Body& body) const {
    const int classes = static_cast<int>(in_.classes), step = in_.packed ? 1 : size_;
    for (int index = 0; index < in_.packs * kSlices; ++index) {
      const int k = first_class(index / kSlices) + index % kSlices * kSlice * step;
      if (k >= classes) return;
      const int left = in_.packed ? kSlice : (classes - k + size_ - 1) / size_;
      body(Slice{index, k, step, left < kSlice ? left : kSlice});
    }
  }

  __device__ int first_class(int nth) const {
    return chunk_ + nth * size_ * kPack + rank_ * (in_.packed ? kPack : 1);
  }

  template <class Body>
  __device__ static __forceinline__ void each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kSlice; ++i) body(i);
  }

  __device__ Pack<T>& logits(int h, int nth) const {
    return logits_[(h * in_.packs + nth) * size_ + rank_];
  }
  __device__ Values& sums(int which, const Slice& slice) const {
    return sums_[(which * in_.packs * kSlices + slice.index) * size_ + rank_];
  }

  __device__ void read(int chunk) {
    const int classes = static_cast<int>(in_.classes);
    chunk_ = chunk * in_.packs * size_ * kPack;
    extreme_ = false;
    for (int nth = 0; nth < in_.packs && first_class(nth) < classes; ++nth) {
      const int k = first_class(nth);
#pragma unroll 4
      for (int h = 0; h < n_; ++h) {
        const Head& from = head(h);
        const T* row = static_cast<const T*>(from.z) + offset(sample_, from.z_sample);
        Pack<T> pack;
        if (in_.packed) {
          pack = load_pack(row + k);  // [kPack]
        } else if (binary() && k > 0) {
          memset(&pack, 0, sizeof(pack));
        } else {
          // Filled up with copies, which are harmless to maxima.
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            const int each = k + i * size_;
            pack.at[i] = row[int64_t{each < classes ? each : k} * from.z_class];
          }
        }
        A largest = 0;
#pragma unroll
        for (int i = 0; i < kPack; ++i) largest = larger(largest, A(fabs(to_acc(pack.at[i]))));
        logits(h, nth) = pack;
        if (largest > kModerate) {
          extreme_ = true;
#pragma unroll 1  // it is rare, and shall need no registers
          for (int i = 0; i < kPack; ++i) {
            T& each = logits(h, nth).at[i];
            each = masked(each);
          }
        }
      }
    }
  }

  __device__ Values z_of(int h, const Slice& slice) const {
    struct alignas(sizeof(T) * kSlice) Raw {
      T at[kSlice];
    };
    const Raw raw =
        reinterpret_cast<const Raw*>(&logits(h, slice.index / kSlices))[slice.index % kSlices];
    Values z;
    each([&](int i) { z.at[i] = to_acc(raw.at[i]); });
    return z;
  }

  // What the teachers' logits are made of: the sum of the group's heads, or the last one.
  __device__ Values teacher_sum(const Slice& slice) const {
    Values sum{};
    for (int h = teacher_ == Teacher::kFinal ? n_ - 1 : 0; h < n_; ++h) {
      const Values z = z_of(h, slice);
      each([&](int i) { sum.at[i] += z.at[i]; });
    }
    return sum;
  }

  // exp((z - max) / T), where that or the next needs it.
  __device__ Values tempered(const Values& z, A max) const {
    Values e{};
    if (kl_ || squares_ || inverse_t_ == A(1))
      each([&](int i) { e.at[i] = fast_exp((z.at[i] - max) * inverse_t_); });
    return e;
  }

  // exp(z - max), from the former where that is quicker.
  __device__ Values plain(const Values& tempered, const Values& z, A max) const {
    if (inverse_t_ == A(1)) return tempered;
    Values e;
    if (squares_) each([&](int i) { e.at[i] = tempered.at[i] * tempered.at[i]; });
    else each([&](int i) { e.at[i] = fast_exp(z.at[i] - max); });
    return e;
  }

  __device__ static __forceinline__ void add(A& sum, const Values& values, const Slice& slice) {
    if (slice.count == kSlice) each([&](int i) { sum += values.at[i]; });
    else each([&](int i) { sum += i < slice.count ? values.at[i] : A(0); });
  }

  // ---- reductions over the team: put() by all, sync, get() by one thread, sync ----

  __device__ void put(int index, A of_warp) {
    if (threadIdx.x % warpSize == 0) buffer_[index * team_.warps() + rank_ / warpSize] = of_warp;
  }
  __device__ A get_sum(int index) const {
    A sum = 0;
    for (int w = 0; w < team_.warps(); ++w) sum += buffer_[index * team_.warps() + w];
    return sum;
  }
  __device__ A get_max(int index) const {
    A max = -INFINITY;
    for (int w = 0; w < team_.warps(); ++w) max = larger(max, buffer_[index * team_.warps() + w]);
    return max;
  }

  // ---- statistics ----

  __device__ void statistics() {
    if (soft()) label_size_ = 0;
    for (int h = rank_; h < n_; h += size_) {
      states_[h] = HeadState<A>{};
      states_[h].max = states_[h].teacher_max = -INFINITY;
    }
    for (int chunk = 0; chunk < in_.chunks; ++chunk) {
      read(chunk);
      maxima();
      exponentials();
    }
    for (int h = rank_; h < n_; h += size_) {
      HeadState<A>& state = states_[h];
      state.max = shift_of(state.max);
      state.teacher_max = shift_of(state.teacher_max);
      state.log_tempered = log_of(state.tempered);
      state.log_teacher = log_of(state.teacher);
      state.inverse_plain = 1 / state.plain;
      state.inverse_tempered = 1 / state.tempered;
      state.inverse_teacher = 1 / state.teacher;
      if (taught(h) && !other())
        state.kl = state.gap * state.inverse_teacher - state.log_teacher + state.log_tempered;
    }
    team_.sync();
  }

  // What to subtract: as long as all classes are masked, nothing.
  __device__ static A shift_of(A max) { return max == -INFINITY ? A(0) : max; }

  __device__ static void raise(A& max, A& shift, A to) {
    const A old = max;
    max = larger(old, to);
    shift = old == -INFINITY ? A(0) : old - max;
  }

  __device__ void maxima() {
    const bool summed = this->summed();
    for (int h = 0; h < n_; ++h) {
      A max = -INFINITY;
      each_slice([&](const Slice& slice) {
        const Values z = z_of(h, slice);
        each([&](int i) { max = larger(max, z.at[i]); });
      });
      put(h, warp_max(max));
    }
    const int teachers = !averages() ? 0 : teacher_ == Teacher::kOthers ? n_ : 1;
    if (teachers) each_slice([&](const Slice& slice) { sums(0, slice) = teacher_sum(slice); });
    for (int h = 0; h < teachers; ++h) {
      A max = -INFINITY;
      each_slice([&](const Slice& slice) {
        const Values t = teacher_logits(h, slice, z_of(h, slice), sums(0, slice));
        each([&](int i) { max = larger(max, t.at[i]); });
      });
      put(n_ + h, warp_max(max));
    }
    if (summed && soft()) put(n_ + teachers, warp_sum(labels_of_chunk()));
    team_.sync();
    // Of the chunks before.
    const A labels = soft() ? label_size_ : static_cast<A>(chunk_) / static_cast<A>(in_.classes);
    if (summed && soft()) label_size_ += get_sum(n_ + teachers);
    for (int i = rank_; i < n_ + teachers; i += size_) {
      HeadState<A>& state = states_[i < n_ ? i : i - n_];
      if (i < n_) {
        raise(state.max, state.max_shift, get_max(i));
        if (summed) state.label_logit += labels * state.max_shift;
      } else {
        raise(state.teacher_max, state.teacher_shift, get_max(i));
      }
    }
    team_.sync();
  }

  __device__ A labels_of_chunk() const {
    A sum = 0;
    each_slice([&](const Slice& slice) {
      const Values y = soft_labels(slice);
      each([&](int i) { sum += y.at[i]; });
    });
    return sum;
  }

  __device__ void exponentials() {
    const bool labelled = this->labelled(), summed = this->summed();
    const A of_class = static_cast<A>(1.0 / static_cast<double>(in_.classes));
    for (int h = 0; h < n_; ++h) {
      const A max = shift_of(states_[h].max);
      A tempered_sum = 0, plain_sum = 0, label_logit = 0;
      each_slice([&](const Slice& slice) {
        Values z = z_of(h, slice);
        const Values e = tempered(z, max);
        add(tempered_sum, e, slice);
        if (labelled) add(plain_sum, plain(e, z, max), slice);
        if (!summed) return;
        // Less their maximum, as all else: what logits have in common would cost digits.
        each([&](int i) { z.at[i] -= max; });
        if (soft()) {
          const Values y = soft_labels(slice);
          each([&](int i) { z.at[i] = times(y.at[i], z.at[i]); });
        } else {
          each([&](int i) { z.at[i] *= of_class; });
        }
        add(label_logit, z, slice);
      });
      if (kl_) put(h * kValues, warp_sum(tempered_sum));
      if (labelled) put(h * kValues + 1, warp_sum(plain_sum));
      if (summed) put(h * kValues + 2, warp_sum(label_logit));
      if (!taught(h)) continue;
      const A t_max = teacher_max(h);
      A teacher = 0, gap = 0;
      each_slice([&](const Slice& slice) {
        const Values z = z_of(h, slice);
        Values t = teacher_logits(
            h, slice, z, teacher_ == Teacher::kFinal ? z_of(n_ - 1, slice) : sums(0, slice));
        Values q;
        each([&](int i) {
          t.at[i] -= t_max;
          q.at[i] = fast_exp(t.at[i]);
          t.at[i] = times(q.at[i], t.at[i] - (z.at[i] - max) * inverse_t_);
        });
        add(teacher, q, slice);
        if (!other()) add(gap, t, slice);
      });
      put(h * kValues + 3, warp_sum(teacher));
      put(h * kValues + 4, warp_sum(gap));
    }
    team_.sync();
    for (int h = rank_; h < n_; h += size_) {
      HeadState<A>& state = states_[h];
      const A shift = state.max_shift, tempered_shift = shift * inverse_t_;
      if (kl_) state.tempered = state.tempered * fast_exp(tempered_shift) + get_sum(h * kValues);
      if (labelled) state.plain = state.plain * fast_exp(shift) + get_sum(h * kValues + 1);
      if (summed) state.label_logit += get_sum(h * kValues + 2);
      if (taught(h)) {
        const A t_shift = teacher_shift(h), factor = fast_exp(t_shift);
        // The exponents of what was summed so far were relative to lower maxima. Of another
        // divergence nothing was: its own sum comes later.
        if (!other())
          state.gap = times(factor, state.gap + state.teacher * (t_shift - tempered_shift)) +
                      get_sum(h * kValues + 4);
        state.teacher = factor * state.teacher + get_sum(h * kValues + 3);
      }
    }
    team_.sync();
  }

  // p_h.
  __device__ Values p_of(int h, const Values& z) const {
    const HeadState<A>& state = states_[h];
    Values p;
    each([&](int i) {
      p.at[i] = fast_exp((z.at[i] - state.max) * inverse_t_) * state.inverse_tempered;
    });
    return p;
  }
  __device__ Values log_p_of(int h, const Values& z) const {
    const HeadState<A>& state = states_[h];
    Values log_p;
    each([&](int i) { log_p.at[i] = (z.at[i] - state.max) * inverse_t_ - state.log_tempered; });
    return log_p;
  }

  // KL of pairwise teachers, and what their gradient needs; V = sum_j kl_j log p_j and W the
  // sum of all kl_j.
  __device__ void divergences() {
    for (int chunk = 0; chunk < in_.chunks; ++chunk) {
      if (in_.chunks > 1) read(chunk);
      each_slice([&](const Slice& slice) {
        Values p_sum{}, p_log_p{}, weighted{};
        for (int h = 0; h < n_; ++h) {
          const A weight = static_cast<A>(head(h).kl_weight);
          const Values z = z_of(h, slice), p = p_of(h, z), log_p = log_p_of(h, z);
          each([&](int i) {
            p_sum.at[i] += p.at[i];
            p_log_p.at[i] += times(p.at[i], log_p.at[i]);
            weighted.at[i] += times(weight, log_p.at[i]);
          });
        }
        sums(0, slice) = p_sum;
        sums(1, slice) = p_log_p;
        sums(2, slice) = weighted;
      });
      for (int h = 0; h < n_; ++h) {
        A kl = 0, toward = 0;
        each_slice([&](const Slice& slice) {
          const Values z = z_of(h, slice), log_p = log_p_of(h, z);
          Values of = sums(1, slice);
          const Values p_sum = sums(0, slice);
          each([&](int i) { of.at[i] -= times(p_sum.at[i], log_p.at[i]); });
          add(kl, of, slice);
          if (detach_) return;
          const Values p = p_of(h, z), weighted = sums(2, slice);
          each([&](int i) {
            of.at[i] = times(p.at[i], kl_weights_ * log_p.at[i] - weighted.at[i]);
          });
          add(toward, of, slice);
        });
        put(h * kValues, warp_sum(kl));
        if (!detach_) put(h * kValues + 1, warp_sum(toward));
      }
      team_.sync();
      for (int h = rank_; h < n_; h += size_) {
        states_[h].kl += get_sum(h * kValues) * average_;
        if (!detach_) states_[h].toward += get_sum(h * kValues + 1);
      }
      team_.sync();
    }
  }

  __device__ void terms_of_heads() {
    for (int h = rank_; h < n_; h += size_) {
      HeadState<A>& state = states_[h];
      A ce = 0;
      if (in_.labels.target && label_ < 0) {
        ce = NAN;
      } else if (mixture()) {
        ce = state.label_logit;
      } else if (soft()) {
        ce = times(label_size_, log_of(state.plain)) - state.label_logit;
      } else if (in_.labels.target) {
        const Head& from = head(h);
        const auto smoothing = static_cast<A>(in_.labels.smoothing);
        const T* row = static_cast<const T*>(from.z) + offset(sample_, from.z_sample);
        const A log_sum = log_of(state.plain), z = to_acc(masked(row[label_ * from.z_class]));
        ce = (1 - smoothing) * (log_sum - (z - state.max));
        if (smoothing > 0) ce += smoothing * (log_sum - state.label_logit);
        ce = times(label_size_, ce);
      }
      const A kl = t_ * t_ * state.kl;
      state.value = times(static_cast<A>(head(h).ce_weight), ce * ce_scale_) +
                    times(kl_weight(h), kl * kl_scale_);
      ce *= share_;
      terms_[first_ + h] += static_cast<double>(ce);
      terms_[in_.head_count + first_ + h] += static_cast<double>(kl * share_);
    }
    team_.sync();
  }

  // ---- the gradient ----

  __device__ void gradient() const {
    each_slice([&](const Slice& slice) {
      // What t is made of, and what all teachers pass on to it together; of pairwise teachers
      // the sum of p, and V.
      Values sum{}, passed{};
      if (pairwise()) {
        for (int h = 0; h < n_; ++h) {
          const A weight = static_cast<A>(head(h).kl_weight);
          const Values z = z_of(h, slice), p = p_of(h, z), log_p = log_p_of(h, z);
          each([&](int i) {
            sum.at[i] += p.at[i];
            passed.at[i] += times(weight, log_p.at[i]);
          });
        }
      } else if (kl_) {
        sum = teacher_sum(slice);
        for (int h = 0; !detach_ && h < n_; ++h) {
          if (!taught(h)) continue;
          const Values own = taught_gradient(h, slice, z_of(h, slice), sum).passed;
          each([&](int i) { passed.at[i] += own.at[i]; });
        }
      }
      for (int h = 0; h < n_; ++h) {
        const Values z = z_of(h, slice), e = tempered(z, states_[h].max);
        Values dz{};
        if (in_.labels.any()) add_labels(h, slice, z, e, dz);
        if (kl_) {
          const A factor = times(t_ * kl_scale_ * kl_weight(h), states_[h].inverse_tempered);
          each([&](int i) { dz.at[i] += factor * e.at[i]; });
        }
        if (pairwise()) add_pairwise(h, z, e, sum, passed, dz);
        else if (kl_) add_teacher(h, slice, z, sum, passed, dz);
        write(h, slice, dz);
      }
    });
  }

  // ce_h (softmax(z_h) sum(y) - y)
  __device__ void add_labels(int h, const Slice& slice, const Values& z, const Values& e,
                             Values& dz) const {
    const HeadState<A>& state = states_[h];
    const Labels& labels = in_.labels;
    const A valid = labels.target && label_ < 0 ? A(NAN) : A(1);
    const A weight = static_cast<A>(head(h).ce_weight) * ce_scale_;
    const A factor = times(weight * label_size_, state.inverse_plain);
    const Values p = plain(e, z, state.max);
    if (soft()) {
      const Values y = soft_labels(slice);
      each([&](int i) { dz.at[i] = factor * p.at[i] - valid * (weight * y.at[i]); });
      return;
    }
    const A of_label = weight * label_size_;
    const A smooth =
        valid * of_label * static_cast<A>(labels.smoothing / static_cast<double>(in_.classes));
    const A sharp = smooth + of_label * static_cast<A>(1 - labels.smoothing);
    each([&](int i) {
      const A y = slice.k + i * slice.step == label_ ? sharp : smooth;
      dz.at[i] = factor * p.at[i] - y;
    });
  }

  // ---- other divergences than KL ----

  // Of one slice: what Parts say, p, and of a teacher that isn't a head, q.
  struct Other {
    Values value, head, teacher, p, q;
  };

  // Whether head h has a divergence.
  __device__ bool learns(int h) const { return mixture() || pairwise() || taught(h); }

  // log m of a mixture, or what the teachers' logits are made of.
  __device__ Values common(const Slice& slice) const {
    Values log_m{};
    if (pairwise()) return log_m;
    if (!mixture()) return teacher_sum(slice);
    const Values y = soft_labels(slice);
    each([&](int i) { log_m.at[i] = part_.beta * y.at[i]; });
    const A rest = part_.rest / kl_weights_;
#pragma unroll 1
    for (int h = 0; h < n_; ++h) {
      const A share = kl_weight(h) * rest;
      const Values log_p = log_p_of(h, z_of(h, slice));
      each([&](int i) { log_m.at[i] += share * exp_of(log_p.at[i]); });
    }
    // Shares of the smallest probabilities round to 0, while these don't.
    each([&](int i) { log_m.at[i] = log_m.at[i] == 0 ? A(0) : log_of(log_m.at[i]); });
    return log_m;
  }

  // Of head h, which learns. Of pairwise teachers the mean over them, and what h gets as one, of
  // all weights.
  __device__ Other of_head(int h, const Slice& slice, const Values& common) const {
    Other of{};
    const Values z = z_of(h, slice), log_p = log_p_of(h, z);
    each([&](int i) { of.p.at[i] = exp_of(log_p.at[i]); });
    if (mixture()) {
      each([&](int i) { of.head.at[i] = times(of.p.at[i], log_p.at[i] - common.at[i]); });
      of.value = of.head;
    } else if (pairwise()) {
#pragma unroll 1
      for (int j = 0; j < n_; ++j) {
        if (j == h) continue;
        const Values log_q = log_p_of(j, z_of(j, slice));
        const A weight = kl_weight(j) * average_;
        each([&](int i) {
          const A p = of.p.at[i], q = exp_of(log_q.at[i]);
          const Parts<A> own = parts_of(divergence_, log_q.at[i], q, log_p.at[i], p, part_);
          of.value.at[i] += own.value * average_;
          of.head.at[i] += own.head * average_;
          const Parts<A> its = parts_of(divergence_, log_p.at[i], p, log_q.at[i], q, part_);
          of.teacher.at[i] += times(weight, its.teacher);
        });
      }
    } else {
      const A t_max = teacher_max(h), log_teacher = states_[h].log_teacher;
      const Values t = teacher_logits(h, slice, z, common);
      each([&](int i) {
        const A log_q = t.at[i] - t_max - log_teacher;
        of.q.at[i] = exp_of(log_q);
        const Parts<A> own =
            parts_of(divergence_, log_q, of.q.at[i], log_p.at[i], of.p.at[i], part_);
        of.value.at[i] = own.value;
        of.head.at[i] = own.head;
        of.teacher.at[i] = own.teacher;
      });
    }
    return of;
  }

  __device__ void other_divergences() {
    for (int chunk = 0; chunk < in_.chunks; ++chunk) {
      if (in_.chunks > 1) read(chunk);
      A label = 0;
      each_slice([&](const Slice& slice) {
        const Values log_m = sums(0, slice) = common(slice);
        if (!mixture()) return;
        Values y = soft_labels(slice);
        each([&](int i) { y.at[i] = times(y.at[i], log_of(y.at[i]) - log_m.at[i]); });
        add(label, y, slice);
      });
      if (mixture()) put(kValues - 1, warp_sum(label));
      for (int h = 0; h < n_; ++h) {
        if (!learns(h)) continue;
        A value = 0, head = 0, teacher = 0;
        each_slice([&](const Slice& slice) {
          const Other of = of_head(h, slice, sums(0, slice));
          add(value, of.value, slice);
          add(head, of.head, slice);
          add(teacher, of.teacher, slice);
        });
        put(h * kValues, warp_sum(value));
        put(h * kValues + 1, warp_sum(head));
        put(h * kValues + 2, warp_sum(teacher));
      }
      team_.sync();
      for (int h = rank_; h < n_; h += size_) {
        if (!learns(h)) continue;
        HeadState<A>& state = states_[h];
        state.kl += get_sum(h * kValues);
        state.gap += get_sum(h * kValues + 1);
        state.toward += get_sum(h * kValues + 2);
        if (mixture()) state.label_logit += get_sum(kValues - 1);
      }
      team_.sync();
    }
  }

  __device__ void gradient_of_other() const {
    const bool passes = !detach_ && !mixture();
    const A valid = mixture() && in_.labels.target && label_ < 0 ? A(NAN) : A(1);
    const A scale = t_ * kl_scale_ * valid;
    each_slice([&](const Slice& slice) {
      const Values common = this->common(slice);
      Values passed{};  // into the logits of all teachers together
      const auto into_teacher = [&](int h, const Other& of, int i) {
        return pull(scale * kl_weight(h), of.teacher.at[i], of.q.at[i], states_[h].toward);
      };
      if (passes && !pairwise()) {
#pragma unroll 1
        for (int h = 0; h < n_; ++h) {
          if (!taught(h)) continue;
          const Other of = of_head(h, slice, common);
          each([&](int i) { passed.at[i] += into_teacher(h, of, i); });
        }
      }
#pragma unroll 1
      for (int h = 0; h < n_; ++h) {
        const HeadState<A>& state = states_[h];
        Values dz{};
        if (labelled()) {
          const Values z = z_of(h, slice);
          add_labels(h, slice, z, tempered(z, state.max), dz);
        }
        if (learns(h)) {
          const Other of = of_head(h, slice, common);
          const A weight = scale * kl_weight(h);
          each([&](int i) {
            dz.at[i] += pull(weight, of.head.at[i], of.p.at[i], state.gap);
            if (!passes) return;
            if (pairwise()) dz.at[i] += pull(scale, of.teacher.at[i], of.p.at[i], state.toward);
            else if (teacher_ == Teacher::kOthers)
              dz.at[i] += (passed.at[i] - into_teacher(h, of, i)) * average_;
            else if (teacher_ == Teacher::kMean) dz.at[i] += passed.at[i] * average_;
          });
        } else if (passes) {
          each([&](int i) { dz.at[i] += passed.at[i]; });
        }
        write(h, slice, dz);
      }
    });
  }

  // The soft labels of a slice, 0 beyond the classes.
  __device__ Values soft_labels(const Slice& slice) const {
    const Labels& labels = in_.labels;
    const auto uniform = static_cast<A>(labels.smoothing / static_cast<double>(in_.classes));
    const auto sharp = static_cast<A>(1 - labels.smoothing);
    const A* row = static_cast<const A*>(labels.probabilities);
    if (row) row += offset(sample_, labels.probability_sample);
    Values y{};
    each([&](int i) {
      const int k = slice.k + i * slice.step;
      if (i >= slice.count) return;
      const A own = row ? row[k * labels.probability_class] : A(k == label_);
      y.at[i] = (own * sharp + uniform) * class_weight<A>(labels, k);
    });
    return y;
  }

  struct Taught {
    Values gradient;  // -T kl_h q_h
    Values passed;    // T kl_h q_h (log q_h - log p_h - KL_h)
  };

  __device__ Taught taught_gradient(int h, const Slice& slice, const Values& z,
                                    const Values& sum) const {
    const HeadState<A>& state = states_[h];
    const A t_max = teacher_max(h);
    const A factor = times(t_ * kl_scale_ * kl_weight(h), state.inverse_teacher);
    const A rest = state.log_tempered - state.log_teacher - state.kl;
    const Values t = teacher_logits(h, slice, z, sum);
    Taught result;
    each([&](int i) {
      const A q = factor * fast_exp(t.at[i] - t_max);
      result.gradient.at[i] = -q;
      result.passed.at[i] = times(q, (t.at[i] - t_max) - (z.at[i] - state.max) * inverse_t_ + rest);
    });
    return result;
  }

  __device__ void add_teacher(int h, const Slice& slice, const Values& z, const Values& sum,
                              const Values& passed, Values& dz) const {
    if (taught(h)) {
      const Taught by = taught_gradient(h, slice, z, sum);
      const A own = !detach_ && teacher_ == Teacher::kOthers ? average_ : A(0);
      each([&](int i) { dz.at[i] += by.gradient.at[i]; });
      if (own != 0) each([&](int i) { dz.at[i] -= own * by.passed.at[i]; });
    }
    if (detach_ || (teacher_ == Teacher::kFinal && h < n_ - 1)) return;
    each([&](int i) { dz.at[i] += average_ * passed.at[i]; });
  }

  __device__ void add_pairwise(int h, const Values& z, const Values& e, const Values& p_sum,
                               const Values& weighted, Values& dz) const {
    const HeadState<A>& state = states_[h];
    const A factor = t_ * kl_scale_ * average_;
    const A weight = factor * kl_weight(h);
    each([&](int i) { dz.at[i] -= times(weight, p_sum.at[i] - e.at[i] * state.inverse_tempered); });
    if (detach_) return;
    const Values log_p = log_p_of(h, z);
    each([&](int i) {
      dz.at[i] += times(factor * (e.at[i] * state.inverse_tempered),
                        kl_weights_ * log_p.at[i] - weighted.at[i] - state.toward);
    });
  }

  __device__ __forceinline__ void write(int h, const Slice& slice, const Values& dz) const {
    const Head& to = head(h);
    Kept<T>* row = static_cast<Kept<T>*>(to.dz) + offset(sample_, to.dz_sample);
    if (binary() && slice.k > 0) return;
    if (in_.packed) {
      store_pack(row + slice.k, dz);  // [kSlice]
    } else {
      each([&](int i) {
        if (i < slice.count)
          row[(slice.k + int64_t{i} * slice.step) * to.dz_class] = from_acc<Kept<T>>(dz.at[i]);
      });
    }
  }

  // The gradient of a sample that doesn't count.
  __device__ void clear() {
    if (!in_.gradient) return;
    for (int chunk = 0; chunk < in_.chunks; ++chunk) {
      chunk_ = chunk * in_.packs * size_ * kPack;
      each_slice([&](const Slice& slice) {
        for (int h = 0; h < n_; ++h) write(h, slice, Values{});
      });
    }
  }

  const ConsistencyArguments& in_;
  const Team team_;
  const int size_, rank_;
  double* terms_;         // (2, heads) sums over the samples so far
  HeadState<A>* states_;  // (n)
  A* buffer_;             // (values, warps)
  Values* sums_;          // (3, packs, threads)
  Pack<T>* logits_;       // (n, packs, threads)

  int64_t sample_ = 0;
  int label_ = 0;  // -1: out of range
  A share_ = 1, ce_scale_ = 1, kl_scale_ = 1;
  bool soft_ = false;
  A label_size_ = 1;  // of soft labels their sum, else the weight of the class

  int first_ = 0, n_ = 0;
  Teacher teacher_ = Teacher::kOthers;
  bool detach_ = true, kl_ = false, squares_ = false;  // squares_: T is 2
  A t_ = 1, inverse_t_ = 1, average_ = 1, teacher_share_ = 1, kl_weights_ = 0;
  int chunk_ = 0;         // its first class
  bool extreme_ = false;  // some logit that this thread has read of it is

  Divergence divergence_ = Divergence::kKl;
  Mixed<A> part_{};
};

}  // namespace imcl
