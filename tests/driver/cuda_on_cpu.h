// Runs CUDA kernels on the CPU, for tests: a .cu file compiles as C++17 with
//
//     g++ -x c++ -include tests/driver/cuda_on_cpu.h -DIMCL_CUDA_ON_CPU file.cu
//
// and IMCL_LAUNCH (csrc/cuda/launch.h) runs its kernel to the end. Every CUDA thread is a
// fiber; the fibers of a block take turns on one OS thread, switching where they wait for one
// another; blocks are shared out to a few OS threads. What a GPU would leave to chance is
// made to show instead:
//
// - Nothing runs in lockstep. A thread goes on alone to its next __syncthreads() or warp
//   operation, threads and warps in ascending order one time and descending the next, so that
//   a missing barrier gives wrong numbers. Blocks alternate too, from launch to launch.
// - Shared memory, of exactly the size asked for, starts out as NaN (all bits set), and is
//   gone when its block ends. AddressSanitizer sees any overrun of it.
// - A barrier or warp operation that not every thread (of its mask) comes to, from the same
//   line, is an error, as are a launch beyond the limits of a GPU, and shared memory beyond
//   48 KiB without cudaFuncSetAttribute. Errors are thrown by the launch.
// - With IMCL_EMULATED_SEED=n, blocks and threads take turns in an order drawn from n and the
//   number of the launch.
// - Compiled with IMCL_RACES, accesses that nothing orders are errors, whatever numbers come
//   out of them: cuda_races.h.
// - What is launched while a stream is captured (emulated::Graph) is done later: what the host
//   reads then isn't there yet, and what it frees is gone. There is nothing to allocate, copy or
//   wait with.
//
// Not covered: inline PTX, textures, cooperative groups, blocks that wait for one another.
// There is no atomicAdd of floating-point numbers here: results must not depend on order.
#pragma once

#if !defined(IMCL_CUDA_ON_CPU)
#error "compile with -DIMCL_CUDA_ON_CPU"
#endif

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define IMCL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define IMCL_ASAN 1
#endif
#endif
#if defined(IMCL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ---- types ----

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
namespace emulated {

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- fibers ----

constexpr unsigned kWarp = 32;
constexpr int kPoison = 0xff;  // all bits set are a NaN in every floating-point type
#if defined(IMCL_ASAN)
constexpr std::size_t kStack = std::size_t{256} << 10;  // frames are larger there
#else
constexpr std::size_t kStack = std::size_t{64} << 10;
#endif

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};

// Saves what a call preserves and the stack, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_context([[maybe_unused]] Context* from,
                                                            [[maybe_unused]] const Context* to) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void make_context(Context& context, char* stack, void (*entry)()) {
  // As if entry had been called from nowhere: six registers, its address, no return address.
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t state;
};

inline void switch_context(Context* from, const Context* to) {
  swapcontext(&from->state, &to->state);
}

inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStack;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

// Stacks for the fibers of one block, each with a page below it that must not be touched.
class Stacks {
 public:
  explicit Stacks(std::size_t count) : count_(count) {
    void* memory = mmap(nullptr, count * pitch(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the fibers' stacks");
    memory_ = static_cast<char*>(memory);
    for (std::size_t i = 0; i < count; ++i) mprotect(memory_ + i * pitch(), guard(), PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(memory_, count_ * pitch()); }

  std::size_t count() const { return count_; }
  char* operator[](std::size_t i) const { return memory_ + i * pitch() + guard(); }
  const char* end() const { return memory_ + count_ * pitch(); }

  // Made once and handed from launch to launch.
  static std::unique_ptr<Stacks> take(std::size_t count) {
    const std::lock_guard<std::mutex> hold(mutex());
    for (auto& each : spare()) {
      if (each->count() < count) continue;
      std::swap(each, spare().back());
      std::unique_ptr<Stacks> found = std::move(spare().back());
      spare().pop_back();
      return found;
    }
    return std::make_unique<Stacks>(std::max<std::size_t>(count, 256));
  }
  static void give_back(std::unique_ptr<Stacks> stacks) {
    const std::lock_guard<std::mutex> hold(mutex());
    spare().push_back(std::move(stacks));
  }

 private:
  static std::size_t guard() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  static std::size_t pitch() { return kStack + guard(); }
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<std::unique_ptr<Stacks>>& spare() {
    static std::vector<std::unique_ptr<Stacks>> all;
    return all;
  }

  char* memory_;
  std::size_t count_;
};

// ---- a block and its threads ----

// Where the source waits.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  }
};

}  // namespace emulated

#include "cuda_races.h"

namespace emulated {

enum class State { kReady, kAtBarrier, kInWarp, kFinished };

class Block;

struct Fiber {
  Block* block;
  uint3 thread;
  unsigned warp, lane;
  Context context;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  State state;
  Site site;       // where it waits, and
  unsigned mask;   // in a warp operation for whom,
  const void* in;  // with what,
  void* out;       // and where its result belongs;
};

inline thread_local Fiber* current = nullptr;

// In what order a block's threads take turns: warp by warp, from the first or from the last
// one on, or drawn anew each time.
struct Turns {
  bool descending = false, drawn = false;
  uint64_t seed = 0;
};

// What all blocks of a launch share.
struct Grid {
  dim3 size, block;
  std::size_t shared_bytes;
  void (*body)(const void*);
  const void* context;
};

class Block {
 public:
  Block(const Grid& grid, const Stacks& stacks)
      : grid(grid), fibers_(grid.block.x * grid.block.y * grid.block.z), order_(fibers_.size()) {
    std::iota(order_.begin(), order_.end(), 0u);
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.block = this;
      fiber.thread = {i % grid.block.x, i / grid.block.x % grid.block.y,
                      i / grid.block.x / grid.block.y};
      fiber.warp = i / kWarp;
      fiber.lane = i % kWarp;
      fiber.stack = stacks[i];
#if defined(IMCL_ASAN)
      ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);  // after a launch that failed
#endif
    }
    races::enter_blocks(size(), {stacks[0], stacks.end()},
                        {fibers_.data(), fibers_.data() + fibers_.size()});
  }

