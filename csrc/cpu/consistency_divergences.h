// The divergences D(q || p) of the consistency but for KL, class by class.
//
// D is the sum of `value`. Of logits z/T of p it has the gradient head - p sum(head), of those of
// q teacher - q sum(teacher): head is p times the derivative of value by p, teacher q times that
// by q.
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
};

// Of the JSD, m = beta q + (1 - beta) p; the others have no beta.
template <Divergence kind, class V>
IMCL_INLINE Parts<V> parts_of(V log_q, V q, V log_p, V p, V beta) {
  static_assert(kind == Divergence::kReverseKl || kind == Divergence::kJsd, "of two softmaxes");
  if constexpr (kind == Divergence::kReverseKl) {
    const V value = unless_0(p, p * (log_p - log_q));
    return {value, value, -p};
  } else {
    const V mixed = beta * q, own = p - beta * p, log_m = log_of(mixed + own);
    const V head = unless_0(own, own * (log_p - log_m));
    const V teacher = unless_0(mixed, mixed * (log_q - log_m));
    return {head + teacher, head, teacher};
  }
}

}  // namespace
}  // namespace IMCL_ISA
}  // namespace imcl
