// What a kernel's source says otherwise under nvcc than in the tests, which compile it as
// plain C++ and run it on the CPU (IMCL_CUDA_ON_CPU, tests/driver/cuda_on_cpu.h).
#pragma once

#if !defined(IMCL_CUDA_ON_CPU)

#include <cuda_runtime_api.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace imcl {
template <class T>
using Same = T;
}  // namespace imcl

// IMCL_LAUNCH(kernel, grid, block, shared_bytes, stream)(arguments...); the kernel is a name
// or a pointer (`const auto kernel = my_kernel<A, B>;` where it has template arguments).
#define IMCL_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  kernel<<<grid, block, shared_bytes, stream>>>

// A parameter passed by value, at most 32764 bytes of them, and read where it lies:
// __global__ void kernel(IMCL_PARAMETER(Arguments) in).
#define IMCL_PARAMETER(...) const __grid_constant__ __VA_ARGS__

// Shared memory of a fixed type, and the launch's own: IMCL_SHARED(tile, float[64][65]);
// IMCL_DYNAMIC_SHARED(data, float) makes `float* data`, aligned to 16 bytes.
#define IMCL_SHARED(name, ...) __shared__::imcl::Same<__VA_ARGS__> name
#define IMCL_DYNAMIC_SHARED(name, ...)                                        \
  extern __shared__ __align__(16) unsigned char imcl_dynamic_shared_memory[]; \
  auto* name = reinterpret_cast<__VA_ARGS__*>(imcl_dynamic_shared_memory)

#endif
