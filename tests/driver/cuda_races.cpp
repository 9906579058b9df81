// The race check of the emulator: cuda_races.h says what it is. Compiled without the sanitizer
// whose library it stands in for.
#include <dlfcn.h>
#include <pthread.h>

#include <array>
#include <deque>
#include <unordered_map>

#include "cuda_on_cpu.h"

namespace emulated::races {
namespace {

constexpr std::size_t kGrain = 2;  // bytes that are told apart
constexpr std::size_t kPage = 4096 / kGrain;
constexpr uintptr_t kNoPage = ~uintptr_t{0};

using Lanes = std::array<uint32_t, kWarp>;

// One access. Blocks are numbered through all launches from 1 on, so that nothing has to be
// forgotten between them.
struct Access {
  uint32_t block = 0;
  uint32_t epoch = 0;  // __syncthreads() of its block before
  uint32_t clock = 0;  // of its thread, which only it advances
  uint16_t thread = 0;
  bool atomic = false;
  uintptr_t code = 0;
};

struct Cell {
  Access write;                    // the last one
  Access read;                     // since then the last one; block 0: none
  uint32_t warps = 0;              // that have read in its block and epoch
  uint32_t lanes = 0;              // that have, if only one warp did,
  uint32_t clocks = 0;             // and where their clocks are, if only one lane did not
  bool in_several_blocks = false;  // it was read, unordered
};

// What happened before: in each block everything before an epoch, and of a warp in that epoch
// what came before its lanes' clocks.
struct Known {
  uint32_t epoch;
  Lanes clocks;
};
using Knowledge = std::map<std::pair<uint32_t, unsigned>, Known>;  // of a block and a warp

struct Thread {
  unsigned lane, warp;
  Lanes known;         // of its own warp, in this epoch; its own entry is its clock
  Knowledge others;    // got through atomics
  Knowledge seen;      // by its atomics, before the next fence
  Knowledge released;  // by the last fence, for its next atomics
};

struct Shared {
  Range range;
  std::vector<Cell> cells;
};

// All of it belongs to the one thread that runs launches.
unsigned running = kNobody;  // not in `now`, which is made later than other files' variables
struct {
  uint32_t first_block = 1, block = 0, epoch = 0;
  std::vector<Thread> threads;
  Knowledge everybody;  // what others happened before for all threads, by a barrier
  std::deque<Shared> shared;
  std::size_t pieces = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, kPage> > > pages;
  uintptr_t last_page = kNoPage;
  Cell* last_cells = nullptr;
  std::deque<Lanes> clocks{Lanes{}};
  std::map<const void*, Knowledge> atomics;
  Range stacks{}, fibers{}, own_stack{};
} now;

void join(Knowledge& into, const Knowledge& from) {
  for (const auto& [key, known] : from) {
    const auto [found, added] = into.emplace(key, known);
    Known& mine = found->second;
    if (added || known.epoch < mine.epoch) continue;
    if (known.epoch > mine.epoch) {
      mine = known;
      continue;
    }
    for (unsigned i = 0; i < kWarp; ++i) mine.clocks[i] = std::max(mine.clocks[i], known.clocks[i]);
  }
}

bool knows(const Knowledge& knowledge, const Access& access) {
  auto each = knowledge.lower_bound({access.block, 0});
  for (; each != knowledge.end() && each->first.first == access.block; ++each) {
    const Known& known = each->second;
    if (access.epoch < known.epoch) return true;
    if (access.epoch == known.epoch && access.thread / kWarp == each->first.second &&
        access.clock <= known.clocks[access.thread % kWarp])
      return true;
  }
  return false;
}

// Whether it comes before whatever the current thread does next.
bool ordered(const Access& access) {
  if (access.block < now.first_block) return true;
  const Thread& self = now.threads[running];
  if (access.block == now.block) {
    if (access.epoch < now.epoch || access.thread == running) return true;
    if (access.thread / kWarp == self.warp && access.clock <= self.known[access.thread % kWarp])
      return true;
  }
  return knows(self.others, access) || knows(now.everybody, access);
}

// ---- errors ----

// The lines that an address in the code was made of, the innermost first.
std::string source_of(uintptr_t code) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(code), &info)) return "an unknown line";
  char command[4200], line[512];
  const auto offset = code - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::snprintf(command, sizeof(command), "addr2line -s -i -e '%s' 0x%zx 2>/dev/null",
                info.dli_fname, static_cast<std::size_t>(offset));
  std::string lines;
  if (FILE* const pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof(line), pipe)) {
      std::string one(line, std::strcspn(line, " \n"));
      if (one.find("cuda_on_cpu") == 0) continue;
      lines += (lines.empty() ? "" : " of ") + one;
    }
    pclose(pipe);
  }
  std::snprintf(line, sizeof(line), "0x%zx", static_cast<std::size_t>(offset));
  return lines.empty() || lines[0] == '?' ? line : lines;
}

