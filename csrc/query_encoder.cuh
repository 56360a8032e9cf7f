// The Q-Former's layers over queries alone, in one launch of clusters of eight blocks, one block a multiprocessor.
//
// A product's columns are shared by the clusters, eight to a tile. In a cluster blocks share the sum over K; each sends
// what it has of a row to the block that finishes it, by stores that count themselves at a barrier there. So every block
// reads its own weights, once, in an order known before: they lie in memory as it wants them, in slots of 8 columns and 96
// of K, and come through a ring in shared memory, filled by bulk copies as soon as there is room, whatever the block
// waits for.
//
// What a product writes and the next one reads lies in global memory as words of two numbers, each phase's where no other's
// do, and kNothing before: who reads a word until it is something needs no barrier. Two launches in a row have words apart,
// and each leaves kNothing where the one before had them.
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
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTile = 8;                    // columns of a slot
constexpr int kSlice = kHidden / kCluster;  // K of a slot
constexpr int kSteps = kSlice / 16;         // of an mma
constexpr int kSlotBytes = kTile * kSlice * 2;
constexpr int kVector = kSlotBytes / 3 / 4;  // numbers of each of a phase's vectors, which have a slot together
constexpr int kPage = 4, kPageBytes = kPage * kSlotBytes;  // slots copied at once
constexpr int kRowBytes = 512, kSlotRows = kSlotBytes / kRowBytes;  // of the slots as one matrix
static_assert(kSlotRows * kRowBytes == kSlotBytes);
constexpr int kMaxPages = 24;
constexpr int kTiles = kHidden / kTile;                    // of the hidden size
constexpr int kStride = kIntermediate / kCluster + 8;      // of staged rows: eight of them in different banks
constexpr int kLanes = kThreads / kQueries;                // that share a row to read
constexpr uint32_t kNothing = 0xffffffffu;                 // no two numbers: what is rounded to bf16 or fp16 is another NaN

// The blocks of a cluster that share K are ``kSplit``; so many rows of an image each of them finishes, and where kSplit is
// less than the cluster, its groups share the tiles.
template <int kSplit>
constexpr int kOwn = kQueries / kSplit;
template <int kSplit>
constexpr int kGroups = kCluster / kSplit;
constexpr int kWide = 4, kNarrow = 8;  // kSplit of products behind LayerNorm, and of those with a residual

// Heads are attended to by the first clusters, which have 64 columns each.
constexpr int kHeadColumns = 64, kHeadClusters = kHidden / kHeadColumns, kHeadTiles = kHeadColumns / kTile;
constexpr int kHeadStride = kHeadColumns + 8;
constexpr int kLeastClusters = kHeadClusters;

// Tiles that a block may have: of products to 3072 columns, and of those to 768.
constexpr int kMostWide = 4 * kTiles / kLeastClusters / kGroups<kWide>, kMostNarrow = kTiles / kLeastClusters;
static_assert(kMostWide == 2 * kWarps && kMostNarrow == kWarps && kMostWide * kTile <= kVector);
static_assert(3 * kHeadTiles / kGroups<kWide> <= kMostWide);
// Pages of a phase's slots, which may begin within one.
constexpr int kLeastPages = (1 + kMostWide * 2 + kPage - 1) / kPage + 1;

// Images whose rows go through a product at once; tokens staged at once, and of these attended to at once.
constexpr int images_of_chunk(int images) { return images == 1 ? 1 : 2; }
constexpr int staged_tokens(int images) { return 96 / images; }
constexpr int kTokensAtOnce = 48;

// Cycles before the activation is asked for, which takes as long at least: all blocks ask for 24 KB an image of it, and in
// vain that holds up those who still write it.
constexpr int kRest = 1000;

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

// Four columns of a row.
template <class Element>
__device__ __forceinline__ uint2 pack(float4 x) {
  return {pack<Element>(x.x, x.y), pack<Element>(x.z, x.w)};
}

template <class Element>
__device__ __forceinline__ float4 unpack(uint2 words) {
  float2 a = unpack<Element>(words.x), b = unpack<Element>(words.y);
  return {a.x, a.y, b.x, b.y};
}

// ---- memory ----

// The workspace: a header with the number of launches and of the last one's words, and two halves that the launches take in
// turn for the words of all phases, of all images filled up to whole chunks.
constexpr int64_t kHeaderWords = 64;

constexpr int64_t words_of_phases(int images, int layers, int looking) {
  int chunk = images_of_chunk(images);
  int64_t rows = int64_t((images + chunk - 1) / chunk) * chunk * kQueries;
  int64_t attentions = layers - 1 + looking;
  return rows / 2 * (attentions * 2 * kHidden + layers * (kIntermediate + kHidden));
}

constexpr int64_t workspace_bytes(int images, int layers, int looking) {
  return (kHeaderWords + 2 * words_of_phases(images, layers, looking)) * 4;
}

// A block's shared memory. What blocks of its cluster write for one exchange is read before the next but one.
template <int kImages>
struct alignas(128) Shared {
  static constexpr int kTokens = staged_tokens(kImages);
  char stage[kImages * kQueries * kStride * 2];                                 // a product's rows
  float parts[2][kWide * kMostWide * kOwn<kWide> * kImages * kTile];            // of a product's or attention's result
  char queries[kImages * kQueries * kHeadStride * 2];                           // of a cluster's heads
  union {
    struct {
      char keys[kImages * kTokens * kHeadStride * 2], values[kImages * kTokens * kHeadStride * 2];
    };
    float4 halves[kMostNarrow][kImages][2][32];  // of sums that two warps share
  };
  float2 moments[2][kWide][kImages * kOwn<kWide>];                              // of a slice: mean, squared deviations
  float2 norms[kMaxImages / kImages][kImages * kOwn<kWide>];                    // of a row: mean and 1 / deviation
  float2 tops[2][kCluster][2][kImages * kOwn<kNarrow>];                         // of a head: highest score, sum of weights
  uint2 residual[kMaxImages / kImages][kMostNarrow * kOwn<kNarrow> * kImages * kTile / 4];
  uint64_t full[kMaxPages], arrived[2], measured[2], gathered;  // barriers: pages, parts, moments, and heads' rows have come
  alignas(128) char ring[];

