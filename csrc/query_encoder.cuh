// The Q-Former's layers over queries alone, in one launch of clusters of eight blocks, one block a multiprocessor.
//
// A product's columns are shared by the clusters, eight to a tile, and its sum over K by the blocks of a cluster, each of
// which sends what it has of a row to the block that finishes it, through distributed shared memory. So every block reads
// its own weights, once, in an order known before: they lie in memory as it wants them, in slots of 8 columns and 96 of K,
// and come through a ring in shared memory, filled by bulk copies as soon as there is room, whatever the block waits for.
//
// What a product writes and the next one reads lies in global memory as packets of eight bytes, two numbers and the
// phase that wrote them: who reads a packet until it is of the phase before needs no barrier of the grid. A phase writes
// where nobody reads in it, and its finished rows took all of what the phase before wrote, so that nobody is two behind.
//
// LayerNorm is part of the product that reads its rows: with its weights w and b, mean m and deviation s of a row x,
//   W LayerNorm(x) + c = ((W diag(w)) x - m (W w)) / s + (W b + c),
// of which W diag(w), its columns' sums W w, and W b + c are made with the slots.
#pragma once

#include "gelu.cuh"
#include "ptx.cuh"
#include "query_encoder.h"

namespace qformer_fast {

constexpr int kHidden = 768, kIntermediate = 3072, kQueries = 32;
constexpr int kMaxImages = 8;
constexpr int kCluster = 8;
constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kTile = 8;                               // columns of a slot
constexpr int kSlice = kHidden / kCluster;             // K of a slot
constexpr int kSteps = kSlice / 16;                    // of an mma
constexpr int kSlotBytes = kTile * kSlice * 2;
constexpr int kPage = 8, kPageBytes = kPage * kSlotBytes;  // slots copied at once
constexpr int kMaxPages = 12;
constexpr int kTiles = kHidden / kTile;                // of the hidden size
constexpr int kOwnQueries = kQueries / kCluster;       // of an image, that a block finishes
constexpr int kStride = kIntermediate / kCluster + 8;  // of staged rows: eight of them in different banks
constexpr int kReaders = 2;                            // warps that share an image's tokens of a block

// Heads are attended to by the first clusters, which have 64 columns each.
constexpr int kGroup = 64, kGroups = kHidden / kGroup, kGroupTiles = kGroup / kTile;
constexpr int kGroupStride = kGroup + 8;
constexpr int kLeastClusters = kGroups;

// Tiles that a cluster may have: of products to 3072 columns, and of those to 768.
constexpr int kMostWide = 4 * kTiles / kLeastClusters, kMostNarrow = kTiles / kLeastClusters;
static_assert(kMostWide <= 2 * kWarps && 2 * kMostNarrow <= kWarps && 3 * kGroupTiles <= kMostWide);
// Pages of a phase's slots, which may begin within one.
constexpr int kLeastPages = (kMostWide + kPage - 1) / kPage + 1;

// Images whose rows go through a product at once; tokens staged at once.
constexpr int images_of_chunk(int images) { return images == 1 ? 1 : 2; }
constexpr int staged_tokens(int images) { return 96 / images; }

// ---- pairs of numbers ----

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

// The words of four neighbouring lanes.
__device__ __forceinline__ uint4 of_four_lanes(uint32_t x, int lane) {
  uint32_t y = __shfl_xor_sync(0xffffffffu, x, 1);
  uint2 here = lane % 2 ? uint2{y, x} : uint2{x, y};
  uint2 there = {__shfl_xor_sync(0xffffffffu, here.x, 2), __shfl_xor_sync(0xffffffffu, here.y, 2)};
  return lane % 4 < 2 ? uint4{here.x, here.y, there.x, there.y} : uint4{there.x, there.y, here.x, here.y};
}

// ---- memory ----

// Two numbers of a row and the phase that wrote them.
using Packet = uint2;

// What blocks hand to each other, in global memory behind the last phase of the launch before; rows are of all images,
// filled up to whole chunks.
enum Handed {
  kSums,        // (rows, 768) before LayerNorm, what every second sub-layer writes
  kOtherSums,   // (rows, 768) and what the others do
  kContext,     // (rows, 768)
  kActivation,  // (rows, 3072)
};

constexpr int kHeaderBytes = 256;

constexpr int64_t workspace_bytes(int images) {
  int chunk = images_of_chunk(images);
  int64_t rows = int64_t((images + chunk - 1) / chunk) * chunk * kQueries;
  return kHeaderBytes + rows * (kActivation * kHidden + kIntermediate) / 2 * int64_t(sizeof(Packet));
}

// A block's pages: the next to ask for, how many are left, and its place in the ring.
struct Asked {
  char const* next;
  int left, place;
};

// A block's shared memory. ``parts``, ``moments`` and ``tops`` are written by the blocks of its cluster.
template <int kImages>
struct alignas(128) Shared {
  static constexpr int kOwn = kImages * kOwnQueries;                  // rows that the block finishes
  static constexpr int kTokens = staged_tokens(kImages);
  char stage[kImages * kQueries * kStride * 2];                       // a product's rows
  float parts[kCluster * kMostWide * kOwn * kTile];                   // of a product's or of attention's result
  char queries[kImages * kQueries * kGroupStride * 2];                // of a group of heads
  char keys[kImages * kTokens * kGroupStride * 2], values[kImages * kTokens * kGroupStride * 2];
  float2 moments[kCluster][kOwn];                                     // of a slice: mean and squared deviations
  float2 norms[kMaxImages / kImages][kOwn];                           // of a row: mean and 1 / deviation
  float2 tops[kCluster * kReaders][2][kOwn];                          // of a head: highest score and sum of weights
  uint64_t full[kMaxPages];
  Asked asked;
  alignas(128) char ring[];

