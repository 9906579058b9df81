// Kernels with the faults that the emulator (cuda_on_cpu.h) must show, and one without.
//
// Usage: cuda_faults FAULT; prints the sum that the kernel makes, or what the launch throws.
#include <memory>

#include "../../csrc/cuda/launch.h"

namespace {

constexpr int kThreads = 96;

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
};
const char* const kNames[] = {
    "none",          "missing barrier",   "overwritten",      "divergent barrier",
    "early return",  "divergent shuffle", "uninitialised",    "beyond global",
    "beyond shared", "beyond dynamic",    "too many threads", "too much shared"};

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

}  // namespace

int main(int argc, char** argv) {
  int fault = 0;
  for (int i = 0; i <= kTooMuchShared; ++i)
    if (argc > 1 && std::string(argv[1]) == kNames[i]) fault = i;
  const std::unique_ptr<float[]> x(new float[kThreads]);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  // Twice: threads take turns in ascending order one time, and in descending the next.
  for (int run = 0; run < 2; ++run) {
    float out = -1;
    const int threads = fault == kTooManyThreads ? 1056 : kThreads;
    const std::size_t bytes =
        fault == kTooMuchShared ? std::size_t{64} << 10 : sizeof(float) * kThreads;
    try {
      IMCL_LAUNCH(sum, 1, threads, bytes, nullptr)(x.get(), &out, static_cast<Fault>(fault));
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      continue;
    }
    std::printf("%g\n", static_cast<double>(out));
  }
  return 0;
}