  static_assert(kTokens >= kQueries && kTokens % kTokensAtOnce == 0);
  static_assert(kCluster * kHeadTiles * kOwn<kNarrow> <= kWide * kMostWide * kOwn<kWide>);
};
static_assert(sizeof(Shared<2>) + kLeastPages * kPageBytes <= 232448);

// What a sub-layer begins with, and what follows it.
enum Kind { kSelfAttention, kCrossAttention, kFeedForward };

// A block's tiles in a product.
struct Tiles {
  int first, count;
};

// ---- the encoder ----

// kMany: more than one chunk.
template <class Element, int kImages, bool kMany, int kHeaddim>
struct Encoder {
  static constexpr int kRows = kImages * kQueries;  // of a chunk
  static constexpr int kTokens = Shared<kImages>::kTokens;

  QueryEncoderArguments const& p;
  Boxes const& pages;
  Shared<kImages>& shared;
  int thread, warp, lane, rank, cluster, chunks, slots;
  bool attends;                     // to 64 columns of heads
  Tiles wide, narrow;               // of products to 3072 columns, and of those to 768 with a residual
  int first_slot = 0, parity = 0;   // of the phase, in the ring
  int asked = 0, next_place = 0;    // pages that were asked for, and where in the ring the next one goes
  int exchange = 0, measuring = 0, gathering = 0;  // how many there were
  uint32_t const* read = nullptr;   // what the phase before wrote
  uint32_t* written;                // and this phase writes
  uint32_t launches, words_before;  // launches that there have been after kNothing, and words of the last one
  int first_of_block, end_of_block;  // of its slots
  Way to_wide[2], to_narrow[2];     // to who finishes the lane's of sixteen rows, the first of an image and the others