  static_assert(kTokens >= kQueries && kTokens % 16 == 0);
};
static_assert(sizeof(Shared<2>) + kLeastPages * kPageBytes <= 232448);

// The rows that a product reads or adds: LayerNorm of what was handed on, or those of layer 0 as they are.
struct Rows {
  Handed sums;
  float const* norm;  // weight and bias; null: of layer 0
};

// ---- the encoder ----

template <class Element, int kImages, int kHeaddim>
struct Encoder {
  static constexpr int kRows = kImages * kQueries;  // of a chunk
  static constexpr int kOwn = Shared<kImages>::kOwn, kTokens = Shared<kImages>::kTokens;
  static constexpr int kHeads = kGroup / kHeaddim;  // of a group

  QueryEncoderArguments const& p;
  Shared<kImages>& shared;
  int thread, warp, lane, rank, cluster, clusters, chunks;
  bool attends;                            // to a group of heads
  unsigned phase;                          // that is written in this phase
  int page = 0, parity = 0, offset = 0;    // where the next slot to read is: place in the ring, slot of the page
  float const* vectors;

  __device__ Encoder(QueryEncoderArguments const& arguments, Shared<kImages>& shared_)
      : p(arguments), shared(shared_), vectors(arguments.vectors) {
    thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    rank = blockIdx.x % kCluster, cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    chunks = (p.images + kImages - 1) / kImages;
    attends = cluster < kGroups;
    phase = load_relaxed(static_cast<unsigned const*>(p.workspace)) + 1;
  }

  __device__ void run() {
    if (issues()) {
      for (int i = 0; i < p.ring; ++i) start_barrier(&shared.full[i]);
      publish_barriers();
      int first = p.first_slots[blockIdx.x], slots = p.first_slots[blockIdx.x + 1] - first;
      shared.asked = {static_cast<char const*>(p.weights) + int64_t(first) * kSlotBytes, (slots + kPage - 1) / kPage, 0};
      issue(p.ring);
    }
    for (int i = (blockIdx.x * kThreads + thread) * 32; i < p.numbers; i += gridDim.x * kThreads * 32)
      prefetch_to_l2(p.vectors + i);
    __syncthreads();
    arrive_after_reading();
    int looking = 0;
    Rows rows{kSums, nullptr};
    for (int layer = 0; layer < p.layers; ++layer) {
      if (layer > 0) {
        self_attention(rows);
        rows = linear_and_residual<1>(kContext, rows);
      }
      if (p.cross_layers >> layer & 1) {
        cross_attention(rows, looking++);
        rows = linear_and_residual<1>(kContext, rows);
      }
      linear_and_gelu(rows);
      rows = linear_and_residual<4>(kActivation, rows);
    }
    write(rows);
    wait_for_cluster();
    if (blockIdx.x == 0 && thread == 0) *static_cast<unsigned*>(p.workspace) = phase;
  }

  // The next ``count`` numbers of biases and LayerNorms.
  __device__ float const* take(int count) {
    float const* taken = vectors;
    vectors += count;
    return taken;
  }

  __device__ static float2 load_pair(float const* from) { return __ldg(reinterpret_cast<float2 const*>(from)); }

  // ---- weights ----

  __device__ bool issues() { return thread == kThreads - 32; }

