// A product with bias, or bias and exact GELU, in its epilogue, and nothing kept for backward: CUTLASS's warp-specialized
// pingpong kernel for Hopper. Free of torch.
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gelu.cuh"
#include "launch.cuh"

namespace qformer_fast {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// The last step of the epilogue, on fragments in fp32.
template <class Element>
struct BiasGelu {
  template <class Fragment>
  struct Function {
    CUTLASS_DEVICE Fragment operator()(Fragment const& accumulator, Fragment const& bias) const {
      Fragment out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) out[i] = gelu<Element>(accumulator[i] + bias[i]);
      return out;
    }
  };
};

// a (M, K), b (N, K) and out (M, N) rows; bias (N,).
template <class Element, class BiasElement, template <class> class Function>
struct Linear {
  static constexpr int kAlignment = 8;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using TileShape = Shape<_128, _192, _64>;
  using Cluster = Shape<_1, _2, _1>;
  using EpilogueTile = Shape<_64, _32>;
  using RowMajor = cutlass::layout::RowMajor;

  using Bias =
      fusion::Sm90RowBroadcast<0, TileShape, BiasElement, float, Stride<_0, _1, _0>, 16 / sizeof(BiasElement), false>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<Function, Element, float, kRound>, fusion::Sm90AccFetch, Bias>;

  using Policy = cutlass::epilogue::Sm90TmaWarpSpecialized<2, 2, size(EpilogueTile{}) / 128, false, true>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::detail::Sm90TmaBuilderImpl<
      TileShape, EpilogueTile, float, float, void, RowMajor, kAlignment, Element, RowMajor, kAlignment, Tree,
      Policy>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static char const* run(LinearArguments const& p, cudaStream_t stream) {
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {p.m, p.n, p.k, 1};
    args.mainloop.ptr_A = static_cast<Element const*>(p.a);
    get<0>(args.mainloop.dA) = p.k;
    args.mainloop.ptr_B = static_cast<Element const*>(p.b);
    get<0>(args.mainloop.dB) = p.k;
    args.epilogue.ptr_D = static_cast<Element*>(p.out);
    get<0>(args.epilogue.dD) = p.n;
    typename Bias::Arguments bias{};
    bias.ptr_row = static_cast<BiasElement const*>(p.bias);
    args.epilogue.thread = {{}, bias, {}};
    return launch<Gemm>(args, stream);
  }
};

}  // namespace

char const* linear(Dtype dtype, LinearArguments const& p, cudaStream_t stream) {
  return with_elements(dtype, p.float_bias, [&](auto element, auto bias) {
    return Linear<decltype(element), decltype(bias), cutlass::plus>::run(p, stream);
  });
}

char const* linear_with_gelu(Dtype dtype, LinearArguments const& p, cudaStream_t stream) {
  return with_elements(dtype, p.float_bias, [&](auto element, auto bias) {
    using Element = decltype(element);
    return Linear<Element, decltype(bias), BiasGelu<Element>::template Function>::run(p, stream);
  });
}

}  // namespace qformer_fast