  void run(uint3 which, const Turns& turns) {
    index = which;
    descending_ = turns.descending;
    std::mt19937_64 random(turns.seed);
    error_.clear();
    races::enter_block();
    pieces_.clear();
    dynamic_ = Piece(nullptr, grid.shared_bytes, 16);
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      make_context(fiber.context, fiber.stack, &Block::enter);
    }
    while (!finished()) {
      bool moved = false;
      const unsigned warps = (size() + kWarp - 1) / kWarp;
      if (turns.drawn) {
        std::shuffle(order_.begin(), order_.end(), random);
        for (const unsigned i : order_) moved |= run_thread(fibers_[i]);
      } else {
        for (unsigned w = 0; w < warps; ++w) moved |= run_warp(descending_ ? warps - 1 - w : w);
      }
      if (!release_barrier() && !moved) complain("threads wait for one another for ever");
      descending_ = !descending_;
    }
    pieces_.clear();
    dynamic_ = Piece();
  }

  // Ends the block from inside a thread.
  [[noreturn]] void fail(const std::string& what) {
    races::run(races::kNobody);
    error_ = what;
    leave(*current);
    std::abort();
  }

  // Waits for all threads of the block.
  void barrier(Site site) {
    Fiber& self = *current;
    self.state = State::kAtBarrier;
    self.site = site;
    leave(self);
  }

  // Waits for the lanes in `mask`; the last of them calls body(in, out), which are the lanes'
  // pointers (null for lanes outside the mask).
  template <class Body>
  void collective(unsigned mask, const void* in, void* out, Site site, const Body& body) {
    Fiber& self = *current;
    if (!(mask >> self.lane & 1)) fail("a lane that is not in its mask at " + site.text());
    self.state = State::kInWarp;
    self.site = site;
    self.mask = mask;
    self.in = in;
    self.out = out;
    const void* ins[kWarp] = {};
    void* outs[kWarp] = {};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const unsigned i = self.warp * kWarp + lane;
      if (i >= size()) fail("a mask with lanes that don't exist at " + site.text());
      const Fiber& other = fibers_[i];
      if (other.state != State::kInWarp || other.mask != mask || !(other.site == site)) {
        leave(self);  // the last one to come finds all others here
        return;
      }
      ins[lane] = other.in;
      outs[lane] = other.out;
    }
    body(ins, outs);
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) fibers_[self.warp * kWarp + lane].state = State::kReady;
  }

  // The one piece of shared memory of that key, for all threads of the block.
  void* shared(const void* key, std::size_t bytes, std::size_t alignment) {
    const races::Unseen unseen;
    std::size_t total = bytes;
    for (const Piece& piece : pieces_) {
      if (piece.key == key) return piece.data.get();
      total += piece.bytes;
    }
    if (total > std::size_t{48} << 10) fail("static shared memory beyond 48 KiB");
    pieces_.emplace_back(key, bytes, std::max<std::size_t>(alignment, 16));
    return pieces_.back().data.get();
  }
  void* dynamic_shared() { return dynamic_.data.get(); }

  const Grid& grid;
  uint3 index;

 private:
  struct Piece {
    const void* key = nullptr;
    std::size_t bytes = 0;
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};

    Piece() = default;
    Piece(const void* key, std::size_t bytes, std::size_t alignment) : key(key), bytes(bytes) {
      void* memory = nullptr;
      if (posix_memalign(&memory, alignment, bytes)) std::abort();
      data.reset(memory);
      std::memset(memory, kPoison, bytes);
      races::shared_memory(memory, bytes);
    }
  };

  unsigned size() const { return static_cast<unsigned>(fibers_.size()); }

  bool finished() const {
    for (const Fiber& fiber : fibers_)
      if (fiber.state != State::kFinished) return false;
    return true;
  }

  // Until every lane has finished or waits for others.
  bool run_warp(unsigned warp) {
    const unsigned first = warp * kWarp, count = std::min(kWarp, size() - first);
    bool any = false;
    for (bool moved = true; moved;) {
      moved = false;
      for (unsigned i = 0; i < count; ++i) {
        moved |= run_thread(fibers_[first + (descending_ ? count - 1 - i : i)]);
      }
      any |= moved;
    }
    return any;
  }

  bool run_thread(Fiber& fiber) {
    if (fiber.state != State::kReady) return false;
    enter(fiber);
    if (!error_.empty()) complain(error_);
    return true;
  }

  bool release_barrier() {
    unsigned waiting = 0;
    for (const Fiber& fiber : fibers_) waiting += fiber.state == State::kAtBarrier;
    if (waiting != size()) return false;
    for (const Fiber& fiber : fibers_)
      if (!(fiber.site == fibers_[0].site)) complain("threads wait at different barriers");
    races::barrier(fibers_[0].site);
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    return true;
  }

  [[noreturn]] void complain(const std::string& what) {
    std::map<std::string, unsigned> where;
    for (const Fiber& fiber : fibers_) {
      switch (fiber.state) {
        case State::kReady: ++where["run"]; break;
        case State::kAtBarrier: ++where["wait at the barrier of " + fiber.site.text()]; break;
        case State::kInWarp: ++where["wait in the warp operation of " + fiber.site.text()]; break;
        case State::kFinished: ++where["have ended"]; break;
      }
    }
    std::string message = "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
                          ", " + std::to_string(index.z) + "): " + what + ":";
    for (const auto& [state, threads] : where)
      message += " " + std::to_string(threads) + " threads " + state + ";";
    message.back() = '.';
    pieces_.clear();
    throw std::runtime_error(message);
  }

  // From the scheduler into a thread, and back.
  void enter(Fiber& fiber) {
    current = &fiber;
#if defined(IMCL_ASAN)
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
    races::run(static_cast<unsigned>(&fiber - fibers_.data()));
    switch_context(&scheduler_, &fiber.context);
    races::run(races::kNobody);
#if defined(IMCL_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
  }

  void leave(Fiber& fiber) {
#if defined(IMCL_ASAN)
    const bool last = fiber.state == State::kFinished || !error_.empty();
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, bottom_, bottom_size_);
#endif
    switch_context(&fiber.context, &scheduler_);
