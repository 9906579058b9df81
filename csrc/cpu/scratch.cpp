#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace imcl {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kSlab = std::size_t{1} << 20;
constexpr std::size_t kKeep = 8 * kSlab;  // bytes a thread holds between calls at most

struct Slab {
  char* data;
  std::size_t size;
};

struct Arena {
  std::vector<Slab> slabs;
  std::size_t slab = 0, used = 0, bytes = 0;
  int depth = 0;

  void release() {
    for (const Slab& c : slabs) std::free(c.data);
    slabs.clear();
    slab = used = bytes = 0;
  }

  ~Arena() { release(); }
};

Arena& arena() {
  thread_local Arena local;
  return local;
}

}  // namespace

Scratch::Scratch() : slab_(arena().slab), used_(arena().used) { ++arena().depth; }

Scratch::~Scratch() {
  Arena& a = arena();
  a.slab = slab_;
  a.used = used_;
  if (--a.depth == 0 && a.bytes > kKeep) a.release();
}

void* Scratch::take(std::size_t bytes) {
  Arena& a = arena();
  bytes = (bytes + kLine) / kLine * kLine;  // at least one line: never a null pointer
  while (a.slab < a.slabs.size() && a.used + bytes > a.slabs[a.slab].size) {
    ++a.slab;
    a.used = 0;
  }
  if (a.slab == a.slabs.size()) {
    const std::size_t size = (bytes > kSlab ? bytes : kSlab);
    void* data = std::aligned_alloc(kLine, size);
    if (!data) throw std::bad_alloc();
    a.slabs.push_back({static_cast<char*>(data), size});
    a.bytes += size;
  }
  void* result = a.slabs[a.slab].data + a.used;
  a.used += bytes;
  return result;
}

}  // namespace imcl
