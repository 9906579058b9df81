// Sums over the threads of a warp, and over the blocks of a launch.
//
// Every block stores what it has and draws a ticket. The one that draws the last finds all of
// it stored, and adds it up in a fixed order: one launch, the same bits every time, no float
// atomics.
#pragma once

#include <cstdint>

#include "launch.h"
#include "numbers.h"

namespace imcl {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int other = 16; other > 0; other /= 2)
    value = larger(value, __shfl_xor_sync(kAllLanes, value, other));
  return value;
}

// For all threads of every block, once each has stored: whether its block is the last of
// `blocks` to come here. *ticket was 0 before the first.
__device__ inline bool draws_last_ticket(unsigned* ticket, unsigned blocks) {
  IMCL_SHARED(last, bool);
  __syncthreads();  // all threads of this block have stored
  if (threadIdx.x == 0) {
    __threadfence();  // and so it is for all others before the ticket
    last = atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();  // nothing is read before it
  }
  __syncthreads();
  return last;
}

// Sum of partials[0] to partials[count - 1] for every lane of a warp, in an order that depends
// on count alone.
template <class T>
__device__ inline T total(const T* partials, int64_t count) {
  T sum = 0;
  // Past the first-level cache: other processors wrote them.
  for (int64_t i = threadIdx.x % warpSize; i < count; i += warpSize) sum += __ldcg(partials + i);
  return warp_sum(sum);
}

}  // namespace imcl