#if defined(IMCL_ASAN)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom_, &bottom_size_);
#endif
  }

  static void enter() {
    Fiber& self = *current;
    Block& block = *self.block;
#if defined(IMCL_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &block.bottom_, &block.bottom_size_);
#endif
    block.grid.body(block.grid.context);
    self.state = State::kFinished;
    block.leave(self);
    std::abort();
  }

  std::vector<Fiber> fibers_;
  std::vector<unsigned> order_;
  std::vector<Piece> pieces_;
  Piece dynamic_;
  Context scheduler_;
  bool descending_ = false;
  std::string error_;
  const void* bottom_ = nullptr;  // the scheduler's own stack, for AddressSanitizer
  std::size_t bottom_size_ = 0;
};

// ---- launches ----

constexpr std::size_t kStaticShared = std::size_t{48} << 10, kMostShared = std::size_t{227} << 10;
constexpr std::size_t kMostParameters = 32764;

// The dynamic shared memory that cudaFuncSetAttribute allowed a kernel.
inline std::mutex allowance_mutex;
inline std::map<const void*, std::size_t> allowances;

inline std::size_t allowance(const void* kernel) {
  const std::lock_guard<std::mutex> hold(allowance_mutex);
  const auto found = allowances.find(kernel);
  return found == allowances.end() ? kStaticShared : found->second;
}

