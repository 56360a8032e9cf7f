// csrc/query_encoder.cuh on the CPU, for tests.
#include "query_encoder.cuh"

using namespace qformer_fast;

namespace {

template <class Element, int kImages, bool kMany, int kHeaddim>
void run(QueryEncoderArguments arguments, int clusters) {
  constexpr size_t kBytes = 232448;  // of a multiprocessor, as on Hopper
  arguments.ring = std::min(int(kBytes - sizeof(Shared<kImages>)) / kPageBytes, kMaxPages);
  Boxes pages{static_cast<char const*>(arguments.weights), kRowBytes};
  emulated::run(clusters * kCluster, kThreads, kCluster, kBytes, [&] {
    auto& shared = *reinterpret_cast<Shared<kImages>*>(emulated::self->of->shared);
    Encoder<Element, kImages, kMany, kHeaddim>(arguments, pages, shared).run();
  });
}

template <class Element, int kImages, bool kMany>
void with_heads(QueryEncoderArguments const& arguments, int headdim, int clusters) {
  headdim == 32 ? run<Element, kImages, kMany, 32>(arguments, clusters)
                : run<Element, kImages, kMany, 64>(arguments, clusters);
}

template <class Element>
void with_images(QueryEncoderArguments const& arguments, int headdim, int clusters) {
  if (arguments.images == 1)
    with_heads<Element, 1, false>(arguments, headdim, clusters);
  else if (arguments.images == 2)
    with_heads<Element, 2, false>(arguments, headdim, clusters);
  else
    with_heads<Element, 2, true>(arguments, headdim, clusters);
}

}  // namespace

extern "C" int64_t workspace(int images, int layers, int looking) { return workspace_bytes(images, layers, looking); }

extern "C" void encode(bool half, int headdim, int clusters, int images, int tokens, int layers, int cross_layers, float eps,
                       void* weights, void* first_slots, void* norm, void* rows, void* queries, void* keys_values,
                       void* workspace, int64_t workspace_bytes, void* out) {
  int looking = __builtin_popcount(cross_layers);
  QueryEncoderArguments arguments{images, tokens, layers, uint32_t(cross_layers), eps, 0, weights, 0,
                                  static_cast<int const*>(first_slots), static_cast<float const*>(norm), rows, queries,
                                  keys_values, looking * 2 * kHidden, workspace, workspace_bytes, out};
  half ? with_images<cutlass::half_t>(arguments, headdim, clusters)
       : with_images<cutlass::bfloat16_t>(arguments, headdim, clusters);
}
