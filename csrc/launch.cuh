// How a product of CUTLASS's is launched, and for which dtypes there is one.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.h>
#include <cutlass/numeric_types.h>

#include "products.h"

namespace qformer_fast {

// Launches on the current device; returns null or what went wrong.
template <class Gemm>
char const* launch(typename Gemm::Arguments& args, cudaStream_t stream) {
  cudaGetDevice(&args.hw_info.device_id);
  args.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(args.hw_info.device_id);
  Gemm gemm;
  auto status = Gemm::can_implement(args);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, nullptr, stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

// run(element, bias): values of the types of the matrices and of the bias.
template <class Run>
char const* with_elements(Dtype dtype, bool float_bias, Run run) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return float_bias ? run(cutlass::bfloat16_t{}, float{}) : run(cutlass::bfloat16_t{}, cutlass::bfloat16_t{});
    case Dtype::kHalf:
      return float_bias ? run(cutlass::half_t{}, float{}) : run(cutlass::half_t{}, cutlass::half_t{});
  }
  return "unknown dtype";
}

}  // namespace qformer_fast
