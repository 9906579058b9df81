// The divergences D(q || p) of the consistency but for KL, class by class: `value`, `head` and
// `teacher` of docs/math.md, "Other divergences". The gradient of logits z/T of p is
// head - p sum(head), that of those of q teacher - q sum(teacher).
#pragma once

#include "../problem.h"
#include "exp.h"
#include "logits.h"

namespace imcl {
inline namespace IMCL_ISA {
namespace {

template <class V>
struct Parts {
  V value, head, teacher;

  // Where keep isn't 0.
  IMCL_INLINE void add(const Parts& more, V keep) {
    value += unless_0(keep, more.value);
    head += unless_0(keep, more.head);
    teacher += unless_0(keep, more.teacher);
  }
};

// What a mixture has of a teacher or a label, beta, and of heads, 1 - beta, where a beta near 1 has
// all of its digits.
template <class Acc>
struct Mixed {
  Vec<Acc> beta, rest;

  IMCL_INLINE explicit Mixed(const Group& group)
      : beta(splat(static_cast<Acc>(group.beta))), rest(splat(static_cast<Acc>(1 - group.beta))) {}
};

// Of the JSD, m = beta q + (1 - beta) p; the others have no beta.
template <Divergence kind, class Acc, class V = Vec<Acc>>
IMCL_INLINE Parts<V> parts_of(V log_q, V q, V log_p, V p, Mixed<Acc> part) {
  static_assert(kind == Divergence::kReverseKl || kind == Divergence::kJsd, "of two softmaxes");
  if constexpr (kind == Divergence::kReverseKl) {
    const V value = unless_0(p, p * (log_p - log_q));
    return {value, value, -p};
  } else {
    const V mixed = part.beta * q, own = part.rest * p, log_m = log_of(mixed + own);
    const V head = unless_0(own, own * (log_p - log_m));
    const V teacher = unless_0(mixed, mixed * (log_q - log_m));
    return {head + teacher, head, teacher};
  }
}

// The mean over j != h of D(p_j || p_h), and what h gets as the teacher of others, times theirs of
// the weights.
template <Divergence kind, class Acc>
void pairwise_parts(int64_t n, const Vec<Acc>* log_p, const Vec<Acc>* p, const Acc* weights,
                    Mixed<Acc> part, Parts<Vec<Acc>>* parts) {
  const Vec<Acc> others = splat(static_cast<Acc>(1.0 / static_cast<double>(n - 1)));
  for (int64_t h = 0; h < n; ++h) parts[h] = Parts<Vec<Acc>>{};
  for (int64_t h = 0; h < n; ++h) {
    const Vec<Acc> weight = splat(weights[h]) * others;
    for (int64_t j = 0; j < n; ++j) {
      if (j == h) continue;
      const Parts<Vec<Acc>> of = parts_of<kind>(log_p[j], p[j], log_p[h], p[h], part);
      parts[h].value += of.value * others;
      parts[h].head += of.head * others;
      parts[j].teacher += unless_0(weight, weight * of.teacher);
    }
  }
}

// KL(p_h || m) of every head, m = beta y + sum_h pi_h p_h; returns KL(y || m).
template <class Acc>
Vec<Acc> mixture_parts(int64_t n, const Vec<Acc>* log_p, const Vec<Acc>* p, const Acc* pi,
                       Mixed<Acc> part, Vec<Acc> y, Parts<Vec<Acc>>* parts) {
  Vec<Acc> mixed = part.beta * y;
  for (int64_t h = 0; h < n; ++h) mixed += p[h] * splat(pi[h]);
  // Shares of the smallest probabilities round to 0, while these don't.
  const Vec<Acc> log_m = unless_0(mixed, log_of(mixed));
  for (int64_t h = 0; h < n; ++h) {
    const Vec<Acc> value = unless_0(p[h], p[h] * (log_p[h] - log_m));
    parts[h] = {value, value, Vec<Acc>{}};
  }
  return unless_0(y, y * (log_of(y) - log_m));
}

// What those two take of the heads' weights.
template <class Acc>
void shares_of(const Consistency& problem, const Group& group, Acc* shares) {
  const bool mixture = group.divergence == Divergence::kMixture;
  double total = 0;
  for (int64_t h = 0; h < group.size; ++h)
    total += problem.heads[static_cast<std::size_t>(group.first + h)].kl_weight;
  for (int64_t h = 0; h < group.size; ++h) {
    const double weight = problem.heads[static_cast<std::size_t>(group.first + h)].kl_weight;
    shares[h] = static_cast<Acc>(mixture ? weight / total * (1 - group.beta) : weight);
  }
}

// weight (part - x sum): a gradient of logits whose softmax is x.
template <class V>
IMCL_INLINE V pull(V weight, V part, V x, V sum) {
  return unless_0(weight, weight * (part - unless_0(x, x * sum)));
}

// Calls body(kind) with a divergence that isn't KL as a constant.
template <class Body>
IMCL_INLINE void as_constant(Divergence kind, const Body& body) {
  if (kind == Divergence::kReverseKl)
    body(std::integral_constant<Divergence, Divergence::kReverseKl>{});
  else if (kind == Divergence::kJsd) body(std::integral_constant<Divergence, Divergence::kJsd>{});
  else body(std::integral_constant<Divergence, Divergence::kMixture>{});
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
