// Collaborative consistency on the GPU: the arguments of its one kernel, and its launcher.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "launch.h"

namespace imcl {

constexpr int64_t kMostHeads = 64;  // what the kernel's parameters have room for

// Passed to the kernel by value. All pointers are the device's.
struct ConsistencyArguments {
  Head heads[kMostHeads];
  Group groups[kMostHeads];
  int head_count, group_count, largest_group;
  int64_t batch, classes;
  SampleAxes samples;
  Labels labels;
  Reduction reduction;
  bool binary;        // of two classes, the logit of the second is 0 and is nowhere
  bool general;       // what only the general kernel takes
  bool gradient;      // every head's dz is to be written
  bool packed;        // every row of z and dz starts on 16 bytes, and takes a multiple of them
  int packs, chunks;  // packs of a thread in a chunk of the classes; chunks
  void* loss;         // () or (batch,), in the accumulation type
  void* terms;        // (2, head_count)
  double* partials;   // (2, head_count, blocks)
  unsigned* ticket;   // 0
};

// How to launch it; consistency_plan() chooses.
struct ConsistencyPlan {
  bool warps;  // a warp takes a sample, else a block
  int threads, blocks;
  std::size_t shared_bytes;
};

// The arguments for a problem of at most kMostHeads heads, but for the plan's part and the
// pointers of what is returned.
ConsistencyArguments consistency_arguments(const Consistency& problem, Reduction reduction);

// Also fills in `packed`, `packs` and `chunks`.
ConsistencyPlan consistency_plan(DType dtype, ConsistencyArguments& arguments, int processors);

}  // namespace imcl

extern "C" cudaError_t imcl_cuda_consistency(imcl::DType dtype,
                                             const imcl::ConsistencyArguments* arguments,
                                             const imcl::ConsistencyPlan* plan,
                                             cudaStream_t stream);
