// Kernels with the faults that the emulator (cuda_on_cpu.h) must show, and the same without.
//
// Usage: cuda_faults FAULT; prints the sum that the kernel makes, or what the launch throws.
#include <memory>

#include "../../csrc/cuda/launch.h"

namespace {

constexpr int kThreads = 96, kBlocks = 3;

// out[0] = sum of x over a block of kThreads.
enum Fault {
  kNone,
  kMissingBarrier,    // sums are read before all are written
  kOverwritten,       // shared memory is used again before all have read it
  kDivergentBarrier,  // some threads wait at another barrier
  kEarlyReturn,       // some threads are gone before the barrier
  kDivergentShuffle,  // half a warp shuffles in the name of all of it
  kUninitialised,     // shared memory is read that nobody wrote
  kBeyondGlobal,      // one element too far
  kBeyondShared,
  kBeyondDynamic,
  kTooManyThreads,  // no GPU takes such a launch
  kTooMuchShared,   // without cudaFuncSetAttribute
  kCaptured,        // and replayed: no fault
  kReadWhileCaptured,
  kOtherStream,    // than the one that is captured
  kDefaultStream,  // it can't be captured
  kFirstOrLast,    // a warp reads what the first and the last one write: one has, as a rule
  // From here on the sum is right by luck, in whatever order threads take turns.
  kNoneByLuck,
  kNoBarrier,            // a thread reads what another warp writes
  kOnlyWarpBarrier,      // the same, and it waits for its own warp
  kNoWarpBarrier,        // a lane reads what another writes
  kHalfWarpBarrier,      // the same, of the other half of the warp
  kOverwrittenInWarp,    // a lane writes what another has yet to read
  kUnwritten,            // shared memory is read before it is written
  kWrittenTwice,         // two lanes write the same number
  kNoFenceBefore,        // a ticket is drawn for what may not be seen yet
  kNoFenceAfter,         // what other blocks wrote may be read before the last ticket
  kWrittenByBlocks,      // every block writes the same number
  kReadBeforeAnyTicket,  // a block reads what another writes
  kAtomicAndNot,         // a thread counts without an atomic
};
// clang-format off
const char* const kNames[] = {
    "none", "missing barrier", "overwritten", "divergent barrier", "early return",
    "divergent shuffle", "uninitialised", "beyond global", "beyond shared", "beyond dynamic",
    "too many threads", "too much shared", "captured", "read while captured", "other stream",
    "default stream", "first or last", "none by luck", "no barrier", "only warp barrier",
    "no warp barrier", "half warp barrier", "overwritten in warp", "unwritten", "written twice",
    "no fence before", "no fence after", "written by blocks", "read before any ticket",
    "atomic and not"};
// clang-format on

__global__ void sum(const float* x, float* out, Fault fault) {
  IMCL_SHARED(of_warps, float[kThreads / 32]);
  IMCL_DYNAMIC_SHARED(values, float);
  const auto i = static_cast<int>(threadIdx.x);
  if (fault == kEarlyReturn && i >= 64) return;
  values[i] = x[fault == kBeyondGlobal ? i + 1 : i];
  if (fault == kBeyondDynamic) values[i + 1] = 0;
  __syncthreads();
  float value = values[(i + 1) % kThreads];
  if (fault != kOverwritten) __syncthreads();
  values[i] = 0;
  if (fault == kDivergentShuffle && i % 32 >= 16) {
    value += __shfl_xor_sync(~0u, value, 16);
  } else {
    value += __shfl_xor_sync(~0u, value, 16);
  }
  for (int other = 8; other > 0; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  const bool writes = i % 32 == 0 && !(fault == kUninitialised && i == 32);
  if (writes) of_warps[i / 32 + (fault == kBeyondShared)] = value;
  if (fault == kDivergentBarrier && i < 32) {
    __syncthreads();
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  if (i != 0) return;
  value = 0;
  for (const float each : of_warps) value += each;
  *out = value;
}

// The same by each of kBlocks blocks, of which the last writes the mean of their sums. Luck is
// a shuffle, which has all lanes come so far, or fmaxf, which ignores NaN.
__global__ void sum_by_luck(const float* x, float* out, float* others, unsigned* ticket,
                            Fault fault) {
  IMCL_SHARED(values, float[kThreads]);
  IMCL_SHARED(small, uint16_t[kThreads]);  // two of them make a word
  IMCL_SHARED(of_warps, float[kThreads / 32]);
  IMCL_SHARED(counted, int);
  IMCL_SHARED(last, bool);
  const auto i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  float *const of_blocks = others, *const unused = others + kBlocks;
  if (i == 0) counted = 0;
  values[i] = x[i];
  if (fault == kOnlyWarpBarrier) __syncwarp();
  else if (fault != kNoBarrier) __syncthreads();
  const int other = (i + 32) % kThreads;
  float value = fmaxf(values[other], x[other]);
  if (fault == kFirstOrLast) {
    IMCL_SHARED(twice, float[kThreads]);
    twice[i] = x[64 + i % 32];
    if (i / 32 == 1) value = fmaxf(twice[i - 32], twice[i + 32]);
  }
  __syncthreads();

  small[i] = static_cast<uint16_t>(value);
  value = __shfl_xor_sync(~0u, value, 1);
  const unsigned half = i % 32 < 16 ? 0xffffu : 0xffff0000u;
  if (fault == kHalfWarpBarrier) __syncwarp(half);
  else if (fault != kNoWarpBarrier) __syncwarp();
  value = static_cast<float>(small[i ^ 31]);
  value = __shfl_xor_sync(~0u, value, 1);
  if (fault != kOverwrittenInWarp) __syncwarp();
  small[i] = static_cast<uint16_t>(value);
  __syncwarp(half);  // enough for lanes of one half
  value = static_cast<float>(small[i ^ 15]);

  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  if (fault == kUnwritten) value = fmaxf(value, of_warps[i / 32]);
  if (i % 32 == 0 || (fault == kWrittenTwice && i % 32 == 1)) of_warps[i / 32] = value;
  if (fault != kAtomicAndNot || i > 0) atomicAdd(&counted, 1);
  else ++counted;
  __syncthreads();
  if (i == 0) {
    of_blocks[block] = of_warps[0] + of_warps[1] + of_warps[2];
    if (fault != kNoFenceBefore) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (fault != kNoFenceAfter) __threadfence();
    if (fault == kWrittenByBlocks) *unused = 1;
    if (fault == kReadBeforeAnyTicket) unused[1 + block] = of_blocks[(block + 1) % kBlocks];
  }
  __syncthreads();
  if (!last || i != 32 || counted != kThreads) return;
  value = 0;
  for (int b = 0; b < kBlocks; ++b) value += of_blocks[b];
  *out = value / kBlocks;
}

float captured(const float* x, Fault fault) {
  float out = -1, read = 0;
  const auto stream = [](std::uintptr_t number) { return reinterpret_cast<cudaStream_t>(number); };
  const cudaStream_t wanted = stream(fault == kDefaultStream ? 0 : 16);
  const emulated::Graph graph(wanted, [&] {
    IMCL_LAUNCH(sum, 1, kThreads, sizeof(float) * kThreads,
                fault == kOtherStream ? stream(32) : wanted)
    (x, &out, kNone);
    read = out;
  });
  graph.replay();
  return fault == kReadWhileCaptured ? read : out;
}

}  // namespace

int main(int argc, char** argv) {
  int fault = 0;
  for (int i = 0; i <= kAtomicAndNot; ++i)
    if (argc > 1 && std::string(argv[1]) == kNames[i]) fault = i;
  const std::unique_ptr<float[]> x(new float[kThreads]);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  // Twice: threads take turns in ascending order one time, and in descending the next.
  for (int run = 0; run < 2; ++run) {
    float out = -1;
    const std::unique_ptr<float[]> others(new float[1 + 2 * kBlocks]);
    unsigned ticket = 0;
    const int threads = fault == kTooManyThreads ? 1056 : kThreads;
    const std::size_t bytes =
        fault == kTooMuchShared ? std::size_t{64} << 10 : sizeof(float) * kThreads;
    try {
      if (fault >= kCaptured && fault <= kDefaultStream) {
        out = captured(x.get(), static_cast<Fault>(fault));
      } else if (fault < kFirstOrLast) {
        IMCL_LAUNCH(sum, 1, threads, bytes, nullptr)(x.get(), &out, static_cast<Fault>(fault));
      } else {
        IMCL_LAUNCH(sum_by_luck, kBlocks, threads, 0, nullptr)(x.get(), &out, others.get(), &ticket,
                                                               static_cast<Fault>(fault));
      }
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      continue;
    }
    std::printf("%g\n", static_cast<double>(out));
  }
  return 0;
}