std::string name_of(const Access& access) {
  return (access.block == now.block ? "" : "another block's ") + std::string("thread ") +
         std::to_string(access.thread);
}

[[noreturn]] void report(const Access& mine, bool writes, const Access& other, bool wrote,
                         const void* address) {
  Block& block = *current->block;
  run(kNobody);
  std::string where = "global memory";
  for (std::size_t i = 0; i < now.pieces; ++i)
    if (now.shared[i].range.holds(address))
      where = "shared memory, byte " +
              std::to_string(static_cast<const char*>(address) -
                             static_cast<const char*>(now.shared[i].range.begin));
  if (!other.block)
    block.fail(name_of(mine) + " reads what nobody has written of " + where + ", at " +
               source_of(mine.code));
  block.fail("a race on " + where + ": " + name_of(mine) + (writes ? " writes" : " reads") +
             " at " + source_of(mine.code) + " what " + name_of(other) +
             (wrote ? " wrote" : " read") + " at " + source_of(other.code) +
             ", and nothing orders them");
}

// ---- accesses ----

// Another block's shared memory lay elsewhere.
void forget_other_blocks(Cell& cell) {
  if (cell.write.block != now.block) cell.write.block = 0;
  if (cell.read.block != now.block) cell.read.block = 0;
}

void note_read(Cell& cell, const Access& mine, const void* address, bool is_shared) {
  if (is_shared && cell.write.block != now.block) report(mine, false, {}, true, address);
  if (!ordered(cell.write)) report(mine, false, cell.write, true, address);
  const unsigned warp = mine.thread / kWarp, lane = mine.thread % kWarp;
  if (cell.read.block == now.block && cell.read.epoch == now.epoch) {
    if (cell.read.thread == mine.thread && cell.read.clock == mine.clock) return;
    if (cell.warps == 1u << warp) {
      if (cell.lanes != 1u << lane) {
        if (!cell.clocks) {
          cell.clocks = static_cast<uint32_t>(now.clocks.size());
          now.clocks.emplace_back();
        }
        Lanes& clocks = now.clocks[cell.clocks];
        if (!(cell.lanes & (cell.lanes - 1))) clocks[cell.read.thread % kWarp] = cell.read.clock;
        clocks[lane] = mine.clock;
        cell.lanes |= 1u << lane;
      }
    } else {
      cell.warps |= 1u << warp;
    }
  } else {
    if (cell.read.block != now.block && !ordered(cell.read)) cell.in_several_blocks = true;
    cell.warps = 1u << warp;
    cell.lanes = 1u << lane;
  }
  cell.read = mine;
}