  __device__ Encoder(QueryEncoderArguments const& arguments, Boxes const& pages_, Shared<kImages>& shared_)
      : p(arguments), pages(pages_), shared(shared_) {
    thread = threadIdx.x, warp = same_in_warp(thread / 32), lane = thread % 32;
    rank = blockIdx.x % kCluster, cluster = blockIdx.x / kCluster;
    int clusters = gridDim.x / kCluster;
    chunks = kMany ? (p.images + kImages - 1) / kImages : 1;
    slots = p.ring * kPage;
    attends = cluster < kHeadClusters;
    // asked for here, looked at later
    launches = load_word(header()), words_before = load_word(header() + 1);
    first_of_block = load_word(p.first_slots + blockIdx.x), end_of_block = load_word(p.first_slots + blockIdx.x + 1);
    auto tiles_of = [&](int tiles) {
      return Tiles{cluster * tiles / clusters, (cluster + 1) * tiles / clusters - cluster * tiles / clusters};
    };
    wide = tiles_of(4 * kTiles), narrow = tiles_of(kTiles);
    int half = wide.count / kGroups<kWide>;
    static_assert(kGroups<kWide> == 2);
    wide = group() == 0 ? Tiles{wide.first, half} : Tiles{wide.first + half, wide.count - half};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to_wide[i] = way_to_rank(&shared, 4 * i + lane % 2 * 2 + group());
      to_narrow[i] = way_to_rank(&shared, 4 * i + lane % 2 * 2 + lane / 16);
    }
  }

  __device__ void run() {
    if (expects()) {
      prefetch(pages);
      for (int i = 0; i < p.ring; ++i) start_barrier(&shared.full[i], 1);
      for (int i = 0; i < 2; ++i) start_barrier(&shared.arrived[i], 1 + kThreads), start_barrier(&shared.measured[i], 1);
      start_barrier(&shared.gathered, 1);
      publish_barriers();
    }
    arrive_at_cluster();
    Place place = place_of<kNarrow>(0, narrow.count);
    uint2 words = given_words(place);
    if (attends) stage_tokens(0, 0, first_token()), stage_given_queries();
    start_with_rows(place, words);
    written = half_of(launches);
    wait_for_cluster();
    // the first products' pages; the others do not hold up what the first attention reads
    issue(kLeastPages);
#pragma unroll 1
    for (int layer = 0, looking = 0, sub_layer = 0; layer < p.layers; ++layer) {
#pragma unroll 1
      for (int kind = layer == 0 ? kCrossAttention : kSelfAttention; kind <= kFeedForward; ++kind) {
        if (kind == kCrossAttention && !(p.cross_layers >> layer & 1)) continue;
        clear(sub_layer++);
        first_of_sub_layer(Kind(kind), looking, layer == 0);
        if (kind == kCrossAttention) ++looking;
        if (kind == kFeedForward)
          linear_and_residual<4>();
        else
          linear_and_residual<1>();
      }
    }
    write();
    count_launch();
  }

  // ---- weights ----

  // Asks for the next pages, whose places nobody reads any more, one a lane of the last warp.
  __device__ void issue(int count) {
    count = min(count, (end_of_block - first_of_block + kPage - 1) / kPage - asked);
    int place = next_place + lane;
    if (place >= p.ring) place -= p.ring;
    if (warp == kWarps - 1 && lane < count)
      copy_box(shared.ring + place * kPageBytes, pages, (first_of_block + (asked + lane) * kPage) * kSlotRows, kPageBytes,
               &shared.full[place]);
    asked += count, next_place += count;
    if (next_place >= p.ring) next_place -= p.ring;
  }

  // This phase's j-th slot.
  __device__ char const* slot_of(int j) {
    int at = first_slot + j;
    return shared.ring + (at < slots ? at : at - slots) * kSlotBytes;
  }

  // A thread's part of waiting for this phase's ``count`` slots.
  __device__ void wait_for_slots(int count) {
    int at = first_slot / kPage + thread;
    if (at * kPage < first_slot + count) {
      bool turned = at >= p.ring;
      wait_for_barrier(&shared.full[turned ? at - p.ring : at], parity ^ turned);
    }
  }

  // The warp has read all it needs of the phase's slots.
  __device__ void slots_are_read() {
    if (warp < kWarps - 1) arrive_at_block<kThreads>();
  }

  // Asks for others in the place of the phase's ``count`` slots, when all warps have read them.
  __device__ void leave_slots(int count) {
    if (warp == kWarps - 1) wait_for_block<kThreads>();
    issue((first_slot + count) / kPage - first_slot / kPage);
    first_slot += count;
    if (first_slot >= slots) first_slot -= slots, parity ^= 1;
  }

  // Four columns of the phase's i-th vector.
  __device__ float4 vector_at(char const* slot, int i, int column) {
    return *reinterpret_cast<float4 const*>(slot + (i * kVector + column) * 4);
  }

  // ---- the cluster ----

  // Which of the blocks that share K this is, and which of the groups that share a wide product's tiles.
  template <int kSplit>
  __device__ int share() { return rank / kGroups<kSplit>; }
  __device__ int group() { return rank % kGroups<kWide>; }

  // An exchange is of all blocks with all of a cluster, or of a group, into one of two buffers: who has all of one knows
  // that they have read what came before it. Of the other group that is known where an exchange of all comes next to one of
  // groups, by the rows it begins with: all blocks had a part in them. With more than one chunk it is not, nor is anything
  // of what is gathered: before a chunk's first product and before the second one blocks wait until all have read.
  __device__ void wait_for_readers() {
    if (kMany) wait_for_cluster();
  }

  __device__ int buffer() { return exchange % 2; }

  // The thread that says how many bytes come.
  __device__ bool expects() { return thread == kThreads - 32; }

  // From other blocks.
  __device__ void expect_parts(int bytes) {
    if (expects()) expect_bytes(&shared.arrived[buffer()], bytes);
  }

  // The thread has no more parts, for others or the block's own, and has read the stage. All arrive: compute-sanitizer's
  // racecheck does not follow what a warp did to one lane that arrives for it.
  __device__ void parts_are_sent() { arrive(&shared.arrived[buffer()]); }

  // Until all parts are there; so all that the block has of a product have been sent. Returns their buffer.
  __device__ int wait_for_parts() {
    int here = buffer();
    wait_for_barrier(&shared.arrived[here], exchange / 2 % 2);
    ++exchange;
    return here;
  }

  // Rows of 64 columns.
  __device__ void expect_gathered(int rows) {
    if (expects()) expect_bytes(&shared.gathered, rows * kHeadColumns * 2);
  }

  __device__ void wait_for_gathered() { wait_for_barrier(&shared.gathered, gathering++ % 2); }

  // ---- what was written ----

  __device__ static bool is_something(uint4 const& words) {
    return max(max(words.x, words.y), max(words.z, words.w)) != kNothing;
  }

  // Asks for kCount times eight columns, those of them that exist; ``at(i)`` is the place of the i-th.
  template <int kCount, class At, class Exists>
  __device__ static void ask(uint4 (&found)[kCount], At at, Exists exists) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (exists(i)) found[i] = load_words(at(i));
  }

  // Until all that was asked for has been written.
  template <int kCount, class At, class Exists>
  __device__ static void receive(uint4 (&found)[kCount], At at, Exists exists) {
    for (bool waiting = true; waiting;) {
      waiting = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (exists(i) && !is_something(found[i])) found[i] = load_words(at(i)), waiting = true;
    }
  }

  __device__ uint32_t* header() { return static_cast<uint32_t*>(p.workspace); }
  __device__ uint32_t* half_of(uint32_t launch) {
    return header() + kHeaderWords + launch % 2 * ((p.workspace_bytes / 4 - kHeaderWords) / 8 * 4);
  }

  // A sub-layer's part of leaving nothing of the launch before to the next one.
  __device__ void clear(int sub_layer) {
    int words = max(int(words_before), 0), sub_layers = 2 * p.layers - 1 + looking_layers();
    int part = (words / 4 + sub_layers - 1) / sub_layers * 4, end = min(part * (sub_layer + 1), words);
    uint32_t* half = half_of(launches + 1);
#pragma unroll 1
    for (int i = part * sub_layer + (blockIdx.x * kThreads + thread) * 4; i < end; i += gridDim.x * kThreads * 4)
      *reinterpret_cast<uint4*>(half + i) = {kNothing, kNothing, kNothing, kNothing};
  }

  __device__ int looking_layers() { return int(p.width / (2 * kHidden)); }

  __device__ void count_launch() {
    if (blockIdx.x > 0 || thread > 0) return;
    header()[0] = launches + 1;
    header()[1] = uint32_t(words_of_phases(p.images, p.layers, looking_layers()));
  }

  // The next phase reads what this one has written, rows of ``width``.
  __device__ void next_phase(int width) {
    read = written;
    written += chunks * kRows * width / 2;
  }

  template <int kSlices>
  __device__ Element* stage_at(int row) {
    return reinterpret_cast<Element*>(shared.stage) + row * (kSlices * kSlice + 8);
  }

  // Mean and squared deviations of each staged row to those who finish the row: a warp's, of the rows' products with ones
  // and with each other.
  template <int kSlices>
  __device__ void send_moments() {
    constexpr float kWidth = kSlices * kSlice;
    uint32_t ones = pack<Element>(1.f, 1.f);
    float sums[2 * kImages][4] = {}, squares[2 * kImages][2][4] = {};
    Element const* rows = stage_at<kSlices>(lane % 16) + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < kSlices * kSteps; ++i)
#pragma unroll
      for (int m = 0; m < 2 * kImages; ++m) {
        uint32_t a[4];
        ldmatrix(a, rows + m * 16 * (kSlices * kSlice + 8) + i * 16);
        mma<Element>(sums[m], a, ones, ones);
        mma<Element>(squares[m][0], a, a[0], a[2]);
        mma<Element>(squares[m][1], a, a[1], a[3]);
      }
    // which of the lane's two columns is its row's own
    bool odd = lane / 4 % 2;
    if (lane % 4 != lane / 8) return;
