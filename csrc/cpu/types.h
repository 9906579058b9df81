// Plain descriptions of what the kernels work on: no torch, no ISA.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace imcl {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Offsets of the indices of one axis of a tensor: a stride, or a table where several
// dimensions don't collapse into one.
struct Axis {
  int64_t stride;
  const int64_t* table;

  IMCL_INLINE int64_t operator[](int64_t i) const { return table ? table[i] : i * stride; }
  IMCL_INLINE bool is_unit() const { return table == nullptr && stride == 1; }
};

// Calls run with a null pointer of the elements' type.
template <class Run>
IMCL_INLINE auto with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat64: return run(static_cast<double*>(nullptr));
    case DType::kBFloat16: return run(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16: return run(static_cast<Float16*>(nullptr));
    default: return run(static_cast<float*>(nullptr));
  }
}

// Runs body(i) for every i in [0, count), on any threads, in any order.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(int64_t i, void* context), void* context);

  template <class Body>
  IMCL_INLINE void operator()(int64_t count, const Body& body) const {
    run(
        count, [](int64_t i, void* context) { (*static_cast<const Body*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

namespace {  // each object's own, or the linker could give all that which one ISA alone can run

// On the calling thread only, in order.
[[maybe_unused]] IMCL_INLINE Parallel one_thread() {
  return {1, [](int64_t count, void (*body)(int64_t, void*), void* context) {
            for (int64_t i = 0; i < count; ++i) body(i, context);
          }};
}

}  // namespace

}  // namespace imcl
