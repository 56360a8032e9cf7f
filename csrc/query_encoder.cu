#include "query_encoder.cuh"

#include <cutlass/cuda_host_adapter.hpp>

namespace qformer_fast {
namespace {

template <class Element, int kImages, bool kMany, int kHeaddim>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    encode_queries(__grid_constant__ QueryEncoderArguments const arguments, __grid_constant__ Boxes const pages) {
  extern __shared__ __align__(128) char dynamic[];
  Encoder<Element, kImages, kMany, kHeaddim>(arguments, pages, *reinterpret_cast<Shared<kImages>*>(dynamic)).run();
}

struct Launch {
  void (*kernel)(QueryEncoderArguments, Boxes) = nullptr;
  int ring = 0, bytes = 0;

  template <class Element, int kImages, bool kMany>
  void choose(int headdim, int most_bytes) {
    if (headdim == 64) kernel = encode_queries<Element, kImages, kMany, 64>;
    if (headdim == 32) kernel = encode_queries<Element, kImages, kMany, 32>;
    ring = (most_bytes - int(sizeof(Shared<kImages>))) / kPageBytes;
    if (ring > kMaxPages) ring = kMaxPages;
    bytes = int(sizeof(Shared<kImages>)) + ring * kPageBytes;
  }

  Launch(Dtype dtype, int headdim, int images) {
    int device = 0, most_bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    auto with = [&](auto element) {
      using Element = decltype(element);
      if (images == 1)
        choose<Element, 1, false>(headdim, most_bytes);
      else if (images == 2)
        choose<Element, 2, false>(headdim, most_bytes);
      else
        choose<Element, 2, true>(headdim, most_bytes);
    };
    dtype == Dtype::kHalf ? with(cutlass::half_t{}) : with(cutlass::bfloat16_t{});
    if (kernel != nullptr)
      cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }

  // Clusters that fit at once; 0 where a phase's slots don't fit into the ring.
  int clusters() const {
    if (kernel == nullptr || ring < kLeastPages) return 0;
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2];
    configure(config, attributes, kCluster, nullptr);
    config.numAttrs = 1;  // of a cooperative launch nothing is known before it
    int found = 0;
    cudaError_t error = cudaOccupancyMaxActiveClusters(&found, reinterpret_cast<void const*>(kernel), &config);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? found : 0;
  }

  void configure(cudaLaunchConfig_t& config, cudaLaunchAttribute* attributes, int blocks, cudaStream_t stream) const {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = kCluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
    config.gridDim = blocks;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
};

// Pages of the slots, which may begin at any; whether the driver makes them.
bool pages_of(Boxes& pages, QueryEncoderArguments const& arguments) {
  cuuint64_t sizes[] = {kRowBytes / 2, cuuint64_t(arguments.slots) * kSlotRows}, strides[] = {kRowBytes};
  cuuint32_t box[] = {kRowBytes / 2, kPage * kSlotRows}, steps[] = {1, 1};
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             &pages, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(arguments.weights), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

int64_t query_encoder_workspace(int images, int layers, int looking) { return workspace_bytes(images, layers, looking); }

int query_encoder_clusters(Dtype dtype, int headdim) {
  int least = kTiles;
  for (int images : {1, 2, 3}) {
    int found = Launch(dtype, headdim, images).clusters();
    least = found < least ? found : least;
  }
  return least < kLeastClusters ? 0 : least;
}

char const* query_encoder(Dtype dtype, int headdim, int clusters, QueryEncoderArguments arguments, cudaStream_t stream) {
  if (arguments.images > kMaxImages) return "it takes at most 8 images";
  Launch launch(dtype, headdim, arguments.images);
  if (launch.kernel == nullptr) return "head dimensions are 32 and 64";
  if (clusters < kLeastClusters || launch.ring < kLeastPages) return "too few clusters, or too little shared memory";
  arguments.ring = launch.ring;
  Boxes pages;
  if (!pages_of(pages, arguments)) return "the driver refuses a tensor map of the weights";
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];
  launch.configure(config, attributes, clusters * kCluster, stream);
  cudaError_t error = cudaLaunchKernelEx(&config, launch.kernel, arguments, pages);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace qformer_fast
