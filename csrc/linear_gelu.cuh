// A product with bias and exact GELU in its epilogue, forward and backward: CUTLASS's warp-specialized pingpong kernel
// for Hopper. Free of torch.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/numeric_conversion.h>

#include "gelu.cuh"
#include "launch.cuh"

namespace qformer_fast {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// ---- the epilogue -----------------------------------------------------------------------------------------------

enum class Direction {
  kForward,   // aux = accumulator, out = gelu(accumulator + bias)
  kBackward,  // aux = gelu(c + bias), out = accumulator * gelu'(c + bias), and out's column sums before rounding
};

// A node of CUTLASS's epilogue tree that stores two results a tile: one returned, one through the auxiliary store.
template <Direction kDirection, class Element, int kThreads, class TileShape, class EpilogueTile, class AuxStore>
struct GeluNode : AuxStore {
  static constexpr int kTileM = size<0>(TileShape{});
  static constexpr int kTileN = size<1>(TileShape{});
  static constexpr int kSubtileN = size<1>(EpilogueTile{});
  static constexpr int kSubtilesM = kTileM / size<0>(EpilogueTile{});
  static constexpr int kWarps = kThreads / 32;
  static constexpr bool kColumnSums = kDirection == Direction::kBackward;

  struct SharedStorage {
    typename AuxStore::SharedStorage aux;
    alignas(16) float sums[kColumnSums ? kWarps * kTileN : 4];
  };
  struct Arguments {
    typename AuxStore::Arguments aux;
    float* column_sums = nullptr;  // (tiles of rows, N)
  };
  struct Params {
    typename AuxStore::Params aux;
    float* column_sums;
  };

  template <class Shape_>
  static constexpr Params to_underlying_arguments(Shape_ const& shape, Arguments const& args, void* workspace) {
    return {AuxStore::to_underlying_arguments(shape, args.aux, workspace), args.column_sums};
  }
  template <class Shape_>
  static bool can_implement(Shape_ const& shape, Arguments const& args) {
    return AuxStore::can_implement(shape, args.aux);
  }
  template <class Shape_>
  static size_t get_workspace_size(Shape_ const&, Arguments const&) {
    return 0;
  }
  template <class Shape_>
  static cutlass::Status initialize_workspace(Shape_ const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE GeluNode() {}
  CUTLASS_HOST_DEVICE GeluNode(Params const& params, SharedStorage const& storage)
      : AuxStore(params.aux, storage.aux),
        column_sums(params.column_sums),
        shared_sums(const_cast<float*>(storage.sums)) {}

  float* column_sums = nullptr;
  float* shared_sums = nullptr;

  template <class Base>
  struct Callbacks : Base {
    CUTLASS_DEVICE Callbacks(Base&& base, float* column_sums_, float* shared_sums_, int thread_, int columns_)
        : Base(cute::move(base)),
          column_sums(column_sums_),
          shared_sums(shared_sums_),
          thread(thread_),
          columns(columns_) {}

    float* column_sums;
    float* shared_sums;
    int thread;
    int columns;
    float sums[kColumnSums ? kSubtileN / 4 : 1];

    template <class Accumulator, int kFragment, class Bias>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, kFragment> const& accumulator, int v, int, int,
                              cutlass::Array<Bias, kFragment> const& bias) {
      static_assert(kDirection == Direction::kForward);
      cutlass::Array<float, kFragment> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFragment; ++i) out[i] = gelu<Element>(accumulator[i] + bias[i]);
      store(cutlass::NumericArrayConverter<Element, float, kFragment>{}(accumulator), v);
      return cutlass::NumericArrayConverter<Element, float, kFragment>{}(out);
    }

    template <class Accumulator, int kFragment, class Source, class Bias>
    CUTLASS_DEVICE auto visit(cutlass::Array<Accumulator, kFragment> const& accumulator, int v, int subtile_m, int,
                              cutlass::Array<Source, kFragment> const& c, cutlass::Array<Bias, kFragment> const& bias) {
      static_assert(kDirection == Direction::kBackward);
      static_assert(kFragment == kSubtileN / 2, "a thread holds two rows of a subtile's columns");
      if (subtile_m == 0) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSubtileN / 4; ++i) sums[i] = 0.f;
      }
      cutlass::Array<float, kFragment> activation, dup;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kFragment; ++i) {
        dup[i] = accumulator[i] * gelu_derivative<Element>(float(c[i]) + bias[i], activation[i]);
        sums[i / 4 * 2 + i % 2] += dup[i];
      }
      store(cutlass::NumericArrayConverter<Element, float, kFragment>{}(activation), v);
      return cutlass::NumericArrayConverter<Element, float, kFragment>{}(dup);
    }

    template <int kFragment>
    CUTLASS_DEVICE void store(cutlass::Array<Element, kFragment> const& values, int v) {
      recast<cutlass::Array<Element, kFragment>>(coalesce(this->tC_rAux))(v) = values;
    }

    // Eight column sums a thread become one: the eight rows of lanes exchange halves.
    template <class Buffer, class Sync, class Results>
    CUTLASS_DEVICE void reduce(Buffer&&, Sync const&, int subtile_m, int subtile_n, bool, Results) {
      if constexpr (kColumnSums) {
        if (subtile_m != kSubtilesM - 1) return;
        int lane = thread % 32;
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kSubtileN / 32; ++part) {
          float v[8];
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 8; ++i) v[i] = sums[part * 8 + i];
          CUTLASS_PRAGMA_UNROLL
          for (int width = 4; width >= 1; width /= 2) {
            bool upper = lane & (width * 4);
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < width; ++k) {
              float sent = upper ? v[k] : v[k + width];
              float kept = upper ? v[k + width] : v[k];
              v[k] = kept + __shfl_xor_sync(0xffffffffu, sent, width * 4);
            }
          }
          int i = lane / 4;
          int column = subtile_n * kSubtileN + part * 32 + i / 2 * 8 + lane % 4 * 2 + i % 2;
          shared_sums[thread / 32 * kTileN + column] = v[0];
        }
      }
    }

    CUTLASS_DEVICE void end() {
      if constexpr (kColumnSums) {
        cutlass::arch::NamedBarrier::sync(kThreads, cutlass::arch::ReservedNamedBarriers::EpilogueBarrier);
        for (int n = thread; n < kTileN; n += kThreads) {
          float sum = 0.f;
          CUTLASS_PRAGMA_UNROLL
          for (int warp = 0; warp < kWarps; ++warp) sum += shared_sums[warp * kTileN + n];
          if (n < columns) column_sums[n] = sum;
        }
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    auto base = AuxStore::template get_consumer_store_callbacks<kReferenceSource>(args);
    auto [M, N, K, L] = args.problem_shape_mnkl;
    auto [m, n, k, l] = args.tile_coord_mnkl;
    float* sums_of_tile = nullptr;
    int columns = 0;
    if constexpr (kColumnSums) {
      sums_of_tile = column_sums + size_t(m) * N + n * kTileN;
      columns = m * kTileM < M ? int(N) - n * kTileN : 0;
    }
    return Callbacks<decltype(base)>(cute::move(base), sums_of_tile, shared_sums, args.thread_idx, columns);
  }
};

