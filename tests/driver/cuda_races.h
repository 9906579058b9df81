// What the emulator (cuda_on_cpu.h) tells the race check of: nothing, unless IMCL_RACES.
//
// The check sees every access to memory: with -fsanitize=thread the compiler calls a function
// before each, and cuda_races.cpp, compiled without, defines those in place of the sanitizer's
// library. It keeps, for every two bytes of shared and global memory, who wrote them last and
// who has read them since, and when: at which __syncthreads() of its block, and at which
// __syncwarp() of its warp. Two accesses to the same bytes by different threads, not both reads
// and not both atomic, are a race unless one of these lies between them:
//
// - a __syncthreads(), for threads of a block;
// - a __syncwarp() for both lanes. Shuffles, votes and tensor cores wait for one another, but
//   order no memory;
// - __threadfence(), an atomic operation, a later one on the same address by another thread
//   (of whatever block), and __threadfence() there;
// - the end of the launch.
//
// A read of shared memory that its block hasn't written is an error too. What goes unseen is what
// lies on the host's own stack, and copies by memcpy of other than 1, 2, 4, 8 or 16 bytes, of
// which the compiler makes no access. Nothing of this
// depends on the order in which threads take turns, or on the numbers.
//
// IMCL_EMULATED_WITHOUT=file.cu:123 has whatever stands in that line wait as ever, but order
// nothing: the check must find what it is there for.
#pragma once

namespace emulated::races {

struct Range {
  const void *begin, *end;
  bool holds(const void* address) const { return begin <= address && address < end; }
};

constexpr unsigned kNobody = ~0u;

#if defined(IMCL_RACES)

constexpr bool kChecked = true;
void enter_launch();
void enter_blocks(unsigned threads, Range stacks, Range fibers);  // one after the other, from now
void enter_block();
void shared_memory(const void* data, std::size_t bytes);  // another piece of it, of the block
void run(unsigned thread);                                // it goes on, or kNobody
void barrier(const Site& site);
void warp_barrier(unsigned warp, unsigned mask, const Site& site);
void fence(const Site& site);

// Accesses of the emulator's own.
class Unseen {
 public:
  Unseen();
  ~Unseen();

 private:
  unsigned thread_;
};

#else

constexpr bool kChecked = false;
inline void enter_launch() {}
inline void enter_blocks(unsigned, Range, Range) {}
inline void enter_block() {}
inline void shared_memory(const void*, std::size_t) {}
inline void run(unsigned) {}
inline void barrier(const Site&) {}
inline void warp_barrier(unsigned, unsigned, const Site&) {}
inline void fence(const Site&) {}
struct Unseen {
  Unseen() {}  // a variable of it is used
};

#endif

}  // namespace emulated::races
