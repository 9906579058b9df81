// The divergences D(q || p) of the consistency but for KL, class by class: `value`, `head` and
// `teacher` of docs/math.md, "Other divergences". The gradient of logits z/T of p is
// head - p sum(head), that of those of q teacher - q sum(teacher).
#pragma once

#include "../problem.h"
#include "numbers.h"

namespace imcl {

// weight * x, and 0 where the weight is 0, whatever x is.
template <class A>
__device__ __forceinline__ A times(A weight, A x) {
  return weight == 0 ? A(0) : weight * x;
}

template <class A>
struct Parts {
  A value, head, teacher;
};

// What a mixture has of a teacher or a label, beta, and of heads, 1 - beta, where a beta near 1 has
// all of its digits.
template <class A>
struct Mixed {
  A beta, rest;
};

// Of the JSD, m = beta q + (1 - beta) p; the reverse KL has no beta.
template <class A>
__device__ __forceinline__ Parts<A> parts_of(Divergence kind, A log_q, A q, A log_p, A p,
                                             const Mixed<A>& part) {
  if (kind == Divergence::kReverseKl) {
    const A value = times(p, log_p - log_q);
    return {value, value, -p};
  }
  const A mixed = part.beta * q, own = part.rest * p, log_m = log_of(mixed + own);
  const A head = times(own, log_p - log_m), teacher = times(mixed, log_q - log_m);
  return {head + teacher, head, teacher};
}

// weight (part - x sum): a gradient of logits whose softmax is x.
template <class A>
__device__ __forceinline__ A pull(A weight, A part, A x, A sum) {
  return times(weight, part - times(x, sum));
}

}  // namespace imcl