#pragma unroll
    for (int m = 0; m < 2 * kImages; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float mean = sums[m][2 * half] * (1.f / kWidth);
        float square = odd ? squares[m][half][2 * half + 1] : squares[m][half][2 * half];
        send(&shared.moments[measuring % 2][share<kWide>()][m / 2 * kOwn<kWide> + lane / 4], &shared.measured[measuring % 2],
             way_to_rank(&shared, (m % 2 * 2 + half) * kGroups<kWide> + group()),
             make_float2(mean, fmaxf(square - kWidth * mean * mean, 0.f)));
      }
  }

  // ---- products ----

  // Eight columns of sixteen rows, the m-th of the chunk's, to those who finish them, who have it at ``to``.
  template <int kSplit>
  __device__ void send_part(float const (&part)[4], int m, float* to) {
    // of two neighbours each gets four columns, of one of their two rows
    bool odd = lane % 2;
    float x = __shfl_xor_sync(0xffffffffu, odd ? part[0] : part[2], 1);
    float y = __shfl_xor_sync(0xffffffffu, odd ? part[1] : part[3], 1);
    float4 four = odd ? float4{x, y, part[2], part[3]} : float4{part[0], part[1], x, y};
    Way way = kSplit == kWide ? (m % 2 ? to_wide[1] : to_wide[0]) : (m % 2 ? to_narrow[1] : to_narrow[0]);
    send_or_store(reinterpret_cast<float4*>(to + m / 2 * kOwn<kSplit> * kTile), &shared.arrived[buffer()], way, four);
  }

  // Where the lane's part of a tile of an image goes, of ``tiles`` that ``source`` has parts of.
  template <int kSplit>
  __device__ float* part_at(int source, int tiles, int tile) {
    return shared.parts[buffer()] + ((source * tiles + tile) * kImages * kOwn<kSplit> + lane / 4 % kOwn<kSplit>) * kTile +
           lane % 4 / 2 * 4;
  }

  // Parts of a chunk's rows' product with the block's ``own`` tiles, whose slots, ``count`` with the vectors', are next in
  // the ring, sent to who finishes them. The block's K of the rows goes through the stage, of four slices two at a time: the
  // others come meanwhile. A warp has kTurns tiles; of each two slices of four it has one.
  template <int kSlices, int kSplit>
  __device__ void multiply(int chunk, int own, int count) {
    constexpr int kHalves = kSlices == 4 ? 2 : 1, kChains = kSlices == 1 ? 2 : 1;
    constexpr int kTurns = kSlices == 1 ? 1 : kSlices == 2 && kImages == 1 ? 4 : 2;
    constexpr int kWidth = kSplit * kSlices * kSlice, kOfRow = kSlices / kHalves * kSlice / 8;
    constexpr int kOfImage = (kOfRow + kLanes - 1) / kLanes;
    int row = thread / kLanes, piece = thread % kLanes;
    uint32_t const* from = read + ((chunk * kRows + row) * kWidth + share<kSplit>() * kSlices * kSlice + piece * 8) / 2;
    auto at = [&](int i) { return from + (i / kOfImage * kQueries * kWidth + i % kOfImage * kLanes * 8) / 2; };
    auto exists = [&](int i) { return kOfRow % kLanes == 0 || i % kOfImage * kLanes + piece < kOfRow; };
    uint4 pieces[kImages * kOfImage];
    if (kHalves == 2 && !kMany) rest(kRest);
    ask(pieces, at, exists);
    int first = warp / kHalves * kTurns, half = warp % kHalves;
    float chains[kChains][kTurns][2 * kImages][4] = {};
    Element const* rows = stage_at<kSlices>(lane % 16) + lane / 16 * 8;
#pragma unroll
    for (int begin = 0; begin < kSlices; begin += kSlices / kHalves) {
      receive(pieces, at, exists);
#pragma unroll
      for (int i = 0; i < kImages * kOfImage; ++i)
        if (exists(i))
          *reinterpret_cast<uint4*>(stage_at<kSlices>(i / kOfImage * kQueries + row) + begin * kSlice +
                                    (i % kOfImage * kLanes + piece) * 8) = pieces[i];
      if (begin == 0) wait_for_slots(count);
      __syncthreads();
      if (begin + kSlices / kHalves < kSlices) {
        from += kOfRow * 8 / 2;
        ask(pieces, at, exists);
      }
      if (first >= own) continue;
#pragma unroll
      for (int slice = begin + half; slice < begin + kSlices / kHalves; slice += kHalves) {
        uint2 const* slots[kTurns];
#pragma unroll
        for (int j = 0; j < kTurns; ++j)
          slots[j] = reinterpret_cast<uint2 const*>(slot_of(1 + min(first + j, own - 1) * kSlices + slice)) + lane;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          uint32_t a[2 * kImages][4];
#pragma unroll
          for (int m = 0; m < 2 * kImages; ++m)
            ldmatrix(a[m], rows + m * 16 * (kSlices * kSlice + 8) + slice * kSlice + i * 16);
#pragma unroll
          for (int j = 0; j < kTurns; ++j) {
            uint2 b = slots[j][i * 32];
#pragma unroll
            for (int m = 0; m < 2 * kImages; ++m) mma<Element>(chains[i % kChains][j][m], a[m], b.x, b.y);
          }
        }
      }
    }
    auto& acc = chains[0];
    if constexpr (kChains == 2) {
#pragma unroll
      for (int m = 0; m < 2 * kImages; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][m][i] += chains[1][0][m][i];
    }
    if constexpr (kHalves == 2) share_halves(acc, first, half);
    float* to = part_at<kSplit>(share<kSplit>(), own, first);
#pragma unroll
    for (int j = 0; j < kTurns; ++j)
      if (first + j < own)