  // Asks for the next pages, whose places nobody reads any more.
  __device__ void issue(int count) {
    Asked asked = shared.asked;
    for (; count > 0 && asked.left > 0; --count, --asked.left, asked.next += kPageBytes) {
      copy_bulk(shared.ring + asked.place * kPageBytes, asked.next, kPageBytes, &shared.full[asked.place]);
      if (++asked.place == p.ring) asked.place = 0;
    }
    shared.asked = asked;
  }

  // The weights of this phase's j-th slot.
  __device__ uint2 const* slot_of(int j) {
    j += offset;
    int at = page + j / kPage, turn = parity;
    if (at >= p.ring) at -= p.ring, turn ^= 1;
    wait_for_bulk(&shared.full[at], turn);
    return reinterpret_cast<uint2 const*>(shared.ring + at * kPageBytes + j % kPage * kSlotBytes);
  }

  // After the cluster has met: nobody reads this phase's ``used`` slots any more.
  __device__ void leave_slots(int used) {
    offset += used;
    int pages = offset / kPage;
    offset %= kPage, page += pages;
    if (page >= p.ring) page -= p.ring, parity ^= 1;
    if (issues()) issue(pages);
  }

  // ---- the cluster ----

  // Blocks of a cluster meet twice for what they send each other: all have sent (meet()), and all have read what was sent
  // (arrive_after_reading(), and wait_for_cluster() before sending again).
  __device__ void meet() {
    arrive_at_cluster();
    wait_for_cluster();
  }

  __device__ void arrive_after_reading() { arrive_at_cluster<false>(); }

  // ---- packets ----

  __device__ bool is_new(uint4 const& packets) { return packets.y == phase - 1 && packets.w == phase - 1; }