inline unsigned os_threads() {
  if (races::kChecked) return 1;
  const char* wanted = std::getenv("IMCL_EMULATED_THREADS");
  return wanted ? static_cast<unsigned>(std::max(1, std::atoi(wanted)))
                : std::max(1u, std::thread::hardware_concurrency());
}

inline std::atomic<uint64_t> launches{0};

inline void run_grid(const Grid& grid) {
  const int64_t blocks = int64_t{grid.size.x} * grid.size.y * grid.size.z;
  const uint64_t launch = launches++;
  const char* const seed = std::getenv("IMCL_EMULATED_SEED");
  std::vector<int64_t> order(static_cast<std::size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::seed_seq seeds{uint64_t{seed ? std::strtoull(seed, nullptr, 10) : 0}, launch};
  std::mt19937_64 random(seeds);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  else if (launch % 2) std::reverse(order.begin(), order.end());
  const uint64_t first_seed = random();
  races::enter_launch();
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    std::unique_ptr<Stacks> stacks =
        Stacks::take(grid.block.x * grid.block.y * std::size_t{grid.block.z});
    try {
      Block block(grid, *stacks);
      for (int64_t i = next++; i < blocks; i = next++) {
        const auto b = static_cast<uint64_t>(order[static_cast<std::size_t>(i)]);
        block.run({static_cast<unsigned>(b % grid.size.x),
                   static_cast<unsigned>(b / grid.size.x % grid.size.y),
                   static_cast<unsigned>(b / grid.size.x / grid.size.y)},
                  {(b + launch) % 2 != 0, seed != nullptr, first_seed + b});
      }
    } catch (...) {
      const std::lock_guard<std::mutex> hold(error_mutex);
      error = std::current_exception();
      next = blocks;
    }
    Stacks::give_back(std::move(stacks));
  };
  const auto threads = static_cast<unsigned>(std::min<int64_t>(os_threads(), (blocks + 3) / 4));
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

// What a stream is told while it is captured: not done, but kept for replay(), and all that the
// host may ask for meanwhile. Whatever it works on must be there in a replay still.
class Graph {
 public:
  template <class Body>
  Graph(const void* stream, const Body& body) : stream_(stream) {
    if (!stream) throw std::runtime_error("the default stream can't be captured");
    if (capturing) throw std::runtime_error("a stream is captured already");
    capturing = this;
    try {
      body();
    } catch (...) {
      capturing = nullptr;
      throw;
    }
    capturing = nullptr;
  }
  Graph(const Graph&) = delete;

  void replay() const {
    for (const auto& each : work_) each();
  }

  // Work for a stream.
  template <class Work>
  static void enqueue(const void* stream, const Work& work) {
    if (!capturing) return work();
    if (stream != capturing->stream_)
      throw std::runtime_error("work for another stream than the one that is captured");
    capturing->work_.emplace_back(work);
  }

 private:
  static inline thread_local Graph* capturing = nullptr;

  const void* stream_;
  std::vector<std::function<void()>> work_;
};

template <class... P>
class Launch {
 public:
  Launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, const void* stream)
      : kernel_(kernel), grid_{grid, block, shared_bytes, nullptr, nullptr}, stream_(stream) {}

  template <class... A>
  void operator()(const A&... arguments) {
    static_assert((std::size_t{0} + ... + sizeof(std::decay_t<P>)) <= kMostParameters);
    const auto& b = grid_.block;
    const std::size_t threads = std::size_t{b.x} * b.y * b.z;
    const auto& g = grid_.size;
    if (threads < 1 || threads > 1024 || b.z > 64 || g.x < 1 || g.x > 0x7fffffff || g.y < 1 ||
        g.y > 65535 || g.z < 1 || g.z > 65535)
      throw std::runtime_error("a launch that no GPU takes: blocks of " + std::to_string(threads) +
                               " threads, a grid of (" + std::to_string(g.x) + ", " +
                               std::to_string(g.y) + ", " + std::to_string(g.z) + ")");
    if (grid_.shared_bytes > allowance(reinterpret_cast<const void*>(kernel_)))
      throw std::runtime_error("more dynamic shared memory than allowed: " +
                               std::to_string(grid_.shared_bytes) + " bytes");
    // Never a local: with -ftrivial-auto-var-init GCC 12 clears the padding of a large one at wrong
    // offsets, over numbers that are set.
    using Call = std::tuple<void (*)(P...), std::decay_t<P>...>;
    Graph::enqueue(stream_,
                   [of = grid_, call = std::make_shared<const Call>(kernel_, arguments...)] {
                     Grid grid = of;
                     grid.context = call.get();
                     grid.body = [](const void* context) {
                       std::apply([](auto kernel, const auto&... values) { kernel(values...); },
                                  *static_cast<const Call*>(context));
                     };
                     run_grid(grid);
                   });
  }

 private:
  void (*kernel_)(P...);
  Grid grid_;
  const void* stream_;
};

