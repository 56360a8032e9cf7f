// The products that have bias and GELU beside them. Free of torch.
#pragma once

#include <cuda_runtime.h>

namespace qformer_fast {

enum class Dtype { kBFloat16, kHalf };

// Matrices are contiguous rows, aligned to 16 bytes; n and k are multiples of 8.
struct LinearArguments {
  int m, n, k;
  void const* a;     // (m, k)
  void const* b;     // (n, k), in backward (k, n)
  void const* bias;  // (n,)
  bool float_bias;   // fp32, else of the matrices' dtype
  void* out;         // (m, n)
};

struct LinearGeluArguments : LinearArguments {
  void const* c;       // (m, n) backward: what forward wrote to aux
  void* aux;           // (m, n); backward: may be c
  float* column_sums;  // (ceil(m / kRowsPerSum), n) backward
};

constexpr int kRowsPerSum = 128;

// Each launches on the current device and returns null or what went wrong.

// out = a b^T + bias
char const* linear(Dtype, LinearArguments const&, cudaStream_t);
// out = gelu(a b^T + bias)
char const* linear_with_gelu(Dtype, LinearArguments const&, cudaStream_t);
// aux = a b^T, out = gelu(aux + bias) with aux before it is rounded
char const* linear_gelu_fwd(Dtype, LinearGeluArguments const&, cudaStream_t);
// out = (a b) * gelu'(c + bias), aux = gelu(c + bias), column_sums = sums of out over every kRowsPerSum rows
char const* linear_gelu_bwd(Dtype, LinearGeluArguments const&, cudaStream_t);

}  // namespace qformer_fast
