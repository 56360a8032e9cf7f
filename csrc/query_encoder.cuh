// The Q-Former's layers over queries alone, in one launch of clusters of two blocks, one block a multiprocessor.
//
// A product's columns are shared by the clusters, eight to a tile, and its sum over K by the two blocks of a cluster, which
// add their halves through distributed shared memory. So every block reads its own weights, once, in an order known
// before: they lie in memory as it wants them, in slots of 8 columns and 384 of K, and come through a ring of slots in
// shared memory, filled by bulk copies as soon as a slot is free, whatever the block waits for. Between two products
// stands a barrier of the whole grid. LayerNorm is applied by those who read its rows: who writes a tile's columns of a
// row also writes their mean and squared deviations, which readers combine.
#pragma once

#include "gelu.cuh"
#include "ptx.cuh"
#include "query_encoder.h"

namespace qformer_fast {

constexpr int kHidden = 768, kIntermediate = 3072, kQueries = 32;
constexpr int kCluster = 2;
constexpr int kWarps = 12, kThreads = 32 * kWarps;
constexpr int kTile = 8;                        // columns of a slot
constexpr int kSlice = kHidden / kCluster;      // K of a slot
constexpr int kSteps = kSlice / 16;             // of an mma
constexpr int kSlotBytes = kTile * kSlice * 2;
constexpr int kTiles = kHidden / kTile;         // of the hidden size
constexpr int kStride = kSlice + 8;             // of staged rows: eight of them in different banks
constexpr int kMaxSlots = 24;
constexpr int kChunk = 160;                     // tokens staged at once
constexpr int kReaders = 6;                     // warps that share an image's tokens

// Tiles that a cluster may have: of products to 2304 and 3072 columns, and of those to 768.
constexpr int kMostWide = 9, kMostNarrow = 3;
constexpr int kLeastClusters = (4 * kTiles + kMostWide - 1) / kMostWide;

// Of a slice's rows; how many slices of the activation lie in shared memory at once.
constexpr int stage_bytes(int images) { return images * kQueries * kStride * 2; }
constexpr int slices_at_once(int images) { return 4 / images; }
constexpr int side_bytes(int images) {
  return images == 4 ? stage_bytes(2) : (slices_at_once(images) - 1) * stage_bytes(images);
}

// How the warps share a product: of a slice's K, of tiles, of images.
template <int kImages, bool kWide>
struct Split {
  static constexpr int kOfTiles = kWide ? 3 : kImages == 4 ? 1 : 2;
  static constexpr int kOfK = kWarps / kOfTiles / kImages;
  static constexpr int kOwnSteps = kSteps / kOfK;
  static constexpr int kMost = kWide ? kMostWide : kMostNarrow;
  static constexpr int kOwnTiles = (kMost + kOfTiles - 1) / kOfTiles;
  // four lanes finish a row of a tile; turns until all rows of a block are done
  static constexpr int kAtOnce = kThreads / 4;
  static constexpr int kTurns = (kImages * kQueries / kCluster * kMost + kAtOnce - 1) / kAtOnce;
  static constexpr int kStrideOfParts = kMost * kTile;  // 8 or 24 modulo 32: four rows in different banks
  static_assert(kSteps % kOfK == 0 && kStrideOfParts % 16 == 8);
  static_assert(kOfK * kImages * kQueries * kStrideOfParts * 4 <= side_bytes(kImages));
};

// ---- pairs and quadruples of numbers ----

template <class Element>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  Element pair[2] = {Element(a), Element(b)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  Element pair[2];
  memcpy(pair, &bits, 4);
  return {float(pair[0]), float(pair[1])};
}

__device__ __forceinline__ void add(float4& sum, float4 const& x, float weight = 1.f) {
  sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

// Over lanes whose numbers differ in the bits from ``first`` to below ``end``.
template <int kFirst, int kEnd>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int bit = kFirst; bit < kEnd; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

template <int kFirst, int kEnd>
__device__ __forceinline__ float highest_of_lanes(float x) {
#pragma unroll
  for (int bit = kFirst; bit < kEnd; bit *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
  return x;
}

// The sum of two neighbours' x, of which the even lane takes the first half.
__device__ __forceinline__ float2 half_of_sum(float4 x, int lane) {
  x = {sum_of_lanes<1, 2>(x.x), sum_of_lanes<1, 2>(x.y), sum_of_lanes<1, 2>(x.z), sum_of_lanes<1, 2>(x.w)};
  return lane % 2 ? make_float2(x.z, x.w) : make_float2(x.x, x.y);
}

// ---- memory ----

// What blocks hand to each other, in global memory; rows are of all images, filled up to whole chunks.
template <class Element>
struct Workspace {
  unsigned* barrier;
  float2* statistics[3];  // (rows, 96): mean and squared deviations of eight columns
  Element* sums[3];       // (rows, 768) before LayerNorm: after self-attention, cross-attention, feed-forward
  Element* qkv;           // (rows, 3 * 768)
  Element* queries;       // (rows, 768)
  Element* context;       // (rows, 768)
  Element* activation;    // (rows, 3072)
};

constexpr int64_t kRowBytes = 3 * kTiles * 8 + 2 * (3 * kHidden + 3 * kHidden + 2 * kHidden + kIntermediate);
constexpr int kBarrierBytes = 256;

__host__ __device__ constexpr int images_of_chunk(int images) { return images < 3 ? images : 4; }
__host__ __device__ constexpr int64_t padded_rows(int images) {
  int chunk = images_of_chunk(images);
  return int64_t((images + chunk - 1) / chunk) * chunk * kQueries;
}

template <class Element>
__device__ Workspace<Element> carve(void* memory, int64_t rows) {
  char* p = static_cast<char*>(memory);
  auto take = [&](int64_t bytes) {
    char* taken = p;
    p += bytes;
    return taken;
  };
  Workspace<Element> w;
  w.barrier = reinterpret_cast<unsigned*>(take(kBarrierBytes));
#pragma unroll
  for (int i = 0; i < 3; ++i) w.statistics[i] = reinterpret_cast<float2*>(take(rows * kTiles * 8));
#pragma unroll
  for (int i = 0; i < 3; ++i) w.sums[i] = reinterpret_cast<Element*>(take(rows * kHidden * 2));
  w.qkv = reinterpret_cast<Element*>(take(rows * 3 * kHidden * 2));
  w.queries = reinterpret_cast<Element*>(take(rows * kHidden * 2));
  w.context = reinterpret_cast<Element*>(take(rows * kHidden * 2));
  w.activation = reinterpret_cast<Element*>(take(rows * kIntermediate * 2));
  return w;
}

// A block's shared memory: ``stage`` holds a product's rows, ``side`` next to it more of them and last the parts of a
// product for the other block; attention takes both together. The ring of slots follows.
template <int kImages>
struct alignas(128) Shared {
  char stage[stage_bytes(kImages)];
  char side[side_bytes(kImages)];
  float mean[kImages * kQueries], rstd[kImages * kQueries];
  uint64_t full[kMaxSlots];
  alignas(128) char ring[];

  static_assert(stage_bytes(kImages) % 128 == 0 && side_bytes(kImages) % 128 == 0);
  static_assert((kQueries + 2 * kChunk) * (64 + 8) * 2 <= stage_bytes(kImages) + side_bytes(kImages));
  static_assert(kReaders * (kQueries * 64 + 2 * kQueries) * 4 <= stage_bytes(kImages) + side_bytes(kImages));
};

// The rows that a product reads: LayerNorm of sums, or as they are.
template <class Element>
struct Rows {
  Element const* values;
  float2 const* statistics;  // null: no LayerNorm
  float const *weight, *bias;
  bool shared;               // one image's serve all
};

// ---- the encoder ----

template <class Element, int kImages, int kHeaddim>
struct Encoder {
  static constexpr int kRows = kImages * kQueries;  // of a chunk
  static constexpr int kOwn = kRows / kCluster;     // rows of it that a block finishes
  static constexpr int kHeads = kHidden / kHeaddim;
  using RowsOf = Rows<Element>;

  QueryEncoderArguments const& p;
  Shared<kImages>& shared;
  Workspace<Element> memory;
  int thread, warp, lane, rank, cluster, clusters, chunks;
  int slot = 0, parity = 0;              // the next slot to read
  int issued = 0, issue_at = 0, of_block;  // thread 0's: slots asked for, and of the block in all
  char const* source;
  float const* vectors;

  __device__ Encoder(QueryEncoderArguments const& arguments, Shared<kImages>& shared_)
      : p(arguments), shared(shared_), vectors(arguments.vectors) {
    thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    rank = blockIdx.x % kCluster, cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    chunks = (p.images + kImages - 1) / kImages;
    memory = carve<Element>(p.workspace, padded_rows(p.images));
    int first = p.first_slots[blockIdx.x];
    of_block = p.first_slots[blockIdx.x + 1] - first;
    source = static_cast<char const*>(p.weights) + int64_t(first) * kSlotBytes;
  }

  __device__ void run() {
    if (thread == 0) {
      for (int i = 0; i < p.ring; ++i) start_barrier(&shared.full[i]);
      publish_barriers();
      issue(p.ring);
    }
    for (int i = (blockIdx.x * kThreads + thread) * 32; i < p.numbers; i += gridDim.x * kThreads * 32)
      prefetch_to_l2(p.vectors + i);
    __syncthreads();
    int cross = 0;
    RowsOf rows{static_cast<Element const*>(p.rows), nullptr, nullptr, nullptr, true};
    for (int layer = 0; layer < p.layers; ++layer) {
      if (layer > 0) {
        linear<false>(rows, 3 * kTiles, memory.qkv);
        if constexpr (kImages == 1) {
          linear_and_residual<1>(rows, 0, [&](int) { stage_qkv(); }, [&] { attend_staged(); });
        } else {
          self_attention();
          linear_and_residual<1>(rows, 0, [&](int chunk) { stage_context(chunk); }, [&] { wait_for_copies(); });
        }
        rows = normalized(0);
      }
      if (p.cross_layers >> layer & 1) {
        if (layer > 0) narrow_linear(rows, memory.queries);
        cross_attention(layer > 0 ? memory.queries : static_cast<Element const*>(p.queries), layer == 0, cross++);
        linear_and_residual<1>(rows, 1, [&](int chunk) { stage_context(chunk); }, [&] { wait_for_copies(); });
        rows = normalized(1);
      }
      linear<true>(rows, 4 * kTiles, memory.activation);
      linear_and_residual<4>(rows, 2, [&](int chunk) { stage_activation(chunk, 0); }, [] {});
      rows = normalized(2);
    }
    write(rows);
  }

  // The next ``count`` numbers of biases and LayerNorms.
  __device__ float const* take(int count) {
    float const* taken = vectors;
    vectors += count;
    return taken;
  }

  __device__ RowsOf normalized(int which) {
    float const* weight = take(kHidden);
    return {memory.sums[which], memory.statistics[which], weight, take(kHidden), false};
  }

  // ---- weights ----

  // Thread 0 asks for the next slots, whose places nobody reads any more.
  __device__ void issue(int count) {
    for (; count > 0 && issued < of_block; --count, ++issued) {
      copy_bulk(shared.ring + issue_at * kSlotBytes, source + int64_t(issued) * kSlotBytes, kSlotBytes,
                &shared.full[issue_at]);
      if (++issue_at == p.ring) issue_at = 0;
    }
  }

  // The weights of this phase's j-th slot.
  __device__ uint2 const* slot_of(int j) {
    int at = slot + j, phase = parity;
    if (at >= p.ring) at -= p.ring, phase ^= 1;
    wait_for_bulk(&shared.full[at], phase);
    return reinterpret_cast<uint2 const*>(shared.ring + at * kSlotBytes);
  }

  // Ends a phase that read ``used`` slots: until every block has.
  __device__ void grid_barrier(int used) {
    __syncthreads();
    slot += used;
    if (slot >= p.ring) slot -= p.ring, parity ^= 1;
    if (thread == 0) {
      // block 0 fills up what the others add, so that the highest bit turns over
      unsigned before = add_release(memory.barrier, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
      issue(used);
      while (((load_acquire(memory.barrier) ^ before) & 0x80000000u) == 0) continue;
    }
    __syncthreads();
  }

  // ---- LayerNorm ----

  // Means and 1 / deviations of kCount rows, kWarps apart; a warp's work.
  template <int kCount>
  __device__ void statistics_of(float2 (&found)[kCount], RowsOf const& rows, int row, int end) {
    constexpr int kParts = kTiles / 32;
    float2 parts[kCount][kParts];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        parts[i][j] = __ldcg(rows.statistics + int64_t(min(row + i * kWarps, end - 1)) * kTiles + j * 32 + lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float mean = 0.f, squares = 0.f;
#pragma unroll
      for (int j = 0; j < kParts; ++j) mean += parts[i][j].x;
      mean = sum_of_lanes<1, 32>(mean) * (1.f / kTiles);
#pragma unroll
      for (int j = 0; j < kParts; ++j) squares += parts[i][j].y + kTile * (parts[i][j].x - mean) * (parts[i][j].x - mean);
      found[i] = make_float2(mean, rsqrtf(sum_of_lanes<1, 32>(squares) * (1.f / kHidden) + p.eps));
    }
  }

  // Of ``count`` rows from ``first`` on, for all warps.
  __device__ void share_statistics(RowsOf const& rows, int first, int count) {
    constexpr int kAtOnce = 3;
    for (int i = warp; i < count; i += kAtOnce * kWarps) {
      float2 found[kAtOnce];
      statistics_of(found, rows, first + i, first + count);
      if (lane == 0)
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (i + j * kWarps < count) shared.mean[i + j * kWarps] = found[j].x, shared.rstd[i + j * kWarps] = found[j].y;
    }
  }

  // The block's half of a chunk's rows, staged, with LayerNorm.
  __device__ void stage_normalized(RowsOf const& rows, int chunk) {
    constexpr int kPieces = kSlice / 8, kRowsAtOnce = kThreads / kPieces, kTimes = kQueries / kRowsAtOnce;
    int column = thread % kPieces * 8, first = thread / kPieces;
    Element* to = reinterpret_cast<Element*>(shared.stage) + column;
    column += rank * kSlice;
    int start = rows.shared ? 0 : chunk * kRows;
    float weight[8], bias[8];
    if (rows.statistics != nullptr) {
      for (int i = 0; i < 2; ++i) {
        reinterpret_cast<float4*>(weight)[i] = __ldg(reinterpret_cast<float4 const*>(rows.weight + column) + i);
        reinterpret_cast<float4*>(bias)[i] = __ldg(reinterpret_cast<float4 const*>(rows.bias + column) + i);
      }
    }
    for (int image = 0; image < kImages; ++image) {
      uint4 pieces[kTimes];
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        int row = first + i * kRowsAtOnce + (rows.shared ? 0 : image * kQueries);
        pieces[i] = __ldcg(reinterpret_cast<uint4 const*>(rows.values + int64_t(start + row) * kHidden + column));
      }
      if (image == 0 && rows.statistics != nullptr) {
        share_statistics(rows, start, kRows);
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kTimes; ++i) {
        int row = first + i * kRowsAtOnce + image * kQueries;
        if (rows.statistics != nullptr) {
          float mean = shared.mean[row], rstd = shared.rstd[row];
          uint32_t* pairs = reinterpret_cast<uint32_t*>(&pieces[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float2 x = unpack<Element>(pairs[j]);
            pairs[j] = pack<Element>((x.x - mean) * rstd * weight[2 * j] + bias[2 * j],
                                     (x.y - mean) * rstd * weight[2 * j + 1] + bias[2 * j + 1]);
          }
        }
        *reinterpret_cast<uint4*>(to + row * kStride) = pieces[i];
      }
    }
  }

  // ---- products ----

  // The first of the cluster's tiles, of ``count``.
  __device__ int first_tile(int count) { return cluster * count / clusters; }
  __device__ int own_tiles(int count) { return (cluster + 1) * count / clusters - first_tile(count); }

  // ``count`` rows of ``columns`` on their way to shared memory.
  __device__ void stage_rows(Element const* rows, int width, int count, int columns, int stride, Element* to) {
    int pieces = columns / 8;
    for (int i = thread; i < count * pieces; i += kThreads)
      copy_async(to + i / pieces * stride + i % pieces * 8, rows + int64_t(i / pieces) * width + i % pieces * 8);
  }

  // The block's half of a chunk's rows, or the ``slice``-th 384 of it, on their way to ``to`` as they are.
  __device__ void stage_plain(Element const* rows, int width, int slice, int chunk, char* to) {
    stage_rows(rows + int64_t(chunk) * kRows * width + rank * (width / kCluster) + slice * kSlice, width, kRows, kSlice,
               kStride, reinterpret_cast<Element*>(to));
    commit_copies();
  }

  // acc += the warp's rows of what is staged, its tiles and its part of K.
  template <bool kWide>
  __device__ void multiply(float (&acc)[Split<kImages, kWide>::kOwnTiles][2][4], char const* staged, int tiles,
                           int slices, int slice) {
    using S = Split<kImages, kWide>;
    int tile = warp % S::kOfTiles, step = warp / S::kOfTiles % S::kOfK * S::kOwnSteps;
    int row = warp / S::kOfTiles / S::kOfK * kQueries;
    Element const* rows = reinterpret_cast<Element const*>(staged) + (row + lane % 16) * kStride + step * 16 + lane / 16 * 8;
    uint2 const* slots[S::kOwnTiles];
#pragma unroll
    for (int j = 0; j < S::kOwnTiles; ++j)
      if (tile + j * S::kOfTiles < tiles) slots[j] = slot_of((tile + j * S::kOfTiles) * slices + slice) + step * 32 + lane;
#pragma unroll
    for (int i = 0; i < S::kOwnSteps; ++i) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) ldmatrix(a[m], rows + m * 16 * kStride + i * 16);
#pragma unroll
      for (int j = 0; j < S::kOwnTiles; ++j) {
        if (tile + j * S::kOfTiles < tiles) {
          uint2 b = slots[j][i * 32];
#pragma unroll
          for (int m = 0; m < 2; ++m) mma<Element>(acc[j][m], a[m], b.x, b.y);
        }
      }
    }
  }

  // The warps' parts to shared memory, where the cluster sees them.
  template <bool kWide>
  __device__ void share(float (&acc)[Split<kImages, kWide>::kOwnTiles][2][4], int tiles) {
    using S = Split<kImages, kWide>;
    int tile = warp % S::kOfTiles, row = warp / S::kOfTiles / S::kOfK * kQueries + lane / 4;
    float* part = reinterpret_cast<float*>(shared.side) +
                  (warp / S::kOfTiles % S::kOfK * kRows + row) * S::kStrideOfParts + tile * kTile + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < S::kOwnTiles; ++j)
      if (tile + j * S::kOfTiles < tiles)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<float2*>(part + i * 8 * S::kStrideOfParts + j * S::kOfTiles * kTile) =
              make_float2(acc[j][i / 2][i % 2 * 2], acc[j][i / 2][i % 2 * 2 + 1]);
    cluster_barrier();
  }

  // The row among the block's, and the first of the two columns among the cluster's, that the lane finishes in a turn.
  struct Place {
    int row, column;
    bool exists;
  };
  __device__ Place place_of(int turn, int tiles) {
    int position = turn * (kThreads / 4) + thread / 4;
    bool exists = position < kOwn * tiles;
    return {exists ? position / tiles : 0, (exists ? position % tiles * kTile : 0) + lane % 4 * 2, exists};
  }

  // finish(turn, place, two values) with all parts added.
  template <bool kWide, class Finish>
  __device__ void gather(int tiles, Finish finish) {
    using S = Split<kImages, kWide>;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      if (turn * S::kAtOnce >= kOwn * tiles) break;
      Place place = place_of(turn, tiles);
      float const* mine = reinterpret_cast<float const*>(shared.side) +
                          (rank * kOwn + place.row) * S::kStrideOfParts + place.column / 4 * 4;
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int part = 0; part < S::kOfK; ++part)
        add(sum, load_of_rank(reinterpret_cast<float4 const*>(mine + part * kRows * S::kStrideOfParts), lane % 2));
      finish(turn, place, half_of_sum(sum, lane));
    }
  }

  __device__ static float2 load_pair(float const* from) { return __ldg(reinterpret_cast<float2 const*>(from)); }

  // to (rows, tiles * 8) = rows weight^T + bias, and with kGelu GELU of it.
  template <bool kGelu, bool kWide = true>
  __device__ void linear(RowsOf const& rows, int tiles, Element* to) {
    using S = Split<kImages, kWide>;
    int own = own_tiles(tiles), first = first_tile(tiles) * kTile;
    float const* bias = take(tiles * kTile) + first;
    float2 added[S::kTurns];
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) added[turn] = load_pair(bias + place_of(turn, own).column);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stage_normalized(rows, chunk);
      __syncthreads();
      float acc[S::kOwnTiles][2][4] = {};
      multiply<kWide>(acc, shared.stage, own, 1, 0);
      share<kWide>(acc, own);
      Element* here = to + int64_t(chunk * kRows + rank * kOwn) * tiles * kTile + first;
      gather<kWide>(own, [&](int turn, Place place, float2 x) {
        if (!place.exists) return;
        x.x += added[turn].x, x.y += added[turn].y;
        if (kGelu) x = {gelu<Element>(x.x), gelu<Element>(x.y)};
        *reinterpret_cast<uint32_t*>(here + int64_t(place.row) * tiles * kTile + place.column) = pack<Element>(x.x, x.y);
      });
      if (chunk + 1 < chunks) cluster_barrier();
    }
    grid_barrier(own);
  }

  __device__ void narrow_linear(RowsOf const& rows, Element* to) { linear<false, false>(rows, kTiles, to); }

  // sums[which] = rows weight^T + bias + residual, and their statistics. ``begin(chunk)`` has the rows copied to the stage,
  // of four slices the first ones, ``end()`` waits for one slice's.
  template <int kSlices, class Begin, class End>
  __device__ void linear_and_residual(RowsOf const& residual, int which, Begin begin, End end) {
    using S = Split<kImages, false>;
    int own = own_tiles(kTiles), tile = first_tile(kTiles);
    float const* bias = take(kHidden) + tile * kTile;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int first = chunk * kRows + rank * kOwn;
      float acc[S::kOwnTiles][2][4] = {};
      begin(chunk);
      if (residual.statistics != nullptr) share_statistics(residual, first, kOwn);
      uint32_t values[S::kTurns];
      float2 added[S::kTurns], norm_weight[S::kTurns], norm_bias[S::kTurns];
#pragma unroll
      for (int turn = 0; turn < S::kTurns; ++turn) {
        Place place = place_of(turn, own);
        int row = residual.shared ? (rank * kOwn + place.row) % kQueries : first + place.row;
        int column = tile * kTile + place.column;
        values[turn] = __ldcg(reinterpret_cast<unsigned const*>(residual.values + int64_t(row) * kHidden + column));
        added[turn] = load_pair(bias + place.column);
        if (residual.statistics != nullptr) {
          norm_weight[turn] = load_pair(residual.weight + column);
          norm_bias[turn] = load_pair(residual.bias + column);
        }
      }
      if constexpr (kSlices == 1) {
        end();
        __syncthreads();
        multiply<false>(acc, shared.stage, own, 1, 0);
      } else {
        multiply_activation(acc, own, chunk);
        __syncthreads();
      }
#pragma unroll
      for (int turn = 0; turn < S::kTurns; ++turn) {
        float2 x = unpack<Element>(values[turn]);
        if (residual.statistics != nullptr) {
          float mean = shared.mean[place_of(turn, own).row], rstd = shared.rstd[place_of(turn, own).row];
          x.x = (x.x - mean) * rstd * norm_weight[turn].x + norm_bias[turn].x;
          x.y = (x.y - mean) * rstd * norm_weight[turn].y + norm_bias[turn].y;
        }
        added[turn].x += x.x, added[turn].y += x.y;
      }
      share<false>(acc, own);
      gather<false>(own, [&](int turn, Place place, float2 x) {
        uint32_t sum = pack<Element>(x.x + added[turn].x, x.y + added[turn].y);
        x = unpack<Element>(sum);
        float mean = sum_of_lanes<1, 4>(x.x + x.y) * (1.f / kTile);
        float squares = sum_of_lanes<1, 4>((x.x - mean) * (x.x - mean) + (x.y - mean) * (x.y - mean));
        if (!place.exists) return;
        int64_t row = first + place.row;
        *reinterpret_cast<uint32_t*>(memory.sums[which] + row * kHidden + tile * kTile + place.column) = sum;
        if (lane % 4 == 0)
          memory.statistics[which][row * kTiles + tile + place.column / kTile] = make_float2(mean, squares);
      });
      if (chunk + 1 < chunks) cluster_barrier();
    }
    grid_barrier(own * kSlices);
  }

  // The activation's slices from ``first`` on, as many as fit.
  __device__ void stage_activation(int chunk, int first) {
#pragma unroll
    for (int i = 0; i < slices_at_once(kImages); ++i)
      stage_plain(memory.activation, kIntermediate, first + i, chunk, shared.stage + i * stage_bytes(kImages));
  }

  // acc += activation weight^T, of which the first slices are staged.
  __device__ void multiply_activation(float (&acc)[Split<kImages, false>::kOwnTiles][2][4], int own, int chunk) {
    constexpr int kAtOnce = slices_at_once(kImages);
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
      if (first > 0) {
        __syncthreads();
        stage_activation(chunk, first);
      }
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        multiply<false>(acc, shared.stage + i * stage_bytes(kImages), own, 4, first + i);
    }
  }

  __device__ void stage_context(int chunk) { stage_plain(memory.context, kHidden, 0, chunk, shared.stage); }

  // ---- attention ----

  // scores become exp2((scores - highest) * scale), of which the rows' sums are added to total.
  template <int kColumns>
  __device__ static void exponentiate(float (&scores)[kColumns][4], int half, float highest, float scale, float& total) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[n][half * 2 + i];
        score = exp2_approx((score - highest) * scale);
        total += score;
      }
  }

  // out += what 16 of ``weights``' columns, of tiles n and n + 1, weigh of the rows of ``values``.
  template <int kColumns>
  __device__ void weigh(float (&out)[kHeaddim / 8][4], float const (&weights)[kColumns][4], int n, Element const* values,
                        int stride) {
    uint32_t a[4] = {pack<Element>(weights[n][0], weights[n][1]), pack<Element>(weights[n][2], weights[n][3]),
                     pack<Element>(weights[n + 1][0], weights[n + 1][1]),
                     pack<Element>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
    for (int tile = 0; tile < kHeaddim / 8; tile += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, values + lane % 16 * stride + tile * 8 + lane / 16 * 8);
      mma<Element>(out[tile], a, b[0], b[1]);
      mma<Element>(out[tile + 1], a, b[2], b[3]);
    }
  }

  // scores += 16 rows of q times kColumns * 8 rows of k.
  template <int kColumns>
  __device__ void score(float (&scores)[kColumns][4], Element const* q, Element const* k, int stride) {
#pragma unroll
    for (int step = 0; step < kHeaddim / 16; ++step) {
      uint32_t a[4];
      ldmatrix(a, q + lane % 16 * stride + step * 16 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        Element const* b = k + (n * 8 + lane / 4) * stride + step * 16 + lane % 4 * 2;
        mma<Element>(scores[n], a, *reinterpret_cast<uint32_t const*>(b), *reinterpret_cast<uint32_t const*>(b + 8));
      }
    }
  }

  // Self-attention of 16 queries of a head to 32: rows of q, k and v, and of what comes out, which may lie where q does.
  __device__ void attend(Element const* q, Element const* k, Element const* v, int stride, Element* to, int to_stride) {
    float scale = rsqrtf(float(kHeaddim)) * 1.44269504f;
    float scores[4][4] = {}, total[2] = {};
    score(scores, q, k, stride);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 4; ++n) highest = fmaxf(highest, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
      exponentiate(scores, half, highest_of_lanes<1, 4>(highest), scale, total[half]);
      total[half] = sum_of_lanes<1, 4>(total[half]);
    }
    float out[kHeaddim / 8][4] = {};
