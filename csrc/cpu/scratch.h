// Working memory that outlives a call, so that a training step doesn't fault the same
// pages in again and again: a stack of slabs per thread, released by scope.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace imcl {

class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // count uninitialised objects, aligned to a cache line, until this scope ends.
  template <class T>
  IMCL_INLINE T* get(int64_t count) {
    return static_cast<T*>(take(static_cast<std::size_t>(count) * sizeof(T)));
  }

 private:
  void* take(std::size_t bytes);

  std::size_t slab_, used_;  // top of this thread's stack when the scope began
};

}  // namespace imcl