void note_write(Cell& cell, const Access& mine, const void* address) {
  if (!(cell.write.atomic && mine.atomic) && !ordered(cell.write))
    report(mine, true, cell.write, true, address);
  if (cell.read.block >= now.first_block) {
    Access read = cell.read;
    const uint32_t warp = 1u << mine.thread / kWarp, lane = 1u << mine.thread % kWarp;
    bool after = ordered(read) && !cell.in_several_blocks;
    if (read.block == now.block && read.epoch == now.epoch) {
      if (const uint32_t others = cell.warps & ~warp) {
        after = after && cell.warps == others && !(others & (others - 1));
        if (read.thread / kWarp == mine.thread / kWarp)  // named is the first of another warp
          read.thread = static_cast<uint16_t>(__builtin_ctz(others) * kWarp);
      } else if (cell.lanes & (cell.lanes - 1)) {
        for (unsigned i = 0; i < kWarp; ++i) {
          if (!((cell.lanes & ~lane) >> i & 1)) continue;
          if (now.clocks[cell.clocks][i] <= now.threads[running].known[i]) continue;
          after = false;
          read.thread = static_cast<uint16_t>(mine.thread / kWarp * kWarp + i);
        }
      }
    }
    if (!after) report(mine, true, read, false, address);
  }
  cell.write = mine;
  cell.read.block = 0;
  cell.in_several_blocks = false;
}

Cell* cells_of_page(uintptr_t page) {
  if (page != now.last_page) {
    auto& found = now.pages[page];
    if (!found) found = std::make_unique<std::array<Cell, kPage> >();
    now.last_page = page;
    now.last_cells = found->data();
  }
  return now.last_cells;
}

void note(const void* address, std::size_t bytes, bool writes, bool atomic, const void* code) {
  if (running == kNobody || now.stacks.holds(address) || now.own_stack.holds(address) ||
      now.fibers.holds(address))
    return;
  const Access mine{now.block,
                    now.epoch,
                    now.threads[running].known[running % kWarp],
                    static_cast<uint16_t>(running),
                    atomic,
                    reinterpret_cast<uintptr_t>(code)};
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (std::size_t i = 0; i < now.pieces; ++i) {
    Shared& piece = now.shared[i];
    if (!piece.range.holds(address)) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(piece.range.begin);
    const uintptr_t end = std::min((first + bytes - 1 - begin) / kGrain + 1, piece.cells.size());
    for (uintptr_t c = (first - begin) / kGrain; c < end; ++c) {
      Cell& cell = piece.cells[c];
      forget_other_blocks(cell);
      if (writes) note_write(cell, mine, address);
      else note_read(cell, mine, address, true);
    }
    return;
  }
  for (uintptr_t c = first / kGrain; c <= (first + bytes - 1) / kGrain; ++c) {
    Cell& cell = cells_of_page(c / kPage)[c % kPage];
    if (writes) note_write(cell, mine, address);
    else note_read(cell, mine, address, false);
  }
}

// ---- what orders them ----

bool is_without(const Site& site) {
  const char* const without = std::getenv("IMCL_EMULATED_WITHOUT");
  return without && site.text() == without;
}

void note_atomic(const void* address, std::size_t bytes, const void* code) {
  if (running == kNobody) return;
  note(address, bytes, true, true, code);
  Thread& self = now.threads[running];
  Knowledge& there = now.atomics[address];
  join(self.seen, there);
  join(there, self.released);
}

}  // namespace

Unseen::Unseen() : thread_(running) { running = kNobody; }
Unseen::~Unseen() { running = thread_; }

void run(unsigned thread) { running = thread; }

void enter_launch() {
  now.first_block = now.block + 1;
  now.atomics.clear();
  pthread_attr_t attributes;
  void* stack = nullptr;
  std::size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  now.own_stack = {stack, static_cast<char*>(stack) + bytes};
}

void enter_blocks(unsigned threads, Range stacks, Range fibers) {
  now.threads.resize(threads);
  now.stacks = stacks;
  now.fibers = fibers;
}

void enter_block() {
  ++now.block;
  now.epoch = 0;
  now.everybody.clear();
  now.pieces = 0;
  for (unsigned i = 0; i < now.threads.size(); ++i) {
    now.threads[i] = {i % kWarp, i / kWarp, {}, {}, {}, {}};
    now.threads[i].known[i % kWarp] = 1;
  }
}

void shared_memory(const void* data, std::size_t bytes) {
  if (now.pieces == now.shared.size()) now.shared.emplace_back();
  Shared& piece = now.shared[now.pieces++];
  piece.range = {data, static_cast<const char*>(data) + bytes};
  piece.cells.resize((bytes + kGrain - 1) / kGrain);
  now.atomics.erase(now.atomics.lower_bound(piece.range.begin),
                    now.atomics.lower_bound(piece.range.end));
}

