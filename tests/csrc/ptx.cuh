// csrc/ptx.cuh for one CPU thread: every CUDA thread is a fiber, which goes on to the next where it has to wait for others.
// Now and then a block or a cluster sleeps, so that others get ahead of it.
//
// Copies to shared memory land when they are waited for, bulk copies at once. What is not seen here: the order in which
// other multiprocessors see memory, and times. x86-64 alone.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/numeric_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cute/util/type_traits.hpp>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace emulated {

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  struct {
    void const* pointer;
    uint32_t a[4], b[2];
  } given[2][32];
};

struct Block {
  Barrier barrier, halves;
  Barrier* cluster_barrier;
  char* shared;
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  void const* from;
};

struct Thread {
  struct {
    int x;
  } thread, block;
  Block* of;
  Warp* warp;
  int lane;
  int exchanges = 0, met = 0;
  std::vector<Copy> copies;
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline Thread* self;
inline std::vector<Block> blocks;
inline struct {
  int x;
} grid;
inline int cluster;  // blocks of one
inline void* scheduler;
inline bool progress;
inline std::function<void()> body;

asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulated_switch(void** from, void* to);

inline void yield() { emulated_switch(&self->stack_pointer, scheduler); }

template <class Condition>
void wait_until(Condition met) {
  while (!met()) yield();
  progress = true;
}

inline void arrive_at(Barrier& barrier, int count) {
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline void wait_at(Barrier& barrier, int count) {
  int generation = barrier.generation;
  arrive_at(barrier, count);
  wait_until([&] { return barrier.generation != generation; });
}

// What all lanes of the warp give; each may be one exchange ahead of another.
template <class Give>
auto& exchange(Give give) {
  auto& given = self->warp->given[self->exchanges++ % 2];
  give(given[self->lane]);
  wait_at(self->warp->barrier, 32);
  return given;
}

inline void start() {
  body();
  if (!self->copies.empty()) std::abort();  // nobody waited for them
  self->done = true;
  yield();
}

// Runs ``what`` as a grid of ``count`` blocks in clusters, each with ``bytes`` of shared memory.
inline void run(int count, int threads, int blocks_of_cluster, size_t bytes, std::function<void()> what) {
  constexpr size_t kStack = 1 << 15;
  body = what;
  grid.x = count, cluster = blocks_of_cluster;
  blocks = std::vector<Block>(count);
  std::vector<Barrier> clusters(count / cluster);
  std::vector<char*> memory(count);
  std::vector<Thread> all(size_t(count) * threads);
  for (int b = 0; b < count; ++b) {
    Block& block = blocks[b];
    block.cluster_barrier = &clusters[b / cluster];
    block.shared = memory[b] = static_cast<char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128));
    std::memset(block.shared, 0x7f, bytes);  // numbers that show where they are read
    block.warps = std::vector<Warp>(threads / 32);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = all[size_t(b) * threads + t];
      thread.thread.x = t, thread.block.x = b, thread.of = &block;
      thread.warp = &block.warps[t / 32], thread.lane = t % 32;
      thread.stack.reset(new char[kStack]);
      auto top = reinterpret_cast<uintptr_t>(thread.stack.get() + kStack) / 16 * 16 - 8;
      auto* frame = reinterpret_cast<void**>(top);
      *frame = nullptr;  // where start() would return to
      *--frame = reinterpret_cast<void*>(&start);
      thread.stack_pointer = frame - 6;
      std::memset(thread.stack_pointer, 0, 6 * sizeof(void*));
    }
  }
  static std::minstd_rand random;
  std::vector<int> asleep(count);  // for so many turns
  int idle = 0;
  for (bool left = true; left;) {
    left = false;
    bool moved = false;
    if (random() % 8 == 0) {
      int size = random() % 2 ? 1 : cluster, first = random() % count / size * size;
      std::fill_n(&asleep[first], size, random() % 256);
    }
    for (int b = 0; b < count; ++b) {
      if (std::all_of(&all[b * threads], &all[b * threads] + threads, [](Thread const& x) { return x.done; })) continue;
      left = true;
      if (asleep[b] > 0) {
        --asleep[b];
        continue;
      }
      for (int first = b * threads; first < (b + 1) * threads; first += 32) {
        do {
          progress = false;
          for (int i = first; i < first + 32; ++i) {
            if (all[i].done) continue;
            self = &all[i];
            emulated_switch(&scheduler, self->stack_pointer);
            progress |= all[i].done;
          }
          moved |= progress;
        } while (progress);
      }
    }
    idle = moved ? 0 : idle + 1;
    if (idle == 1000) std::abort();  // all wait for each other
  }
  for (char* p : memory) std::free(p);
}

}  // namespace emulated

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block)
#define gridDim (emulated::grid)

using std::max;
using std::min;

