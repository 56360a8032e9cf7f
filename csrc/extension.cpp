// The operators of qformer_fast._C, against the LibTorch stable ABI: checks, then the launch on the current stream.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "products.h"
#include "query_encoder.h"

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

Dtype dtype_of(Tensor const& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? Dtype::kBFloat16 : Dtype::kHalf;
}

// run(stream) on x's device and its current stream.
template <class Run>
char const* on_stream_of(Tensor const& x, Run run) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return run(static_cast<cudaStream_t>(stream));
}

template <class Arguments>
void launch(char const* (*run)(Dtype, Arguments const&, cudaStream_t), Tensor const& rows, Arguments const& arguments) {
  if (arguments.m == 0) return;
  char const* error =
      on_stream_of(rows, [&](cudaStream_t stream) { return run(dtype_of(rows), arguments, stream); });
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

// How many slots a block has is its caller's to know, who packs them.
void encode_queries(Tensor weights, Tensor first_slots, Tensor norm, Tensor rows, Tensor queries, Tensor keys_values,
                    int64_t images, int64_t layers, int64_t cross_layers, int64_t headdim, double eps, Tensor workspace,
                    Tensor out) {
  ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "rows must be bf16 or fp16");
  for (Tensor const* x : {&weights, &first_slots, &keys_values, &workspace})
    STD_TORCH_CHECK(x->dim() == 2, "all arguments must have two dimensions");
  STD_TORCH_CHECK(layers > 0 && layers <= 32 && cross_layers & 1, "layers must be 1 to 32, the first with cross-attention");
  STD_TORCH_CHECK(images > 0 && keys_values.size(0) % images == 0 && keys_values.size(0) > 0,
                  "keys_values must be (images * tokens, width), of ", images, " images");
  int64_t looking = 0;
  for (int64_t layer = 0; layer < layers; ++layer) looking += cross_layers >> layer & 1;
  check("rows", rows, rows, dtype, 32, 768);
  check("queries", queries, rows, dtype, 32, 768);
  check("keys_values", keys_values, rows, dtype, keys_values.size(0), looking * 2 * 768);
  check("weights", weights, rows, dtype, weights.size(0), 768);
  check("first_slots", first_slots, rows, ScalarType::Int, 1, first_slots.size(1));
  STD_TORCH_CHECK(first_slots.size(1) % 8 == 1, "first_slots must be of whole clusters of eight blocks, and one more");
  check("norm", norm, rows, ScalarType::Float, 2, 768);
  int64_t bytes = query_encoder_workspace(static_cast<int>(images), static_cast<int>(layers), static_cast<int>(looking));
  STD_TORCH_CHECK(workspace.size(1) >= bytes, "workspace must be of at least ", bytes, " bytes");
  check("workspace", workspace, rows, ScalarType::Byte, 1, workspace.size(1));
  check("out", out, rows, dtype, images * 32, 768);
  QueryEncoderArguments arguments{};
  arguments.images = static_cast<int>(images);
  arguments.tokens = static_cast<int>(keys_values.size(0) / images);
  arguments.layers = static_cast<int>(layers);
  arguments.cross_layers = static_cast<uint32_t>(cross_layers);
  arguments.eps = static_cast<float>(eps);
  arguments.weights = weights.const_data_ptr();
  arguments.slots = weights.size(0);
  arguments.first_slots = static_cast<int const*>(first_slots.const_data_ptr());
  arguments.norm = static_cast<float const*>(norm.const_data_ptr());
  arguments.rows = rows.const_data_ptr();
  arguments.queries = queries.const_data_ptr();
  arguments.keys_values = keys_values.const_data_ptr();
  arguments.width = keys_values.size(1);
  arguments.workspace = workspace.mutable_data_ptr();
  arguments.workspace_bytes = workspace.size(1);
  arguments.out = out.mutable_data_ptr();
  int clusters = static_cast<int>(first_slots.size(1) / 8);
  char const* error = on_stream_of(rows, [&](cudaStream_t stream) {
    return query_encoder(dtype_of(rows), static_cast<int>(headdim), clusters, arguments, stream);
  });
  STD_TORCH_CHECK(error == nullptr, "encoding ", images, " images in one launch failed: ", error);
}

int64_t encode_queries_clusters(Tensor rows, int64_t headdim) {
  torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  return query_encoder_clusters(dtype_of(rows), static_cast<int>(headdim));
}

int64_t encode_queries_workspace(Tensor, int64_t images, int64_t layers, int64_t looking) {
  return query_encoder_workspace(static_cast<int>(images), static_cast<int>(layers), static_cast<int>(looking));
}

// Of the runtime that is linked in, and the latest that the driver runs: 1000 * major + 10 * minor, 0 without a driver.
std::tuple<int64_t, int64_t> cuda_versions() {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  return {runtime, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY(qformer_fast_cuda, m) {
  m.def("linear(Tensor rows, Tensor weight, Tensor bias, bool gelu, Tensor(a!) out) -> ()");
  m.def("linear_gelu_fwd(Tensor rows, Tensor weight, Tensor bias, Tensor(a!) up, Tensor(b!) out) -> ()");
  m.def(
      "linear_gelu_bwd(Tensor dout, Tensor weight, Tensor up, Tensor bias, Tensor(a!) dup, Tensor(b!) out, "
      "Tensor(c!) column_sums) -> ()");
  m.def(
      "encode_queries(Tensor weights, Tensor first_slots, Tensor norm, Tensor rows, Tensor queries, "
      "Tensor keys_values, int images, int layers, int cross_layers, int headdim, float eps, Tensor(a!) workspace, "
      "Tensor(b!) out) -> ()");
  m.def("encode_queries_clusters(Tensor rows, int headdim) -> int");
  m.def("encode_queries_workspace(Tensor rows, int images, int layers, int looking) -> int");
  m.def("cuda_versions() -> (int runtime, int driver)");
}

STABLE_TORCH_LIBRARY_IMPL(qformer_fast_cuda, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_out));
  m.impl("linear_gelu_fwd", TORCH_BOX(&forward));
  m.impl("linear_gelu_bwd", TORCH_BOX(&backward));
  m.impl("encode_queries", TORCH_BOX(&encode_queries));
  m.impl("encode_queries_clusters", TORCH_BOX(&encode_queries_clusters));
  m.impl("encode_queries_workspace", TORCH_BOX(&encode_queries_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(qformer_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}

}  // namespace qformer_fast

// `import qformer_fast._C` loads the library; the operators register themselves.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