#pragma unroll
        for (int m = 0; m < 2 * kImages; ++m)
          if (kHalves == 1 || m % 2 == half) send_part<kSplit>(acc[j][m], m, to + j * kImages * kOwn<kSplit> * kTile);
  }

  // Two warps have a half of two tiles' sums each: one adds up those of an image's first sixteen rows, one the others'.
  __device__ void share_halves(float (&acc)[2][2 * kImages][4], int first, int half) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int m = 0; m < 2 * kImages; ++m)
        if (m % 2 != half)
          shared.halves[first + j][m / 2][m % 2][lane] = {acc[j][m][0], acc[j][m][1], acc[j][m][2], acc[j][m][3]};
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int m = 0; m < 2 * kImages; ++m)
        if (m % 2 == half) {
          float4 x = shared.halves[first + j][m / 2][m % 2][lane];
          acc[j][m][0] += x.x, acc[j][m][1] += x.y, acc[j][m][2] += x.z, acc[j][m][3] += x.w;
        }
  }

  // Which four columns of which row of the block's a thread finishes in a turn.
  struct Place {
    int tile, own, half;
    bool exists;
    __device__ int column() const { return tile * kTile + half * 4; }
  };
  template <int kSplit>
  __device__ Place place_of(int turn, int tiles) {
    constexpr int kAll = kImages * kOwn<kSplit>;
    int position = turn * kThreads + thread, tile = position / (2 * kAll);
    return {tile < tiles ? tile : 0, position / 2 % kAll, position % 2, tile < tiles};
  }
  // Of its image.
  template <int kSplit>
  __device__ int row_of(Place const& place) { return share<kSplit>() * kOwn<kSplit> + place.own % kOwn<kSplit>; }

  template <int kSplit>
  __device__ uint32_t* words_at(int chunk, Place const& place, int width, int column) {
    int row = chunk * kRows + place.own / kOwn<kSplit> * kQueries + row_of<kSplit>(place);
    return written + (row * width + column) / 2;
  }

  template <int kSplit>
  __device__ float4 part_of(int here, Place const& place, int source, int tiles) {
    return reinterpret_cast<float4 const*>(
        shared.parts[here] + ((source * tiles + place.tile) * kImages * kOwn<kSplit> + place.own) * kTile)[place.half];
  }

  template <int kSplit>
  __device__ float4 total_of(int here, Place const& place, int tiles) {
    float4 x[kSplit];
#pragma unroll
    for (int source = 0; source < kSplit; ++source) x[source] = part_of<kSplit>(here, place, source, tiles);
#pragma unroll
    for (int step = kSplit / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < step; ++i)
        x[i].x += x[i + step].x, x[i].y += x[i + step].y, x[i].z += x[i + step].z, x[i].w += x[i + step].w;
    return x[0];
  }

  // ---- sub-layers ----

  __device__ void expect_moments() {
    if (expects()) expect_bytes(&shared.measured[measuring % 2], kWide * kImages * kOwn<kWide> * int(sizeof(float2)));
  }

  // Mean and 1 / deviation of the thread's row, when all moments of it are there; kept for what adds the row.
  __device__ float2 finish_norm(int chunk, int own) {
    static_assert(kWide == 4);
    wait_for_barrier(&shared.measured[measuring % 2], measuring / 2 % 2);
    float2 const* slices = &shared.moments[measuring++ % 2][0][own];
    constexpr int kNext = kImages * kOwn<kWide>;
    float2 a = slices[0], b = slices[kNext], c = slices[2 * kNext], d = slices[3 * kNext];
    float mean = ((a.x + b.x) + (c.x + d.x)) * (1.f / kWide);
    float squares = (a.y + b.y) + (c.y + d.y);
    a.x -= mean, b.x -= mean, c.x -= mean, d.x -= mean;
    float away = (a.x * a.x + b.x * b.x) + (c.x * c.x + d.x * d.x);
    float2 norm = {mean, rsqrtf((squares + kHidden / kWide * away) * (1.f / kHidden) + p.eps)};
    if (thread == 2 * own) shared.norms[chunk][own] = norm;
    return norm;
  }

  // finish(place, four columns) of LayerNorm(rows) weight^T + bias; without tiles the rows are measured alone.
  template <class Finish>
  __device__ void linear_of_norm(int chunk, int own, Finish finish) {
    constexpr int kSlices = kHidden / kWide / kSlice, kAll = kImages * kOwn<kWide>;
    static_assert(kThreads / 2 % kAll == 0);  // so a thread's row is the same in all turns
    int row = thread / 2 % kAll;
    expect_moments();
    if (own > 0) expect_parts((kWide - 1) * kAll * own * kTile * int(sizeof(float)));
    multiply<kSlices, kWide>(chunk, own, wide_slots(own));
    if (warp == kWarps - 1) send_moments<kSlices>();
    if (own == 0) {
      finish_norm(chunk, row);
      __syncthreads();  // all warps have read the stage
      return;
    }
    parts_are_sent();
    Place places[kImages];
    float4 sums[kImages], bias[kImages];
#pragma unroll
    for (int turn = 0; turn < kImages; ++turn) {
      Place place = places[turn] = place_of<kWide>(turn, own);
      sums[turn] = vector_at(slot_of(0), 0, place.column()), bias[turn] = vector_at(slot_of(0), 1, place.column());
    }
    if (chunk + 1 == chunks) slots_are_read();
    float2 norm = finish_norm(chunk, row);
    int here = wait_for_parts();
    if (chunk + 1 == chunks) leave_slots(wide_slots(own));
#pragma unroll
    for (int turn = 0; turn < kImages; ++turn) {
      float4 x = total_of<kWide>(here, places[turn], own);
      x.x = (x.x - norm.x * sums[turn].x) * norm.y + bias[turn].x;
      x.y = (x.y - norm.x * sums[turn].y) * norm.y + bias[turn].y;
      x.z = (x.z - norm.x * sums[turn].z) * norm.y + bias[turn].z;
      x.w = (x.w - norm.x * sums[turn].w) * norm.y + bias[turn].w;
      finish(places[turn], x);
    }
  }

  __device__ static int wide_slots(int own) { return own == 0 ? 0 : 1 + own * (kHidden / kWide / kSlice); }

  // A sub-layer up to what its residual is added to: attention of the rows to each other, or to the images as the
  // ``looking``-th does, or GELU(LayerNorm(rows) weight^T + bias). ``in_first``: the first layer's, of which cross-attention
  // is given its queries, all images' alike.
  __device__ void first_of_sub_layer(Kind kind, int looking, bool in_first) {
    bool feeds = kind == kFeedForward, crosses = kind == kCrossAttention, given = in_first && crosses;
    Tiles tiles = wide;
    if (!feeds) {
      int count = attends ? (crosses ? 1 : 3) * kHeadTiles / kGroups<kWide> : 0;
      tiles = {group() * count, count};
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk > 0) wait_for_readers();
      bool staged = given && chunk == 0;
      if (crosses && attends && !staged) stage_tokens(chunk, looking, first_token());
      if (given) {
        if (attends && !staged) stage_given_queries();
      } else {
        if (attends && !feeds) expect_gathered(crosses ? kRows : 2 * kRows + kImages * kOwn<kNarrow>);
        linear_of_norm(chunk, tiles.count, [&](Place const& place, float4 x) {
          if (!feeds)
            send_to_heads(tiles.first + place.tile, place, pack<Element>(x), crosses);
          else if (place.exists)
            store_words(words_at<kWide>(chunk, place, kIntermediate, tiles.first * kTile + place.column()),
                        pack<Element>({gelu<Element>(x.x), gelu<Element>(x.y), gelu<Element>(x.z), gelu<Element>(x.w)}));
        });
        if (attends && !feeds) wait_for_gathered();
      }
      if (attends && crosses) {
        expect_parts(kImages * kOwn<kNarrow> * ((kCluster - 1) * kHeadColumns * int(sizeof(float)) +
                                                kCluster * kHeadColumns / kHeaddim * int(sizeof(float2))));
        attend_to_tokens(chunk, looking);
        finish_attention(chunk, wait_for_parts());
      } else if (attends && !feeds) {
        attend_to_rows(chunk);
      }
      if (kMany) arrive_after_reading();
    }
    if (given) issue(p.ring - kLeastPages);
    next_phase(feeds ? kIntermediate : kHidden);
  }

  // The rows that layer 0 adds to.
  __device__ uint2 given_words(Place const& place) {
    int at = row_of<kNarrow>(place) * kHidden + narrow.first * kTile + place.column();
    return __ldg(reinterpret_cast<uint2 const*>(static_cast<uint32_t const*>(p.rows) + at / 2));
  }

  // What their LayerNorm would be is given.
  __device__ void start_with_rows(Place const& place, uint2 words) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (place.exists) shared.residual[chunk][thread] = words;
      if (thread < kImages * kOwn<kWide>) shared.norms[chunk][thread] = {0.f, 1.f};
    }
  }

  // The rest of a sub-layer: what was written weight^T + bias + LayerNorm of the rows before, which begin it.
  template <int kSlices>
  __device__ void linear_and_residual() {
    static_assert(kMostNarrow * kImages * kOwn<kNarrow> * 2 <= kThreads);
    int own = narrow.count, count = 1 + own * kSlices;
    Place place = place_of<kNarrow>(0, own);
    // of the block's rows in the product before, which has eight
    int row = place.own / kOwn<kNarrow> * kOwn<kWide> + group() * kOwn<kNarrow> + place.own % kOwn<kNarrow>;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk == 0) wait_for_readers();
      expect_parts((kNarrow - 1) * kImages * kOwn<kNarrow> * own * kTile * int(sizeof(float)));
      multiply<kSlices, kNarrow>(chunk, own, count);
      parts_are_sent();
      float4 bias = vector_at(slot_of(0), 0, place.column()), weight = vector_at(slot_of(0), 1, place.column());
      float4 norm_bias = vector_at(slot_of(0), 2, place.column());
      float4 residual = unpack<Element>(place.exists ? shared.residual[chunk][thread] : uint2{0, 0});
      float2 norm = shared.norms[chunk][row];
      bias.x += (residual.x - norm.x) * norm.y * weight.x + norm_bias.x;
      bias.y += (residual.y - norm.x) * norm.y * weight.y + norm_bias.y;
      bias.z += (residual.z - norm.x) * norm.y * weight.z + norm_bias.z;
      bias.w += (residual.w - norm.x) * norm.y * weight.w + norm_bias.w;
      if (chunk + 1 == chunks) slots_are_read();
      int here = wait_for_parts();
      if (chunk + 1 == chunks) leave_slots(count);
      if (place.exists) {
        float4 x = total_of<kNarrow>(here, place, own);
        uint2 words = pack<Element>({x.x + bias.x, x.y + bias.y, x.z + bias.z, x.w + bias.w});
        store_words(words_at<kNarrow>(chunk, place, kHidden, narrow.first * kTile + place.column()), words);
        shared.residual[chunk][thread] = words;
      }
    }
    next_phase(kHidden);
  }

  // ---- attention ----

  __device__ static float scale() { return rsqrtf(float(kHeaddim)) * 1.44269504f; }

  __device__ Element* queries_of(int image) {
    return reinterpret_cast<Element*>(shared.queries) + image * kQueries * kHeadStride;
  }
  __device__ Element* keys_of(int image) { return reinterpret_cast<Element*>(shared.keys) + image * kTokens * kHeadStride; }
  __device__ Element* values_of(int image) {
    return reinterpret_cast<Element*>(shared.values) + image * kTokens * kHeadStride;
  }

  // scores become exp2((scores - highest) * scale), of which the rows' sums are added to total.
  template <int kColumns>
  __device__ static void exponentiate(float (&scores)[kColumns][4], int half, float highest, float& total) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[n][half * 2 + i];
        score = exp2_approx((score - highest) * scale());
        total += score;
      }
  }

  // scores += sixteen rows of queries, of which the lane loads the one at ``q``, times kColumns * 8 rows of k.
  template <int kColumns>
  __device__ void score(float (&scores)[kColumns][4], Element const* q, Element const* k) {
    Element const* keys = k + (lane % 8 + lane / 16 * 8) * kHeadStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kHeaddim; step += 16) {
      uint32_t a[4];
      ldmatrix(a, q + step + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        uint32_t b[4];
        ldmatrix(b, keys + n * 8 * kHeadStride + step);
        mma<Element>(scores[n], a, b[0], b[1]);
        mma<Element>(scores[n + 1], a, b[2], b[3]);
      }
    }
  }

  // The weights of 16 columns as the left side of a product.
  __device__ static void weights_of(uint32_t (&a)[4], float const (&first)[4], float const (&second)[4]) {
    a[0] = pack<Element>(first[0], first[1]), a[1] = pack<Element>(first[2], first[3]);
    a[2] = pack<Element>(second[0], second[1]), a[3] = pack<Element>(second[2], second[3]);
  }

  // A tile of the cluster's queries, keys and values, four columns a lane, to all blocks; where it is not ``crosses``,
  // queries only to the block that asks with the row.
  __device__ void send_to_heads(int tile, Place const& place, uint2 words, bool crosses) {
    uint2 others = {__shfl_xor_sync(0xffffffffu, words.x, 1), __shfl_xor_sync(0xffffffffu, words.y, 1)};
    if (!place.exists) return;
    uint4 columns = place.half ? uint4{others.x, others.y, words.x, words.y} : uint4{words.x, words.y, others.x, others.y};
    int image = place.own / kOwn<kWide>;
    Element* to = tile < kHeadTiles ? queries_of(image) : tile < 2 * kHeadTiles ? keys_of(image) : values_of(image);
    to += row_of<kWide>(place) * kHeadStride + tile % kHeadTiles * kTile;
    int asks = row_of<kWide>(place) / kOwn<kNarrow>;
    bool to_one = !crosses && tile < kHeadTiles;
#pragma unroll
    for (int i = place.half; i < kCluster; i += 2)
      if (!to_one || i == asks) send(reinterpret_cast<uint4*>(to), &shared.gathered, way_to_rank(&shared, i), columns);
  }

  // Of the block's queries a warp has eight columns of their attention to each other.
  __device__ void attend_to_rows(int chunk) {
    constexpr int kOwnRows = kOwn<kNarrow>;
    static_assert(kHeadTiles == kWarps);
    int head = warp / (kHeaddim / kTile) * kHeaddim;
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      float scores[4][4] = {};
      score(scores, queries_of(image) + (rank * kOwnRows + lane % kOwnRows) * kHeadStride + head, keys_of(image) + head);
      float highest = -INFINITY, total = 0.f;
#pragma unroll
      for (int n = 0; n < 4; ++n) highest = fmaxf(highest, fmaxf(scores[n][0], scores[n][1]));
      exponentiate(scores, 0, highest_of_lanes<1, 4>(highest), total);
      float inverse = reciprocal(sum_of_lanes<1, 4>(total));
#pragma unroll
      for (int n = 0; n < 4; ++n) scores[n][2] = scores[n][3] = 0.f;  // of rows that are others again
      float out[4] = {};
      uint32_t a[4], b[4];
      ldmatrix_transposed(b, values_of(image) + lane * kHeadStride + warp * kTile);
      weights_of(a, scores[0], scores[1]);
      mma<Element>(out, a, b[0], b[1]);
      weights_of(a, scores[2], scores[3]);
      mma<Element>(out, a, b[2], b[3]);
      uint32_t word = pack<Element>(out[0] * inverse, out[1] * inverse);
      uint32_t other = __shfl_xor_sync(0xffffffffu, word, 1);
      if (lane / 4 < kOwnRows && lane % 2 == 0) {
        int row = chunk * kRows + image * kQueries + rank * kOwnRows + lane / 4;
        int column = cluster * kHeadColumns + warp * kTile + lane % 4 * 2;
        store_words(written + (row * kHidden + column) / 2, {word, other});
      }
    }
  }

  // Queries of layer 0 to every image's, which ask the same, on their way.
  __device__ void stage_given_queries() {
    constexpr int kOfRow = kHeadColumns / 8;
    for (int i = thread; i < kRows * kOfRow; i += kThreads) {
      int row = i / kOfRow, column = i % kOfRow * 8;
      copy_async(queries_of(0) + row * kHeadStride + column, static_cast<Element const*>(p.queries) +
                                                                 row % kQueries * kHidden + cluster * kHeadColumns + column);
    }
  }

  // The block's tokens of every image.
  __device__ int tokens_of_block() { return (p.tokens + kCluster - 1) / kCluster; }
  __device__ int first_token() { return min(rank * tokens_of_block(), p.tokens); }
  __device__ int end_token() { return min(first_token() + tokens_of_block(), p.tokens); }

  // An image's keys and values from ``first`` on, on their way; filled up with zeros to what is attended to at once.
  __device__ void stage_tokens(int chunk, int looking, int first) {
    constexpr int kOfToken = 2 * kHeadColumns / 8, kStep = kThreads / kOfToken;
    int count = min(kTokens, end_token() - first), filled = (count + kTokensAtOnce - 1) / kTokensAtOnce * kTokensAtOnce;
    int column = thread % (kOfToken / 2) * 8, is_value = thread / (kOfToken / 2) % 2;
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      Element* to = (is_value ? values_of(image) : keys_of(image)) + column;
      int64_t row = int64_t(min(chunk * kImages + image, p.images - 1)) * p.tokens + first;
      Element const* from = static_cast<Element const*>(p.keys_values) + row * p.width +
                            (looking * 2 + is_value) * kHidden + cluster * kHeadColumns + column;
#pragma unroll 1
      for (int token = thread / kOfToken; token < filled; token += kStep)
        if (token < count)
          copy_async(to + token * kHeadStride, from + token * p.width);
        else
          *reinterpret_cast<uint4*>(to + token * kHeadStride) = uint4{0, 0, 0, 0};
    }
  }

  // The queries' attention to the block's tokens, sent to those who finish the rows. A warp has sixteen columns of sixteen
  // queries.
  __device__ void attend_to_tokens(int chunk, int looking) {
    constexpr int kColumns = 2 * kHeadColumns / kWarps, kGroups = kTokensAtOnce / 8;
    static_assert(kColumns == 16);
    int m = warp % 2, column = warp / 2 * kColumns, head = column / kHeaddim * kHeaddim;
    struct {
      float out[2][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
    } attended[kImages];
    for (int first = first_token(); first < end_token(); first += kTokens) {
      int count = min(kTokens, end_token() - first);
      if (first > first_token()) {
        __syncthreads();
        stage_tokens(chunk, looking, first);
      }
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int image = 0; image < kImages; ++image) {
        auto& [out, highest, total] = attended[image];
        Element const* q = queries_of(image) + (m * 16 + lane % 16) * kHeadStride + head;
#pragma unroll 1
        for (int token = 0; token < count; token += kTokensAtOnce) {
          float scores[kGroups][4] = {};
          score(scores, q, keys_of(image) + token * kHeadStride + head);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float higher = highest[half];
#pragma unroll
            for (int i = 0; i < 2 * kGroups; ++i) {
              float& x = scores[i / 2][half * 2 + i % 2];
              if (token + i / 2 * 8 + lane % 4 * 2 + i % 2 >= count) x = -INFINITY;
              higher = fmaxf(higher, x);
            }
            higher = highest_of_lanes<1, 4>(higher);
            float shrink = exp2_approx((highest[half] - higher) * scale());
            highest[half] = higher;
            total[half] *= shrink;
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) out[tile][half * 2] *= shrink, out[tile][half * 2 + 1] *= shrink;
            exponentiate(scores, half, higher, total[half]);
          }
          Element const* values = values_of(image) + (token + lane % 16) * kHeadStride + column + lane / 16 * 8;
#pragma unroll
          for (int n = 0; n < kGroups; n += 2) {
            uint32_t a[4], b[4];
            weights_of(a, scores[n], scores[n + 1]);
            ldmatrix_transposed(b, values + n * 8 * kHeadStride);
            mma<Element>(out[0], a, b[0], b[1]);
            mma<Element>(out[1], a, b[2], b[3]);
          }
        }
      }
    }
    float* to = part_at<kNarrow>(rank, kHeadTiles, column / 8);
