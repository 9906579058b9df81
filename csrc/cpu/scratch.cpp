#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace imcl {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kChunk = std::size_t{1} << 20;
constexpr std::size_t kKeep = 8 * kChunk;  // bytes a thread holds between calls at most

struct Chunk {
  char* data;
  std::size_t size;
};

struct Arena {
  std::vector<Chunk> chunks;
  std::size_t chunk = 0, used = 0, bytes = 0;
  int depth = 0;

  void release() {
    for (const Chunk& c : chunks) std::free(c.data);
    chunks.clear();
    chunk = used = bytes = 0;
  }

  ~Arena() { release(); }
};

Arena& arena() {
  thread_local Arena local;
  return local;
}

}  // namespace

Scratch::Scratch() : chunk_(arena().chunk), used_(arena().used) { ++arena().depth; }

Scratch::~Scratch() {
  Arena& a = arena();
  a.chunk = chunk_;
  a.used = used_;
  if (--a.depth == 0 && a.bytes > kKeep) a.release();
}

void* Scratch::take(std::size_t bytes) {
  Arena& a = arena();
  bytes = (bytes + kLine) / kLine * kLine;  // at least one line: never a null pointer
  while (a.chunk < a.chunks.size() && a.used + bytes > a.chunks[a.chunk].size) {
    ++a.chunk;
    a.used = 0;
  }
  if (a.chunk == a.chunks.size()) {
    const std::size_t size = (bytes > kChunk ? bytes : kChunk);
    void* data = std::aligned_alloc(kLine, size);
    if (!data) throw std::bad_alloc();
    a.chunks.push_back({static_cast<char*>(data), size});
    a.bytes += size;
  }
  void* result = a.chunks[a.chunk].data + a.used;
  a.used += bytes;
  return result;
}

}  // namespace imcl
