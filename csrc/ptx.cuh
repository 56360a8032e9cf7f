// Instructions that CUDA C++ has no functions for.
#pragma once

#include <cuda.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/util/type_traits.hpp>

namespace qformer_fast {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(void const* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Lets cycles pass.
__device__ __forceinline__ void rest(uint32_t cycles) {
  uint32_t start, now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(start)::"memory");
  do asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  while (now - start < cycles);
}

// What all lanes of the warp have, known to the compiler.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- copies to shared memory ----

__device__ __forceinline__ void copy_async(void* to, void const* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

// Until none of the thread's is on its way.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- the block ----

// The two halves of a barrier of all the block's ``kThreads`` threads: warps that arrive go on, those that wait do not.
template <int kThreads>
__device__ __forceinline__ void arrive_at_block() {
  __syncwarp();
  asm volatile("bar.arrive 1, %0;" ::"n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void wait_for_block() {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// ---- barriers that count bytes ----

// A barrier of the block's: a turn of it ends when ``count`` have arrived and the bytes that one of them expects.
__device__ __forceinline__ void start_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and says how many bytes come.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the turn of that parity has ended; the first is of parity 0.
__device__ __forceinline__ void wait_for_barrier(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// A matrix, of which as many rows are copied at once as its boxes have.
using Boxes = CUtensorMap;

__device__ __forceinline__ void prefetch(Boxes const& boxes) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&boxes) : "memory");
}

// The box that begins at ``row``, of ``bytes`` that nobody reads again soon. compute-sanitizer's racecheck follows it, and
// not a copy without a tensor map.
__device__ __forceinline__ void copy_box(void* to, Boxes const& boxes, int row, int bytes, uint64_t* barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  expect_bytes(barrier, bytes);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&boxes), "r"(0), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// ---- other blocks ----

__device__ __forceinline__ void arrive_at_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// To say that what was sent here has been read; nothing stored before is to be seen by the others.
__device__ __forceinline__ void arrive_after_reading() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What added to an address of the block's own leads to where block ``rank`` of the cluster has the same.
using Way = uint32_t;

__device__ __forceinline__ Way way_to_rank(void const* mine, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  return address - shared_address(mine);
}

// To where that block has what lies at ``mine`` here; its barrier counts the bytes.
__device__ __forceinline__ void send(uint4* mine, uint64_t* barrier, Way way, uint4 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          shared_address(mine) + way),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(shared_address(barrier) + way)
      : "memory");
}

__device__ __forceinline__ void send(float4* mine, uint64_t* barrier, Way way, float4 x) {
  send(reinterpret_cast<uint4*>(mine), barrier, way,
       {__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)});
}

// Or stores it at once where that is the block itself.
__device__ __forceinline__ void send_or_store(float4* mine, uint64_t* barrier, Way way, float4 x) {
  asm volatile(
      "{\n.reg .pred here;\nsetp.eq.u32 here, %7, 0;\n@here st.shared.v4.b32 [%6], {%1, %2, %3, %4};\n"
      "@!here st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n}" ::"r"(
          shared_address(mine) + way),
      "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)), "r"(__float_as_uint(x.w)),
      "r"(shared_address(barrier) + way), "r"(shared_address(mine)), "r"(way)
      : "memory");
}

__device__ __forceinline__ void send(float2* mine, uint64_t* barrier, Way way, float2 x) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   shared_address(mine) + way),
               "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(shared_address(barrier) + way)
               : "memory");
}

// Words that others write and read meanwhile.
__device__ __forceinline__ uint32_t load_word(void const* from) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_words(uint32_t const* from) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_words(uint32_t* to, uint2 x) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

// ---- fragments ----

__device__ __forceinline__ void ldmatrix(uint32_t (&a)[4], void const* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(p)));
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&a)[4], void const* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(p)));
}

// c += a b, m16n8k16.
template <class Element>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (cute::is_same_v<Element, cutlass::bfloat16_t>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace qformer_fast