// ---- the kernel -------------------------------------------------------------------------------------------------

// a (M, K) rows; b (N, K) rows forward, (K, N) rows backward; out, aux and c (M, N) rows; bias (N,).
template <Direction kDirection, class Element, class BiasElement>
struct LinearGelu {
  static constexpr bool kBackward = kDirection == Direction::kBackward;
  static constexpr int kThreads = 128;
  static constexpr int kStagesC = 2;
  static constexpr int kStagesD = 2;
  static constexpr int kAlignment = 8;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using TileShape = Shape<Int<kRowsPerSum>, Int<kBackward ? 128 : 192>, _64>;
  using Cluster = cute::conditional_t<kBackward, Shape<_2, _1, _1>, Shape<_1, _2, _1>>;
  using EpilogueTile = Shape<_64, Int<kBackward ? 64 : 32>>;
  static constexpr int kFragment = size(EpilogueTile{}) / kThreads;

  using RowMajor = cutlass::layout::RowMajor;
  using LayoutB = cute::conditional_t<kBackward, RowMajor, cutlass::layout::ColumnMajor>;
  using StrideRows = cutlass::detail::TagToStrideC_t<RowMajor>;
  using ElementC = cute::conditional_t<kBackward, Element, void>;

  using SharedAtom = decltype(cutlass::epilogue::collective::detail::sm90_get_epilogue_smem_swizzle_layout_atom<
                              StrideRows, Element, EpilogueTile>());
  using CopyToShared = decltype(cutlass::epilogue::collective::detail::sm90_get_smem_store_op_for_accumulator<
                                StrideRows, Element, EpilogueTile>());
  using AuxStore = fusion::Sm90AuxStore<kStagesD, EpilogueTile, Element, kRound, StrideRows, SharedAtom, CopyToShared,
                                        kAlignment, false>;
  using Node = GeluNode<kDirection, Element, kThreads, TileShape, EpilogueTile, AuxStore>;
  using Bias = fusion::Sm90RowBroadcast<0, TileShape, BiasElement, float, Stride<_0, _1, _0>,
                                        16 / sizeof(BiasElement), false>;
  using Tree = cute::conditional_t<kBackward, fusion::Sm90EVT<Node, fusion::Sm90SrcFetch<Element>, Bias>,
                                   fusion::Sm90EVT<Node, Bias>>;

  using Policy = cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kFragment, false, true>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::detail::Sm90TmaBuilderImpl<
      TileShape, EpilogueTile, float, float, ElementC, RowMajor, kAlignment, Element, RowMajor, kAlignment,
      Tree, Policy>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, LayoutB, kAlignment,
      float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Launches on the current device; returns null or what went wrong.
  static char const* run(LinearGeluArguments const& p, cudaStream_t stream) {
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {p.m, p.n, p.k, 1};
    args.mainloop.ptr_A = static_cast<Element const*>(p.a);
    get<0>(args.mainloop.dA) = p.k;
    args.mainloop.ptr_B = static_cast<Element const*>(p.b);
    get<kBackward ? 1 : 0>(args.mainloop.dB) = kBackward ? p.n : p.k;
    if constexpr (kBackward) args.epilogue.ptr_C = static_cast<Element const*>(p.c);
    get<0>(args.epilogue.dC) = p.n;
    args.epilogue.ptr_D = static_cast<Element*>(p.out);
    get<0>(args.epilogue.dD) = p.n;
    typename Bias::Arguments bias{};
    bias.ptr_row = static_cast<BiasElement const*>(p.bias);
    typename Node::Arguments node{};
    node.aux.ptr_aux = static_cast<Element*>(p.aux);
    get<0>(node.aux.dAux) = p.n;
    node.column_sums = p.column_sums;
    if constexpr (kBackward)
      args.epilogue.thread = {{}, bias, node};
    else
      args.epilogue.thread = {bias, node};
    return launch<Gemm>(args, stream);
  }
};

template <Direction kDirection>
char const* linear_gelu(Dtype dtype, LinearGeluArguments const& p, cudaStream_t stream) {
  return with_elements(dtype, p.float_bias, [&](auto element, auto bias) {
    return LinearGelu<kDirection, decltype(element), decltype(bias)>::run(p, stream);
  });
}

}  // namespace qformer_fast