  // All kPieces of four columns that ``at(i)`` is the place of, when they are of the phase before.
  template <int kPieces, class At>
  __device__ void receive(uint4 (&found)[kPieces], At at) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) found[i] = load_packets(at(i));
    for (bool waiting = true; waiting;) {
      waiting = false;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (!is_new(found[i])) found[i] = load_packets(at(i)), waiting = true;
    }
  }

  __device__ Packet* packet_at(Handed which, int row, int column) {
    int width = which == kActivation ? kIntermediate : kHidden;
    int before = which * chunks * kRows * kHidden + row * width + column;
    return reinterpret_cast<Packet*>(static_cast<char*>(p.workspace) + kHeaderBytes) + before / 2;
  }

  __device__ void send(Handed which, int row, int column, uint32_t pair) {
    store_packet(packet_at(which, row, column), pair, phase);
  }

  // How a block's threads share a chunk's rows, eight columns a thread and turn; of 96 columns by 16 lanes a row.
  template <int kSlices>
  struct Share {
    static constexpr int kPieces = kSlices * kSlice / 8, kLanes = kSlices == 1 ? 16 : kPieces;
    static constexpr int kTurns = kRows * kLanes / kThreads, kAtOnce = kSlices == 1 ? kTurns : kTurns / kImages;
    static_assert(kTurns * kThreads == kRows * kLanes);
  };

  // The block's K of a chunk's rows to the stage, when the cluster has read all that was sent before; returns the last
  // turns' pieces.
  template <int kSlices>
  __device__ void stage_rows(Handed which, int chunk, uint4 (&pieces)[Share<kSlices>::kAtOnce]) {
    using S = Share<kSlices>;
    wait_for_cluster();
#pragma unroll
    for (int first = 0; first < S::kTurns; first += S::kAtOnce) {
      auto row_of = [&](int turn) { return ((first + turn) * kThreads + thread) / S::kLanes; };
      auto piece_of = [&](int turn) { return ((first + turn) * kThreads + thread) % S::kLanes; };
      if (S::kLanes == S::kPieces || piece_of(0) < S::kPieces) {
        uint4 found[2 * S::kAtOnce];
        receive(found, [&](int i) {
          int column = rank * kSlices * kSlice + piece_of(i / 2) * 8 + i % 2 * 4;
          return packet_at(which, chunk * kRows + row_of(i / 2), column);
        });
#pragma unroll
        for (int turn = 0; turn < S::kAtOnce; ++turn) {
          uint4 const &low = found[2 * turn], &high = found[2 * turn + 1];
          pieces[turn] = {low.x, low.z, high.x, high.z};
          *reinterpret_cast<uint4*>(stage_at<kSlices>(row_of(turn)) + piece_of(turn) * 8) = pieces[turn];
        }
      }
    }
    __syncthreads();
  }

  // Mean and squared deviations of each row's slice to the block that finishes the row.
  __device__ void send_moments(uint4 const (&pieces)[kImages]) {
    constexpr int kLanes = Share<1>::kLanes;
    int row = thread / kLanes;
    bool counts = thread % kLanes < Share<1>::kPieces;
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      float2 x[4] = {unpack<Element>(pieces[image].x), unpack<Element>(pieces[image].y), unpack<Element>(pieces[image].z),
                     unpack<Element>(pieces[image].w)};
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += x[i].x + x[i].y;
      float mean = sum_of_lanes<1, kLanes>(counts ? sum : 0.f) * (1.f / kSlice);
#pragma unroll
      for (int i = 0; i < 4; ++i) squares += (x[i].x - mean) * (x[i].x - mean) + (x[i].y - mean) * (x[i].y - mean);
      squares = sum_of_lanes<1, kLanes>(counts ? squares : 0.f);
      if (thread % kLanes == 0)
        store_to_rank(&shared.moments[rank][image * kOwnQueries + row % kOwnQueries], row / kOwnQueries,
                      make_float2(mean, squares));
    }
  }

  template <int kSlices>
  __device__ Element* stage_at(int row) {
    return reinterpret_cast<Element*>(shared.stage) + row * (kSlices * kSlice + 8);
  }

  // ---- products ----

  // The first of the cluster's tiles, of ``count``.
  __device__ int first_tile(int count) { return cluster * count / clusters; }
  __device__ int own_tiles(int count) { return (cluster + 1) * count / clusters - first_tile(count); }

  // Eight columns of sixteen rows, the m-th of the chunk's, to those who finish them. ``source`` of a result's parts.
  __device__ void send_part(float const (&part)[4], int m, int source, int tiles, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = m % 2 * 16 + half * 8 + lane / 4, own = m / 2 * kOwnQueries + row % kOwnQueries;
      store_to_rank(reinterpret_cast<float2*>(shared.parts + (source * tiles + tile) * kOwn * kTile + own * kTile) + lane % 4,
                    row / kOwnQueries, make_float2(part[half * 2], part[half * 2 + 1]));
    }
  }

  // Parts of the staged rows' product with the cluster's ``own`` tiles, sent to who finishes them; the block's are one
  // or, of four slices, two.
  template <int kSlices>
  __device__ void multiply(int own) {
    constexpr int kParts = kSlices == 1 ? 1 : 2, kOfPart = kSlices / kParts, kTurns = kSlices == 1 ? 2 : 1;
    int part = warp % kParts, first = warp / kParts;
    float acc[kTurns][2 * kImages][4] = {};
#pragma unroll
    for (int s = 0; s < kOfPart; ++s) {
      int slice = part * kOfPart + s;
      uint2 const* slots[kTurns];
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
        if (first + j * kWarps < own) slots[j] = slot_of((first + j * kWarps) * kSlices + slice) + lane;
      if (first >= own) break;
      Element const* rows = stage_at<kSlices>(lane % 16) + slice * kSlice + lane / 16 * 8;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        uint32_t a[2 * kImages][4];
#pragma unroll
        for (int m = 0; m < 2 * kImages; ++m) ldmatrix(a[m], rows + m * 16 * (kSlices * kSlice + 8) + i * 16);
#pragma unroll
        for (int j = 0; j < kTurns; ++j) {
          if (first + j * kWarps < own) {
            uint2 b = slots[j][i * 32];
#pragma unroll
            for (int m = 0; m < 2 * kImages; ++m) mma<Element>(acc[j][m], a[m], b.x, b.y);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j)
      if (first + j * kWarps < own)
#pragma unroll
        for (int m = 0; m < 2 * kImages; ++m) send_part(acc[j][m], m, rank * kParts + part, own, first + j * kWarps);
  }

  // Which two columns of which row of the block's a thread finishes in a turn.
  struct Place {
    int tile, own, pair;
    bool exists;
    __device__ int column() const { return tile * kTile + pair * 2; }
  };
  __device__ Place place_of(int turn, int tiles) {
    int position = turn * kThreads + thread, tile = position / (4 * kOwn);
    return {tile < tiles ? tile : 0, position / 4 % kOwn, position % 4, tile < tiles};
  }
  // Of all images' rows.
  __device__ int row_of(int chunk, Place place) {
    return chunk * kRows + place.own / kOwnQueries * kQueries + rank * kOwnQueries + place.own % kOwnQueries;
  }

  __device__ float2 part_of(Place place, int source, int tiles) {
    return reinterpret_cast<float2 const*>(shared.parts + (source * tiles + place.tile) * kOwn * kTile +
                                           place.own * kTile)[place.pair];
  }

  template <int kParts>
  __device__ float2 total_of(Place place, int tiles) {
    float2 sum = {0.f, 0.f};
    if (!place.exists) return sum;
#pragma unroll
    for (int source = 0; source < kCluster * kParts; ++source) {
      float2 x = part_of(place, source, tiles);
      sum.x += x.x, sum.y += x.y;
    }
    return sum;
  }

  // ---- LayerNorm ----

  // Mean and 1 / deviation of one of the block's rows, from what its cluster's blocks sent of it.
  __device__ float2 norm_of(int own) {
    float mean = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kCluster; ++i) mean += shared.moments[i][own].x;
    mean *= 1.f / kCluster;
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      float2 x = shared.moments[i][own];
      squares += x.y + kSlice * (x.x - mean) * (x.x - mean);
    }
    return {mean, rsqrtf(squares * (1.f / kHidden) + p.eps)};
  }

  // The product of rows before their LayerNorm, and the cluster knows their means and deviations.
  __device__ void multiply_normalized(Rows const& rows, int chunk, int own) {
    uint4 pieces[Share<1>::kAtOnce];
    stage_rows<1>(rows.sums, chunk, pieces);
    multiply<1>(own);
    send_moments(pieces);
    meet();
  }

  // What a product with LayerNorm adds to its sums, of two columns.
  struct Folded {
    float2 sums, bias;
  };

  // finish(place, two columns) of LayerNorm(rows) weight^T + bias, with all parts sent.
  template <int kTurns, class Finish>
  __device__ void finish_normalized(Folded const (&folded)[kTurns], int chunk, int tiles, Finish finish) {
    static_assert(kThreads / 4 % kOwn == 0);  // so a thread's row is the same in all turns
    int own = thread / 4 % kOwn;
    float2 norm = norm_of(own);
    if (thread == 4 * own) shared.norms[chunk][own] = norm;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      Place place = place_of(turn, tiles);
      float2 x = total_of<1>(place, tiles);
      x.x = (x.x - norm.x * folded[turn].sums.x) * norm.y + folded[turn].bias.x;
      x.y = (x.y - norm.x * folded[turn].sums.y) * norm.y + folded[turn].bias.y;
      finish(place, x);
    }
  }

  // Of ``columns``, those that the thread finishes; ``column(place)`` says which.
  template <int kTurns, class Column>
  __device__ void load_folded(Folded (&folded)[kTurns], int columns, int tiles, Column column) {
    float const* sums = take(columns);
    float const* bias = take(columns);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int at = column(place_of(turn, tiles));
      folded[turn] = {load_pair(sums + at), load_pair(bias + at)};
    }
  }

  // ---- feed-forward, and what follows attention ----

  // activation = GELU(LayerNorm(rows) weight^T + bias).
  __device__ void linear_and_gelu(Rows const& rows) {
    int own = own_tiles(4 * kTiles), first = first_tile(4 * kTiles) * kTile;
    Folded folded[kImages];
    load_folded(folded, kIntermediate, own, [&](Place place) { return first + place.column(); });
    for (int chunk = 0; chunk < chunks; ++chunk) {
      multiply_normalized(rows, chunk, own);
      if (chunk + 1 == chunks) leave_slots(own);
      finish_normalized(folded, chunk, own, [&](Place place, float2 x) {
        if (place.exists)
          send(kActivation, row_of(chunk, place), first + place.column(),
               pack<Element>(gelu<Element>(x.x), gelu<Element>(x.y)));
      });
      arrive_after_reading();
    }
    ++phase;
  }

  // The other sums = what was handed on weight^T + bias + rows; returns LayerNorm of them.
  template <int kSlices>
  __device__ Rows linear_and_residual(Handed handed, Rows const& rows) {
    int own = own_tiles(kTiles), first = first_tile(kTiles) * kTile;
    Place place = place_of(0, own);
    int column = first + place.column();
    Handed written = rows.sums == kSums ? kOtherSums : kSums;
    float2 bias = load_pair(take(kHidden) + column), norm_weight, norm_bias;
    if (rows.norm != nullptr) norm_weight = load_pair(rows.norm + column), norm_bias = load_pair(rows.norm + kHidden + column);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int row = row_of(chunk, place);
      // a packet that this thread wrote
      uint32_t pair = rows.norm != nullptr
                          ? load_relaxed(&packet_at(rows.sums, row, column)->x)
                          : __ldg(static_cast<unsigned const*>(p.rows) + (row % kQueries * kHidden + column) / 2);
      uint4 pieces[Share<kSlices>::kAtOnce];
      stage_rows<kSlices>(handed, chunk, pieces);
      multiply<kSlices>(own);
      meet();
      if (chunk + 1 == chunks) leave_slots(own * kSlices);
      float2 x = total_of<kSlices == 1 ? 1 : 2>(place, own), residual = unpack<Element>(pair);
      if (rows.norm != nullptr) {
        float2 norm = shared.norms[chunk][place.own];
        residual.x = (residual.x - norm.x) * norm.y * norm_weight.x + norm_bias.x;
        residual.y = (residual.y - norm.x) * norm.y * norm_weight.y + norm_bias.y;
      }
      if (place.exists)
        send(written, row, column, pack<Element>(x.x + bias.x + residual.x, x.y + bias.y + residual.y));
      arrive_after_reading();
    }
    ++phase;
    return {written, take(2 * kHidden)};
  }

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
  __device__ void weigh(float (&out)[kHeaddim / 8][4], float const (&weights)[kColumns][4], int n, Element const* values) {
    uint32_t a[4] = {pack<Element>(weights[n][0], weights[n][1]), pack<Element>(weights[n][2], weights[n][3]),
                     pack<Element>(weights[n + 1][0], weights[n + 1][1]),
                     pack<Element>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
    for (int tile = 0; tile < kHeaddim / 8; tile += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, values + lane % 16 * kGroupStride + tile * 8 + lane / 16 * 8);
      mma<Element>(out[tile], a, b[0], b[1]);
      mma<Element>(out[tile + 1], a, b[2], b[3]);
    }
  }

  // scores += 16 rows of q times kColumns * 8 rows of k.
  template <int kColumns>
  __device__ void score(float (&scores)[kColumns][4], Element const* q, Element const* k) {
#pragma unroll
    for (int step = 0; step < kHeaddim / 16; ++step) {
      uint32_t a[4];
      ldmatrix(a, q + lane % 16 * kGroupStride + step * 16 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        Element const* b = k + (n * 8 + lane / 4) * kGroupStride + step * 16 + lane % 4 * 2;
        mma<Element>(scores[n], a, *reinterpret_cast<uint32_t const*>(b), *reinterpret_cast<uint32_t const*>(b + 8));
      }
    }
  }

  __device__ static float scale() { return rsqrtf(float(kHeaddim)) * 1.44269504f; }

  __device__ Element* queries_of(int image) {
    return reinterpret_cast<Element*>(shared.queries) + image * kQueries * kGroupStride;
  }
  __device__ Element* keys_of(int image) { return reinterpret_cast<Element*>(shared.keys) + image * kTokens * kGroupStride; }
  __device__ Element* values_of(int image) {
    return reinterpret_cast<Element*>(shared.values) + image * kTokens * kGroupStride;
  }

  // Eight columns of one of the block's rows, a pair a lane, to that row of every block's ``to``, an image's ``stride``
  // after another's.
  __device__ void send_to_all(char* to, int stride, Place place, uint32_t pair) {
    uint4 columns = of_four_lanes(pair, lane);
    int row = place.own / kOwnQueries * stride + rank * kOwnQueries + place.own % kOwnQueries;
    Element* at = reinterpret_cast<Element*>(to) + row * kGroupStride + place.tile % kGroupTiles * kTile;
    if (place.exists)
#pragma unroll
      for (int i = 0; i < kCluster; i += 4) store_to_rank(reinterpret_cast<uint4*>(at), i + lane % 4, columns);
  }

  // context = attention of the rows to each other: a group of heads a cluster, a block's rows of queries.
  __device__ void self_attention(Rows const& rows) {
    int own = attends ? 3 * kGroupTiles : 0;
    Folded folded[kImages];
    load_folded(folded, 3 * kHidden, own, [&](Place place) {
      return attends ? place.tile / kGroupTiles * kHidden + cluster * kGroup + place.column() % kGroup : 0;
    });
    for (int chunk = 0; chunk < chunks; ++chunk) {
      multiply_normalized(rows, chunk, own);
      if (chunk + 1 == chunks) leave_slots(own);
      finish_normalized(folded, chunk, own, [&](Place place, float2 x) {
        uint32_t pair = pack<Element>(x.x, x.y);
        if (place.tile < kGroupTiles) {
          Element* to = queries_of(place.own / kOwnQueries) + place.own % kOwnQueries * kGroupStride + place.column();
          if (place.exists) *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
          send_to_all(place.tile < 2 * kGroupTiles ? shared.keys : shared.values, kTokens, place, pair);
        }
      });
      if (attends) {
        meet();
        if (warp < kImages * kHeads) attend_to_rows(chunk, warp / kHeads, warp % kHeads);
      }
      arrive_after_reading();
    }
    ++phase;
  }

  // A warp's: the block's queries of an image's head.
  __device__ void attend_to_rows(int chunk, int image, int head) {
    static_assert(kOwnQueries <= 8);
    float scores[4][4] = {};
    score(scores, queries_of(image) + head * kHeaddim, keys_of(image) + head * kHeaddim);
    float highest = -INFINITY, total = 0.f;
#pragma unroll
    for (int n = 0; n < 4; ++n) highest = fmaxf(highest, fmaxf(scores[n][0], scores[n][1]));
    exponentiate(scores, 0, highest_of_lanes<1, 4>(highest), scale(), total);
    total = sum_of_lanes<1, 4>(total);
#pragma unroll
    for (int n = 0; n < 4; ++n) scores[n][2] = scores[n][3] = 0.f;  // of rows that are none
    float out[kHeaddim / 8][4] = {};
#pragma unroll
    for (int n = 0; n < 4; n += 2) weigh(out, scores, n, values_of(image) + n * 8 * kGroupStride + head * kHeaddim);
    if (lane / 4 < kOwnQueries) {
      int row = chunk * kRows + image * kQueries + rank * kOwnQueries + lane / 4;
#pragma unroll
      for (int tile = 0; tile < kHeaddim / 8; ++tile)
        send(kContext, row, cluster * kGroup + head * kHeaddim + tile * 8 + lane % 4 * 2,
             pack<Element>(out[tile][0] / total, out[tile][1] / total));
    }
  }

  // Queries of layer 0 to every image's, which ask the same.
  __device__ void stage_given_queries() {
    constexpr int kPieces = kGroup / 8;
    for (int i = thread; i < kRows * kPieces; i += kThreads) {
      int row = i / kPieces, column = i % kPieces * 8;
      *reinterpret_cast<uint4*>(queries_of(0) + row * kGroupStride + column) = __ldg(reinterpret_cast<uint4 const*>(
          static_cast<Element const*>(p.queries) + row % kQueries * kHidden + cluster * kGroup + column));
    }
  }

  // An image's keys and values from ``first`` on, up to ``end``, on their way; filled up with zeros to sixteen.
  __device__ void stage_tokens(int chunk, int layer, int first, int end) {
    constexpr int kPieces = kGroup / 8;
    int count = min(kTokens, end - first), filled = (count + 15) / 16 * 16;
    int64_t width = int64_t(cross_layers()) * 2 * kHidden;
    for (int i = thread; i < kImages * 2 * filled * kPieces; i += kThreads) {
      int token = i / (2 * kPieces) % filled, image = i / (2 * kPieces) / filled, column = i % kPieces * 8;
      bool is_value = i / kPieces % 2;
      Element* to = (is_value ? values_of(image) : keys_of(image)) + token * kGroupStride + column;
      int64_t row = int64_t(min(chunk * kImages + image, p.images - 1)) * p.tokens + first + token;
      if (token < count)
        copy_async(to, static_cast<Element const*>(p.keys_values) + row * width + (layer * 2 + is_value) * kHidden +
                           cluster * kGroup + column);
      else
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
    }
    commit_copies();
  }

  // context = attention of the rows to the images: a group of heads a cluster, a block's tokens of each image, of which
  // two warps have every second sixteen. ``layer`` counts those that look at the image.
  __device__ void cross_attention(Rows const& rows, int layer) {
    int own = attends ? kGroupTiles : 0;
    bool given = rows.norm == nullptr;
    Folded folded[1] = {};
    if (!given)
      load_folded(folded, kHidden, own, [&](Place place) { return attends ? cluster * kGroup + place.column() : 0; });
    int of_block = (p.tokens + kCluster - 1) / kCluster;
    int begin = min(rank * of_block, p.tokens), end = min(begin + of_block, p.tokens);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (attends) stage_tokens(chunk, layer, begin, end);
      if (given) {
        if (!attends) continue;
        stage_given_queries();
        wait_for_cluster();
      } else {
        multiply_normalized(rows, chunk, own);
        if (chunk + 1 == chunks) leave_slots(own);
        finish_normalized(folded, chunk, own, [&](Place place, float2 x) {
          send_to_all(shared.queries, kQueries, place, pack<Element>(x.x, x.y));
        });
        if (attends) meet();
      }
      if (attends) {
        attend_to_tokens(chunk, layer, begin, end);
        meet();
        finish_attention(chunk);
      }
      arrive_after_reading();
    }
    ++phase;
  }

  __device__ void attend_to_tokens(int chunk, int layer, int begin, int end) {
    int reader = warp % kReaders, m = warp / kReaders % 2, head = warp / (2 * kReaders) % kHeads;
    int image = warp / (2 * kReaders) / kHeads;
    static_assert(2 * kReaders * kHeads * kImages <= kWarps);
    bool takes_part = image < kImages;
    if (!takes_part) image = 0;
    Element const* q = queries_of(image) + m * 16 * kGroupStride + head * kHeaddim;
    float out[kHeaddim / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int first = begin; first < end; first += kTokens) {
      int count = min(kTokens, end - first);
      if (first > begin) {
        __syncthreads();
        stage_tokens(chunk, layer, first, end);
      }
      wait_for_copies();
      __syncthreads();
      for (int token = reader * 16; takes_part && token < count; token += kReaders * 16) {
        float scores[2][4] = {};
        score(scores, q, keys_of(image) + token * kGroupStride + head * kHeaddim);
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
          float shrink = exp2_approx((highest[half] - higher) * scale());
          highest[half] = higher;
          total[half] *= shrink;
#pragma unroll
          for (int tile = 0; tile < kHeaddim / 8; ++tile) out[tile][half * 2] *= shrink, out[tile][half * 2 + 1] *= shrink;
          exponentiate(scores, half, higher, scale(), total[half]);
        }
        weigh(out, scores, 0, values_of(image) + token * kGroupStride + head * kHeaddim);
      }
    }
    if (!takes_part) return;
    int source = rank * kReaders + reader;