inline void __syncthreads() { emulated::wait_at(emulated::self->of->barrier, int(emulated::self->of->warps.size()) * 32); }
inline void __syncwarp() {
  emulated::exchange([](auto&) {});
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int bits) {
  static_assert(sizeof(T) == 4);
  auto& given = emulated::exchange([&](auto& mine) { std::memcpy(mine.a, &x, 4); });
  std::memcpy(&x, given[emulated::self->lane ^ bits].a, 4);
  return x;
}
template <class T>
T __ldg(T const* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

namespace qformer_fast {

inline void rest(uint32_t) { emulated::yield(); }
inline int same_in_warp(int x) { return x; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }

template <int kThreads>
void arrive_at_block() {
  emulated::arrive_at(emulated::self->of->halves, kThreads);
}
template <int kThreads>
void wait_for_block() {
  emulated::wait_at(emulated::self->of->halves, kThreads);
}

inline void copy_async(void* to, void const* from) { emulated::self->copies.push_back({to, from}); }
inline void wait_for_copies() {
  for (auto copy : emulated::self->copies) std::memcpy(copy.to, copy.from, 16);
  emulated::self->copies.clear();
}

// A barrier: the bytes that are still to come, of how many have still to arrive, and whether an odd number of turns ended.
struct ByteBarrier {
  int64_t bytes : 32, count : 12, missing : 12, odd_turn : 8;
};
inline void change(uint64_t* barrier, int bytes, int arrivals) {
  auto& found = reinterpret_cast<ByteBarrier&>(*barrier);
  found.bytes += bytes, found.missing -= arrivals;
  if (found.missing < 0) std::abort();
  if (found.missing == 0 && found.bytes == 0) found.missing = found.count, found.odd_turn ^= 1;
  emulated::progress = true;
}
inline void start_barrier(uint64_t* barrier, int count) {
  reinterpret_cast<ByteBarrier&>(*barrier) = {0, count, count, 0};
}
inline void publish_barriers() {}
inline void arrive(uint64_t* barrier) { change(barrier, 0, 1); }
inline void expect_bytes(uint64_t* barrier, int bytes) { change(barrier, bytes, 1); }
inline void wait_for_barrier(uint64_t* barrier, int parity) {
  emulated::wait_until([&] { return reinterpret_cast<ByteBarrier&>(*barrier).odd_turn != parity; });
}
struct Boxes {
  char const* rows;
  int row_bytes;
};
inline void prefetch(Boxes const&) {}
inline void copy_box(void* to, Boxes const& boxes, int row, int bytes, uint64_t* barrier) {
  expect_bytes(barrier, bytes);
  std::memcpy(to, boxes.rows + int64_t(row) * boxes.row_bytes, bytes);
  change(barrier, -bytes, 0);
}

inline void arrive_at_cluster() {
  emulated::Barrier& barrier = *emulated::self->of->cluster_barrier;
  emulated::self->met = barrier.generation;
  emulated::arrive_at(barrier, int(emulated::self->of->warps.size()) * 32 * emulated::cluster);
}
inline void arrive_after_reading() { arrive_at_cluster(); }
inline void wait_for_cluster() {
  emulated::wait_until([] { return emulated::self->of->cluster_barrier->generation != emulated::self->met; });
}
using Way = ptrdiff_t;
inline Way way_to_rank(void const*, uint32_t rank) {
  auto* block = emulated::self->of;
  return emulated::blocks[emulated::self->block.x / emulated::cluster * emulated::cluster + rank].shared - block->shared;
}
template <class T>
void send(T* mine, uint64_t* barrier, Way way, T x) {
  auto there = [&](void* here) { return static_cast<char*>(here) + way; };
  if (reinterpret_cast<uintptr_t>(mine) % sizeof(T) != 0) std::abort();
  *reinterpret_cast<T*>(there(mine)) = x;
  change(reinterpret_cast<uint64_t*>(there(barrier)), -int(sizeof(T)), 0);
}
inline void send_or_store(float4* mine, uint64_t* barrier, Way way, float4 x) {
  way == 0 ? void(*mine = x) : send(mine, barrier, way, x);
}
inline uint32_t load_word(void const* from) { return *static_cast<uint32_t const*>(from); }
// Whoever finds nothing asks again after the others' turn.
inline uint4 load_words(uint32_t const* from) {
  emulated::yield();
  return {from[0], from[1], from[2], from[3]};
}
inline void store_words(uint32_t* to, uint2 x) {
  emulated::progress = true;
  to[0] = x.x, to[1] = x.y;
}

inline void ldmatrix(uint32_t (&a)[4], void const* p) {
  auto& given = emulated::exchange([&](auto& mine) { mine.pointer = p; });
  for (int i = 0; i < 4; ++i)
    std::memcpy(&a[i], static_cast<char const*>(given[i * 8 + emulated::self->lane / 4].pointer) +
                           emulated::self->lane % 4 * 4, 4);
}
inline void ldmatrix_transposed(uint32_t (&a)[4], void const* p) {
  auto& given = emulated::exchange([&](auto& mine) { mine.pointer = p; });
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      std::memcpy(reinterpret_cast<char*>(&a[i]) + half * 2,
                  static_cast<char const*>(given[i * 8 + emulated::self->lane % 4 * 2 + half].pointer) +
                      emulated::self->lane / 4 * 2, 2);
}

template <class Element>
void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  auto& given = emulated::exchange([&](auto& mine) {
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0, mine.b[1] = b1;
  });
  auto of_pair = [](uint32_t pair, int i) {
    Element both[2];
    std::memcpy(both, &pair, 4);
    return float(both[i]);
  };
  int lane = emulated::self->lane;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      c[i] += of_pair(given[lane / 4 * 4 + k % 8 / 2].a[k / 8 * 2 + i / 2], k % 2) *
              of_pair(given[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2].b[k / 8], k % 2);
}

}  // namespace qformer_fast