// ---- warp operations ----

// For what has no intrinsic here: every lane of the mask hands in an In, and gets an Out. The
// last lane to come calls body(in, out) once for all, with in(lane) and out(lane) references
// to those of any lane of the mask: a tensor core's product is one such call.
template <class Out, class In, class Body>
inline Out collective(unsigned mask, const In& in, const Body& body, Site site = Site::here()) {
  Out out;
  std::memset(static_cast<void*>(&out), kPoison, sizeof(Out));
  current->block->collective(mask, &in, &out, site, [&](const void* const* ins, void* const* outs) {
    body([&](unsigned lane) -> const In& { return *static_cast<const In*>(ins[lane]); },
         [&](unsigned lane) -> Out& { return *static_cast<Out*>(outs[lane]); });
  });
  return out;
}

template <class T>
struct Shuffle {
  T value;
  unsigned source;
};

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  if (!(mask >> source & 1))
    current->block->fail("a shuffle from a lane that is not in the mask at " + site.text());
  return collective<T>(
      mask, Shuffle<T>{value, source},
      [mask](const auto& in, const auto& out) {
        for (unsigned lane = 0; lane < kWarp; ++lane)
          if (mask >> lane & 1) out(lane) = in(in(lane).source).value;
      },
      site);
}

template <class T, class Key>
inline T& shared(Key key) {
  static_assert(std::is_trivially_default_constructible_v<T>);
  return *static_cast<T*>(current->block->shared(key(), sizeof(T), alignof(T)));
}

// What a GPU ends with an error, and a CPU doesn't notice.
inline void check_aligned(const void* address, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0)
    current->block->fail("an access that is not aligned to its " + std::to_string(alignment) +
                         " bytes");
}

}  // namespace emulated

#define IMCL_LAUNCH(kernel, grid, block, shared_bytes, stream) \
  ::emulated::Launch(kernel, grid, block, shared_bytes, stream)
#define IMCL_PARAMETER(...) const __VA_ARGS__&
#define IMCL_SHARED(name, ...)                      \
  auto& name = ::emulated::shared<__VA_ARGS__>([] { \
    static const char key = 0;                      \
    return static_cast<const void*>(&key);          \
  })
#define IMCL_DYNAMIC_SHARED(name, ...) \
  auto* name = static_cast<__VA_ARGS__*>(::emulated::current->block->dynamic_shared())

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define threadIdx (::emulated::current->thread)
#define blockIdx (::emulated::current->block->index)
#define blockDim (::emulated::current->block->grid.block)
#define gridDim (::emulated::current->block->grid.size)
constexpr int warpSize = 32;

inline void __syncthreads(emulated::Site site = emulated::Site::here()) {
  emulated::current->block->barrier(site);
}
inline void __syncwarp(unsigned mask = ~0u, emulated::Site site = emulated::Site::here()) {
  const unsigned warp = emulated::current->warp;
  emulated::collective<char>(
      mask, '\0',
      [&](const auto&, const auto&) { emulated::races::warp_barrier(warp, mask, site); }, site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32,
                         emulated::Site site = emulated::Site::here()) {
  const unsigned lane = emulated::current->lane, w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(other);
  return emulated::shuffle(mask, value, source / w <= lane / w ? source : lane, site);
}
// ---- memory ----

inline void __threadfence(emulated::Site site = emulated::Site::here()) {
#if !defined(IMCL_RACES)  // that has one thread, and that sanitizer no fences
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
  emulated::races::fence(site);
}

template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
inline T atomicAdd(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}

// ---- arithmetic ----

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) { return emulated::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bit_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }

inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}
inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  unsigned bits;
  if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // multiples of 2^-24; adding 2^-1 rounds to them
    bits = __float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f);
  } else {
    bits = __float_as_uint(magnitude) - (112u << 23);
    bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}

// ---- the host's side ----

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
};

inline const char* cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches throw theirs
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 3; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream) {
  emulated::Graph::enqueue(stream, [=] { std::memset(data, value, bytes); });
  return cudaSuccess;
}
template <class... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<std::size_t>(value) > emulated::kMostShared)
    return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> hold(emulated::allowance_mutex);
  emulated::allowances[reinterpret_cast<const void*>(kernel)] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