#pragma unroll
    for (int image = 0; image < kImages; ++image) {
      auto& [out, highest, total] = attended[image];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        send_part<kNarrow>(out[tile], image * 2 + m, to + tile * kImages * kOwn<kNarrow> * kTile);
      if (column > head) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_of_lanes<1, 4>(total[half]);
        int row = m * 16 + half * 8 + lane / 4, own = image * kOwn<kNarrow> + row % kOwn<kNarrow>;
        if (lane % 4 == 0)
          send(&shared.tops[buffer()][rank][head / kHeaddim][own], &shared.arrived[buffer()],
               way_to_rank(&shared, row / kOwn<kNarrow>), make_float2(highest[half], sum));
      }
    }
    wait_for_copies();  // of queries, where the block has no token
    parts_are_sent();
  }

  __device__ void finish_attention(int chunk, int here) {
    Place place = place_of<kNarrow>(0, kHeadTiles);
    if (!place.exists) return;
    auto const& tops = shared.tops[here];
    int head = place.tile / (kHeaddim / kTile);
    float highest = -INFINITY, total = 0.f;
#pragma unroll
    for (int i = 0; i < kCluster; ++i) highest = fmaxf(highest, tops[i][head][place.own].x);
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kCluster; ++i) {
      float2 top = tops[i][head][place.own];
      float4 x = part_of<kNarrow>(here, place, i, kHeadTiles);
      float weight = exp2_approx((top.x - highest) * scale());
      total += weight * top.y;
      sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
    }
    float inverse = reciprocal(total);
    store_words(words_at<kNarrow>(chunk, place, kHidden, cluster * kHeadColumns + place.column()),
                pack<Element>({sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse}));
  }

  // LayerNorm of the last rows, a row a warp.
  __device__ void write() {
    constexpr int kOfLane = kHidden / 8 / 32;
    int rows = p.images * kQueries, row = blockIdx.x + gridDim.x * warp;
    if (row >= rows) return;
    float2 weight[kOfLane][4], bias[kOfLane][4];
    auto column_of = [&](int i) { return (i * 32 + lane) * 8; };
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weight[i][j] = __ldg(reinterpret_cast<float2 const*>(p.norm + column_of(i)) + j);
        bias[i][j] = __ldg(reinterpret_cast<float2 const*>(p.norm + kHidden + column_of(i)) + j);
      }
    for (; row < rows; row += gridDim.x * kWarps) {
      uint4 found[kOfLane];
      auto at = [&](int i) { return read + (row * kHidden + column_of(i)) / 2; };
      auto all = [](int) { return true; };
      ask(found, at, all);
      receive(found, at, all);
      float2 x[kOfLane][4];
      float mean = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        uint32_t words[4] = {found[i].x, found[i].y, found[i].z, found[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) x[i][j] = unpack<Element>(words[j]), mean += x[i][j].x + x[i][j].y;
      }
      mean = sum_of_lanes<1, 32>(mean) * (1.f / kHidden);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i][j].x -= mean, x[i][j].y -= mean;
          squares += x[i][j].x * x[i][j].x + x[i][j].y * x[i][j].y;
        }
      float rstd = rsqrtf(sum_of_lanes<1, 32>(squares) * (1.f / kHidden) + p.eps);
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = pack<Element>(x[i][j].x * rstd * weight[i][j].x + bias[i][j].x,
                                   x[i][j].y * rstd * weight[i][j].y + bias[i][j].y);
        *reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + int64_t(row) * kHidden + column_of(i)) =
            uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
};

}  // namespace qformer_fast