void barrier(const Site& site) {
  if (is_without(site)) return;
  ++now.epoch;
  for (Thread& thread : now.threads) {
    join(now.everybody, thread.others);
    thread.others.clear();
  }
}

void warp_barrier(unsigned warp, unsigned mask, const Site& site) {
  if (is_without(site)) return;
  Lanes known{};
  Knowledge others;
  const auto lanes = [&](const auto& body) {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) body(now.threads[warp * kWarp + lane]);
  };
  lanes([&](const Thread& thread) {
    for (unsigned i = 0; i < kWarp; ++i) known[i] = std::max(known[i], thread.known[i]);
    join(others, thread.others);
  });
  lanes([&](Thread& thread) {
    thread.known = known;
    ++thread.known[thread.lane];
    thread.others = others;
  });
}

void fence(const Site& site) {
  if (is_without(site)) return;
  Thread& self = now.threads[running];
  join(self.others, self.seen);
  self.seen.clear();
  self.released = self.others;
  join(self.released, now.everybody);
  join(self.released, {{{now.block, self.warp}, {now.epoch, self.known}}});
  ++self.known[self.lane];
}

}  // namespace emulated::races

// ---- what the compiler calls ----

#define IMCL_HERE __builtin_return_address(0)
#define IMCL_ACCESS(bytes)                                          \
  void __tsan_read##bytes(void* address) {                          \
    emulated::races::note(address, bytes, false, false, IMCL_HERE); \
  }                                                                 \
  void __tsan_write##bytes(void* address) {                         \
    emulated::races::note(address, bytes, true, false, IMCL_HERE);  \
  }                                                                 \
  void __tsan_unaligned_read##bytes(void* address) {                \
    emulated::races::note(address, bytes, false, false, IMCL_HERE); \
  }                                                                 \
  void __tsan_unaligned_write##bytes(void* address) {               \
    emulated::races::note(address, bytes, true, false, IMCL_HERE);  \
  }
#define IMCL_ATOMIC(bits)                                                                      \
  using Bits##bits = uint##bits##_t;                                                           \
  Bits##bits __tsan_atomic##bits##_load(const Bits##bits* address, int) {                      \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                         \
  }                                                                                            \
  void __tsan_atomic##bits##_store(Bits##bits* address, Bits##bits value, int) {               \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                            \
  Bits##bits __tsan_atomic##bits##_exchange(Bits##bits* address, Bits##bits value, int) {      \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                              \
  }                                                                                            \
  Bits##bits __tsan_atomic##bits##_fetch_add(Bits##bits* address, Bits##bits value, int) {     \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                               \
  }                                                                                            \
  Bits##bits __tsan_atomic##bits##_fetch_or(Bits##bits* address, Bits##bits value, int) {      \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);                                \
  }                                                                                            \
  int __tsan_atomic##bits##_compare_exchange_strong(Bits##bits* address, Bits##bits* expected, \
                                                    Bits##bits value, int, int) {              \
    emulated::races::note_atomic(address, bits / 8, IMCL_HERE);                                \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST,      \
                                       __ATOMIC_SEQ_CST);                                      \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
IMCL_ACCESS(1)
IMCL_ACCESS(2)
IMCL_ACCESS(4)
IMCL_ACCESS(8)
IMCL_ACCESS(16)
void __tsan_read_range(void* address, std::size_t bytes) {
  emulated::races::note(address, bytes, false, false, IMCL_HERE);
}
void __tsan_write_range(void* address, std::size_t bytes) {
  emulated::races::note(address, bytes, true, false, IMCL_HERE);
}
void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {  // clang's
  emulated::races::note(from, bytes, false, false, IMCL_HERE);
  emulated::races::note(to, bytes, true, false, IMCL_HERE);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, std::size_t bytes) {
  emulated::races::note(to, bytes, true, false, IMCL_HERE);
  return std::memset(to, value, bytes);
}
IMCL_ATOMIC(8)
IMCL_ATOMIC(32)
IMCL_ATOMIC(64)
}
