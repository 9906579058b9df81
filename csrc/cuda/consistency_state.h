// What a team of threads knows of its sample: its weight and its label's, the state of each head,
// and where that lies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "consistency.h"
#include "numbers.h"

namespace imcl {

constexpr int kValues = 5;  // sums of a head that are reduced together

// The factor of all of a sample's loss; 0 if it doesn't count.
template <class A>
__device__ __forceinline__ A share_of(const ConsistencyArguments& in, int64_t sample) {
  const Labels& labels = in.labels;
  if (labels.target &&
      labels.target[in.samples.offset(sample, labels.target_sample)] == labels.ignore_index)
    return 0;
  if (!labels.sample_weight) return 1;
  return static_cast<const A*>(
      labels.sample_weight)[in.samples.offset(sample, labels.weight_sample)];
}

template <class A>
__device__ __forceinline__ A class_weight(const Labels& labels, int64_t k) {
  return labels.weight ? static_cast<const A*>(labels.weight)[k * labels.weight_stride] : A(1);
}

// The weight of a sample's label in the mean of the cross entropies.
template <class A>
__device__ __forceinline__ A label_weight(const ConsistencyArguments& in, int64_t sample) {
  const Labels& labels = in.labels;
  if (!labels.target || !labels.weight) return 1;
  const int64_t y = labels.target[in.samples.offset(sample, labels.target_sample)];
  return y < 0 || y >= in.classes ? A(0) : class_weight<A>(labels, y);
}

// What is known of one head, in shared memory.
template <class A>
struct HeadState {
  A max, max_shift;              // of z; and by how much the last chunk raised it, as old - new
  A teacher_max, teacher_shift;  // of t
  A plain, tempered;             // sums of exp(z - max) and exp((z - max) / T)
  // Sum of y (z - max), y the soft labels or 1/K; of a mixture KL(y || m).
  A label_logit;
  A teacher;  // sum of exp(t - teacher_max)
  // Sum of exp(t - teacher_max) ((t - teacher_max) - (z - max) / T); of another divergence than
  // KL, of what Parts call the head.
  A gap;
  A log_tempered, log_teacher;
  A inverse_plain, inverse_tempered, inverse_teacher;
  A kl;      // the divergence, without T^2
  A toward;  // sum of p (W log p - V), or of what Parts call the teacher
  A value;   // this sample's part of the loss, without scale
};

// Bytes of a team's working memory, which lies in the order of these, each a multiple of 16.
template <class T>
struct Layout {
  std::size_t terms, states, buffer, sums, logits;

  __host__ __device__ Layout(int heads, int largest, int threads, int packs) {
    const auto round = [](std::size_t bytes) { return (bytes + 15) / 16 * 16; };
    const std::size_t warps = static_cast<std::size_t>(threads) / 32;
    const std::size_t all = static_cast<std::size_t>(threads) * static_cast<std::size_t>(packs);
    const auto n = static_cast<std::size_t>(largest);
    terms = round(sizeof(double) * 2 * static_cast<std::size_t>(heads));
    states = round(sizeof(HeadState<Acc<T>>) * n);
    buffer = round(sizeof(Acc<T>) * kValues * n * warps);
    sums = sizeof(Acc<T>) * Pack<T>::kSize * all * (n > 1 ? 3 : 0);
    logits = sizeof(Pack<T>) * all * n;
  }
  __host__ __device__ std::size_t bytes() const { return terms + states + buffer + sums + logits; }
};

// The threads that share a sample: a warp of a block, or all of it.
struct Team {
  bool warp;
  int size, rank, index, count;  // index and count: of the teams of this block

  __device__ explicit Team(bool warp)
      : warp(warp),
        size(warp ? warpSize : static_cast<int>(blockDim.x)),
        rank(static_cast<int>(threadIdx.x) % size),
        index(static_cast<int>(threadIdx.x) / size),
        count(static_cast<int>(blockDim.x) / size) {}

  __device__ int warps() const { return size / warpSize; }
  __device__ void sync() const {
    if (warp) __syncwarp();
    else __syncthreads();
  }
};

}  // namespace imcl
