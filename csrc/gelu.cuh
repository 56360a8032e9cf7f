// Exact GELU and its derivative in fp32.
#pragma once

#include "ptx.cuh"

namespace qformer_fast {

// Phi(-a) for a >= 0 as 2 to a polynomial of a. The epilogue is bound by its arithmetic, so bf16 takes fewer terms:
// relative error below 1.4e-4 up to a = 3.5 (half a unit of bf16 is 2e-3), for fp16 4e-6; both vanish beyond 6.
template <class Element>
__device__ __forceinline__ float normal_tail(float a) {
  float p;
  if constexpr (cute::is_same_v<Element, cutlass::bfloat16_t>) {
    p = -2.7504828e-04f;
    p = fmaf(p, a, 5.3881598e-03f);
    p = fmaf(p, a, -4.6761263e-02f);
    p = fmaf(p, a, -4.6612784e-01f);
    p = fmaf(p, a, -1.1482334f);
    p = fmaf(p, a, -1.0001903f);
  } else {
    p = -1.6459915e-06f;
    p = fmaf(p, a, 5.8283822e-05f);
    p = fmaf(p, a, -9.0848055e-04f);
    p = fmaf(p, a, 8.4377266e-03f);
    p = fmaf(p, a, -5.3849529e-02f);
    p = fmaf(p, a, -4.5854414e-01f);
    p = fmaf(p, a, -1.1512305f);
    p = fmaf(p, a, -0.99999613f);
  }
  return exp2_approx(p);
}

template <class Element>
__device__ __forceinline__ float gelu(float y) {
  float a = fabsf(y);
  return fmaf(-a, normal_tail<Element>(a), fmaxf(y, 0.f));
}

// gelu(y) into out; returns its derivative Phi(y) + y phi(y).
template <class Element>
__device__ __forceinline__ float gelu_derivative(float y, float& out) {
  float tail = normal_tail<Element>(fabsf(y));
  float cdf = y > 0.f ? 1.f - tail : tail;
  float density = exp2_approx(fmaf(y * y, -0.72134752f, -1.32574806f));  // log2 of exp(-y^2 / 2) / sqrt(2 pi)
  out = y * cdf;
  return fmaf(y, density, cdf);
}

}  // namespace qformer_fast