#pragma unroll
    for (int n = 0; n < 4; n += 2) weigh(out, scores, n, v + n * 8 * stride, stride);
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kHeaddim / 8; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(to + (half * 8 + lane / 4) * to_stride + tile * 8 + lane % 4 * 2) =
            pack<Element>(out[tile][half * 2] / total[half], out[tile][half * 2 + 1] / total[half]);
  }

  // The block's half of one image's queries on their way to the stage, its keys and values to the side.
  __device__ void stage_qkv() {
    for (int which = 0; which < 3; ++which)
      stage_rows(memory.qkv + which * kHidden + rank * kSlice, 3 * kHidden, kQueries, kSlice, kStride,
                 reinterpret_cast<Element*>(shared.stage) + which * kQueries * kStride);
    commit_copies();
  }

  // Self-attention of the heads in the block's half, of what stage_qkv() staged, in place of the queries: every block
  // does it for its product, which takes less time than a barrier more.
  __device__ void attend_staged() {
    wait_for_copies();
    __syncthreads();
    for (int task = warp; task < kSlice / kHeaddim * 2; task += kWarps) {
      Element* q = reinterpret_cast<Element*>(shared.stage) + task % 2 * 16 * kStride + task / 2 * kHeaddim;
      Element const* k = reinterpret_cast<Element const*>(shared.stage) + kQueries * kStride + task / 2 * kHeaddim;
      attend(q, k, k + kQueries * kStride, kStride, q, kStride);
    }
  }

  // The same once, a head of an image a block; for more images than one.
  __device__ void self_attention() {
    constexpr int kWide = kHeaddim + 8;
    Element* q = reinterpret_cast<Element*>(shared.stage);
    for (int unit = blockIdx.x; unit < p.images * kHeads; unit += gridDim.x) {
      int64_t row = unit / kHeads * kQueries;
      int head = unit % kHeads * kHeaddim;
      for (int which = 0; which < 3; ++which)
        stage_rows(memory.qkv + row * 3 * kHidden + which * kHidden + head, 3 * kHidden, kQueries, kHeaddim, kWide,
                   q + which * kQueries * kWide);
      commit_copies();
      wait_for_copies();
      __syncthreads();
      if (warp < 2)
        attend(q + warp * 16 * kWide, q + kQueries * kWide, q + 2 * kQueries * kWide, kWide,
               memory.context + (row + warp * 16) * kHidden + head, kHidden);
      __syncthreads();
    }
    grid_barrier(0);
  }

  // The images' heads shared by the clusters, an image's tokens by the blocks of one and there by six pairs of warps, of
  // which each warp has 16 queries.
  __device__ void cross_attention(Element const* queries, bool shared_queries, int layer) {
    constexpr int kWide = kHeaddim + 8, kPieces = kHeaddim / 8, kPart = kQueries * kHeaddim + 2 * kQueries;
    constexpr int kOwnQueries = kQueries / kCluster;
    float scale = rsqrtf(float(kHeaddim)) * 1.44269504f;
    Element* q = reinterpret_cast<Element*>(shared.stage);
    Element* k = q + kQueries * kWide;
    Element* v = k + kChunk * kWide;
    float* parts = reinterpret_cast<float*>(shared.stage);
    int half_of_tokens = (p.tokens + 1) / kCluster;
    int begin = rank * half_of_tokens, end = min(begin + half_of_tokens, p.tokens);
    int64_t width = int64_t(cross_layers()) * 2 * kHidden;
    for (int unit = cluster; unit < p.images * kHeads; unit += clusters) {
      int image = unit / kHeads, head = unit % kHeads * kHeaddim;
      Element const* asks = queries + int64_t(shared_queries ? 0 : image * kQueries) * kHidden + head;
      Element const* keys = static_cast<Element const*>(p.keys_values) + int64_t(image) * p.tokens * width +
                            layer * 2 * kHidden + head;
      float out[kHeaddim / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
      for (int first = begin; first < end; first += kChunk) {
        int count = min(kChunk, end - first), filled = (count + 15) / 16 * 16;
        for (int i = thread; i < kQueries * kPieces && first == begin; i += kThreads)
          copy_async(q + i / kPieces * kWide + i % kPieces * 8, asks + int64_t(i / kPieces) * kHidden + i % kPieces * 8);
        for (int i = thread; i < 2 * filled * kPieces; i += kThreads) {
          int token = i / (2 * kPieces), which = i / kPieces % 2, column = i % kPieces * 8;
          Element* to = (which ? v : k) + token * kWide + column;
          if (token < count)
            copy_async(to, keys + (first + token) * width + which * kHidden + column);
          else
            *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
        }
        commit_copies();
        wait_for_copies();
        __syncthreads();
        for (int token = warp / 2 * 16; token < count; token += kReaders * 16) {
          float scores[2][4] = {};
          score(scores, q + warp % 2 * 16 * kWide, k + token * kWide, kWide);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float higher = highest[half];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& x = scores[i / 2][half * 2 + i % 2];
              if (token + i / 2 * 8 + lane % 4 * 2 + i % 2 >= count) x = -INFINITY;
              higher = fmaxf(higher, x);
            }
            higher = highest_of_lanes<1, 4>(higher);
            float shrink = exp2_approx((highest[half] - higher) * scale);
            highest[half] = higher;
            total[half] *= shrink;
#pragma unroll
            for (int tile = 0; tile < kHeaddim / 8; ++tile) out[tile][half * 2] *= shrink, out[tile][half * 2 + 1] *= shrink;
            exponentiate(scores, half, higher, scale, total[half]);
          }
          weigh(out, scores, 0, v + token * kWide, kWide);
        }
        __syncthreads();
      }
      float* part = parts + warp / 2 * kPart;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = warp % 2 * 16 + half * 8 + lane / 4;
        float sum = sum_of_lanes<1, 4>(total[half]);
#pragma unroll
        for (int tile = 0; tile < kHeaddim / 8; ++tile)
          *reinterpret_cast<float2*>(part + row * kHeaddim + tile * 8 + lane % 4 * 2) =
              make_float2(out[tile][half * 2], out[tile][half * 2 + 1]);
        if (lane % 4 == 0) part[kQueries * kHeaddim + row] = highest[half], part[kQueries * (kHeaddim + 1) + row] = sum;
      }
      cluster_barrier();
      // a lane adds what one block found of four columns, two lanes what both did
      constexpr int kPositions = kOwnQueries * kHeaddim / 4, kAtOnce = kThreads / 2;
      for (int turn = 0; turn * kAtOnce < kPositions; ++turn) {
        int position = turn * kAtOnce + thread / 2;
        bool exists = position < kPositions;
        int row = rank * kOwnQueries + (exists ? position / (kHeaddim / 4) : 0), column = position % (kHeaddim / 4) * 4;
        float const* tops = parts + kQueries * kHeaddim + row;
        float top[kReaders], higher = -INFINITY, sums = 0.f;
#pragma unroll
        for (int i = 0; i < kReaders; ++i) higher = fmaxf(higher, top[i] = load_of_rank(tops + i * kPart, lane % 2));
        higher = highest_of_lanes<1, 2>(higher);
        float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < kReaders; ++i) {
          float weight = exp2_approx((top[i] - higher) * scale);
          sums += weight * load_of_rank(tops + i * kPart + kQueries, lane % 2);
          add(sum, load_of_rank(reinterpret_cast<float4 const*>(parts + i * kPart + row * kHeaddim + column), lane % 2),
              weight);
        }
        sums = sum_of_lanes<1, 2>(sums);
        float2 found = half_of_sum(sum, lane);
        if (exists)
          *reinterpret_cast<uint32_t*>(memory.context + int64_t(image * kQueries + row) * kHidden + head + column +
                                       lane % 2 * 2) = pack<Element>(found.x / sums, found.y / sums);
      }
      cluster_barrier();
    }
    grid_barrier(0);
  }

  __device__ int cross_layers() {
    int count = 0;
    for (int layer = 0; layer < p.layers; ++layer) count += p.cross_layers >> layer & 1;
    return count;
  }

  // LayerNorm of the last rows, a row a warp.
  __device__ void write(RowsOf const& rows) {
    for (int row = blockIdx.x * kWarps + warp; row < p.images * kQueries; row += gridDim.x * kWarps) {
      float2 found[1];
      statistics_of(found, rows, row, row + 1);
      for (int column = lane * 2; column < kHidden; column += 64) {
        int64_t place = int64_t(row) * kHidden + column;
        float2 x = unpack<Element>(__ldcg(reinterpret_cast<unsigned const*>(rows.values + place)));
        float2 weight = __ldg(reinterpret_cast<float2 const*>(rows.weight + column));
        float2 bias = __ldg(reinterpret_cast<float2 const*>(rows.bias + column));
        *reinterpret_cast<uint32_t*>(static_cast<Element*>(p.out) + place) = pack<Element>(
            (x.x - found[0].x) * found[0].y * weight.x + bias.x, (x.y - found[0].x) * found[0].y * weight.y + bias.y);
      }
    }
  }
};

}  // namespace qformer_fast
