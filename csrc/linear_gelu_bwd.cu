#include "linear_gelu.cuh"

namespace qformer_fast {

char const* linear_gelu_bwd(Dtype dtype, LinearGeluArguments const& arguments, cudaStream_t stream) {
  return linear_gelu<Direction::kBackward>(dtype, arguments, stream);
}

}  // namespace qformer_fast