#pragma unroll
    for (int tile = 0; tile < kHeaddim / 8; ++tile)
      send_part(out[tile], image * 2 + m, source, kGroupTiles, head * (kHeaddim / 8) + tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_of_lanes<1, 4>(total[half]);
      int row = m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0)
        store_to_rank(&shared.tops[source][head][image * kOwnQueries + row % kOwnQueries], row / kOwnQueries,
                      make_float2(highest[half], sum));
    }
  }

  __device__ void finish_attention(int chunk) {
    constexpr int kSources = kCluster * kReaders;
    Place place = place_of(0, kGroupTiles);
    if (!place.exists) return;
    int head = place.tile / (kHeaddim / 8);
    float highest = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < kSources; ++i) highest = fmaxf(highest, shared.tops[i][head][place.own].x);
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      float2 top = shared.tops[i][head][place.own], x = part_of(place, i, kGroupTiles);
      float weight = exp2_approx((top.x - highest) * scale());
      total += weight * top.y, sum.x += weight * x.x, sum.y += weight * x.y;
    }
    send(kContext, row_of(chunk, place), cluster * kGroup + place.column(),
         pack<Element>(sum.x / total, sum.y / total));
  }

  __device__ int cross_layers() {
    int count = 0;
    for (int layer = 0; layer < p.layers; ++layer) count += p.cross_layers >> layer & 1;
    return count;
  }

  // LayerNorm of the last rows, a row a warp.
  __device__ void write(Rows const& rows) {
    constexpr int kPieces = kHidden / 4 / 32;
    for (int row = blockIdx.x + gridDim.x * warp; row < p.images * kQueries; row += gridDim.x * kWarps) {
      auto column_of = [&](int i) { return (i * 32 + lane) * 4; };
      uint4 found[kPieces];
      receive(found, [&](int i) { return packet_at(rows.sums, row, column_of(i)); });
      float mean = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float2 a = unpack<Element>(found[i].x), b = unpack<Element>(found[i].z);
        mean += a.x + a.y + b.x + b.y;
      }
      mean = sum_of_lanes<1, 32>(mean) * (1.f / kHidden);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float2 a = unpack<Element>(found[i].x), b = unpack<Element>(found[i].z);
        squares += (a.x - mean) * (a.x - mean) + (a.y - mean) * (a.y - mean) + (b.x - mean) * (b.x - mean) +
                   (b.y - mean) * (b.y - mean);
      }
      float rstd = rsqrtf(sum_of_lanes<1, 32>(squares) * (1.f / kHidden) + p.eps);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float2 a = unpack<Element>(found[i].x), b = unpack<Element>(found[i].z);
        float4 weight = __ldg(reinterpret_cast<float4 const*>(rows.norm + column_of(i)));
        float4 bias = __ldg(reinterpret_cast<float4 const*>(rows.norm + kHidden + column_of(i)));
        uint2 normalized = {
            pack<Element>((a.x - mean) * rstd * weight.x + bias.x, (a.y - mean) * rstd * weight.y + bias.y),
            pack<Element>((b.x - mean) * rstd * weight.z + bias.z, (b.y - mean) * rstd * weight.w + bias.w)};
        *reinterpret_cast<uint2*>(static_cast<Element*>(p.out) + int64_t(row) * kHidden + column_of(i)) = normalized;
      }
    }
  }
};

}  // namespace qformer_fast
