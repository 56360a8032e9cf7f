// The operators of qformer_fast._C, against the LibTorch stable ABI: checks, then the launch on the current stream.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "products.h"

namespace qformer_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(char const* name, Tensor const& x, Tensor const& like, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, " must be on the rows' device");
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has another dtype than expected");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name, " must be (", rows, ", ", columns,
                  ")");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name, " must be aligned to 16 bytes");
}

// Checks what all products have and fills in their arguments; backward's weight is transposed.
void fill(LinearArguments& arguments, Tensor const& rows, Tensor const& weight, bool transposed, Tensor const& bias,
          Tensor const& out) {
  ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "rows must be bf16 or fp16");
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 2, "rows and weight must have two dimensions");
  int64_t m = rows.size(0), k = rows.size(1), n = weight.size(transposed ? 1 : 0);
  STD_TORCH_CHECK(n > 0 && k > 0 && n % 8 == 0 && k % 8 == 0, "widths must be multiples of 8, got ", k, " and ", n);
  STD_TORCH_CHECK(m <= std::numeric_limits<int>::max() / 2, "rows must be fewer than 2^30, got ", m);
  check("rows", rows, rows, dtype, m, k);
  check("weight", weight, rows, dtype, transposed ? k : n, transposed ? n : k);
  bool float_bias = bias.scalar_type() == ScalarType::Float;
  check("bias", bias, rows, float_bias ? ScalarType::Float : dtype, 1, n);
  check(transposed ? "dup" : "out", out, rows, dtype, m, n);
  arguments.m = static_cast<int>(m);
  arguments.n = static_cast<int>(n);
  arguments.k = static_cast<int>(k);
  arguments.a = rows.const_data_ptr();
  arguments.b = weight.const_data_ptr();
  arguments.bias = bias.const_data_ptr();
  arguments.float_bias = float_bias;
  arguments.out = out.mutable_data_ptr();
}

template <class Arguments>
void launch(char const* (*run)(Dtype, Arguments const&, cudaStream_t), Tensor const& rows, Arguments const& arguments) {
  if (arguments.m == 0) return;
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(rows.get_device_index(), &stream));
  Dtype dtype = rows.scalar_type() == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kHalf;
  char const* error = run(dtype, arguments, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == nullptr, "a product of ", arguments.m, " rows failed: ", error);
}

void linear_out(Tensor rows, Tensor weight, Tensor bias, bool gelu, Tensor out) {
  LinearArguments arguments{};
  fill(arguments, rows, weight, false, bias, out);
  launch(gelu ? linear_with_gelu : linear, rows, arguments);
}

void forward(Tensor rows, Tensor weight, Tensor bias, Tensor up, Tensor out) {
  LinearGeluArguments arguments{};
  fill(arguments, rows, weight, false, bias, out);
  check("up", up, rows, rows.scalar_type(), arguments.m, arguments.n);
  arguments.aux = up.mutable_data_ptr();
  launch(linear_gelu_fwd, rows, arguments);
}

void backward(Tensor dout, Tensor weight, Tensor up, Tensor bias, Tensor dup, Tensor out, Tensor column_sums) {
  LinearGeluArguments arguments{};
  fill(arguments, dout, weight, true, bias, dup);
  int64_t sums = (arguments.m + kRowsPerSum - 1) / kRowsPerSum;
  check("up", up, dout, dout.scalar_type(), arguments.m, arguments.n);
  check("out", out, dout, dout.scalar_type(), arguments.m, arguments.n);
  check("column_sums", column_sums, dout, ScalarType::Float, sums, arguments.n);
  arguments.c = up.const_data_ptr();
  arguments.aux = out.mutable_data_ptr();
  arguments.column_sums = static_cast<float*>(column_sums.mutable_data_ptr());
  launch(linear_gelu_bwd, dout, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY(qformer_fast_cuda, m) {
  m.def("linear(Tensor rows, Tensor weight, Tensor bias, bool gelu, Tensor(a!) out) -> ()");
  m.def("linear_gelu_fwd(Tensor rows, Tensor weight, Tensor bias, Tensor(a!) up, Tensor(b!) out) -> ()");
  m.def(
      "linear_gelu_bwd(Tensor dout, Tensor weight, Tensor up, Tensor bias, Tensor(a!) dup, Tensor(b!) out, "
      "Tensor(c!) column_sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qformer_fast_cuda, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_out));
  m.impl("linear_gelu_fwd", TORCH_BOX(&forward));
  m.impl("linear_gelu_bwd", TORCH_BOX(&backward));
}

}  // namespace qformer_fast

// `import qformer_fast._C` loads the library; the operators register themselves.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
