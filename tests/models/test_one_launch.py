"""The layers over queries in one launch: its kernel's source run on the CPU, a fiber a thread, and on a GPU itself."""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from qformer_fast import QFormerConfig, extension
from qformer_fast.backend import use_backend
from qformer_fast.models import one_launch
from qformer_fast.models.inference import _Runner
from qformer_fast.models.qformer import QFormer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc/query_encoder.cuh", "csrc/query_encoder.h", "csrc/products.h", "csrc/gelu.cuh")


@pytest.mark.parametrize("clusters", [12, 15])
@pytest.mark.parametrize(
    "shape", [(768, 768), (2304, 768), (3072, 768), (768, 3072)], ids=lambda s: "x".join(map(str, s))
)
def test_pack(shape, clusters):
    """Blocks find their tiles' elements where the fragments of mma.m16n8k16 want them (PTX ISA, its layout of B)."""
    outputs, inputs = shape
    attends, split = outputs == 2304, 8 if outputs == 768 else 4
    weight, vectors = torch.randn(shape).bfloat16(), torch.randn(2, outputs)
    products = [
        one_launch.Product(torch.zeros(768, 768).bfloat16(), torch.zeros(3, 768), 8),
        one_launch.Product(weight, vectors, split, attends),
    ]
    packed, starts = one_launch.pack(products, clusters)
    assert starts.shape == (8 * clusters + 1,) and starts[-1] == len(packed) - one_launch.PAGE
    generator = torch.Generator().manual_seed(0)

    def draw(end):
        return int(torch.randint(end, (), generator=generator))

    slices, groups = inputs // split // 96, 8 // split
    for _ in range(300):
        cluster, share, group, step, lane, half, e = (draw(n) for n in (12, split, groups, 6, 32, 2, 2))
        if attends:
            tiles = [part * 96 + cluster * 8 + i for part in range(3) for i in range(8)]
        else:
            tiles = range(*(c * (outputs // 8) // clusters for c in (cluster, cluster + 1)))
        tiles = tiles[len(tiles) * group // groups : len(tiles) * (group + 1) // groups]
        tile, part, vector = draw(len(tiles)), draw(slices), draw(2)
        before = (cluster + 1) * 96 // clusters - cluster * 96 // clusters  # the first weight's tiles
        first = starts[8 * cluster + share * groups + group] + 1 + before
        row = tiles[tile] * 8 + lane // 4
        found = packed[first].view(torch.float32).view(3, 128)
        assert found[vector, tile * 8 + lane // 4] == vectors[vector, row]
        slot = packed[first + 1 + tile * slices + part].view(6, 32, 2, 2)
        column = share * inputs // split + part * 96 + step * 16 + half * 8 + lane % 4 * 2 + e
        assert slot[step, lane, half, e] == weight[row, column]


def test_fold():
    weight, bias, norm_weight, norm_bias = (torch.randn(*shape) for shape in ((24, 768), (24,), (768,), (768,)))
    x = torch.randn(5, 768) * 3 + 1
    folded, sums, added = one_launch.fold(weight, bias, norm_weight, norm_bias)
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + 1e-12).sqrt()
    expected = nn.functional.linear(nn.functional.layer_norm(x, (768,), norm_weight, norm_bias, 1e-12), weight, bias)
    torch.testing.assert_close((x @ folded.T - mean * sums) / deviation + added, expected, rtol=1e-4, atol=1e-3)


def build(layers: int, headdim: int, dtype: torch.dtype, device: str = "cpu", frequency: int = 2) -> QFormer:
    """With weights that ``dtype`` holds exactly."""
    config = QFormerConfig(
        num_hidden_layers=layers,
        num_attention_heads=768 // headdim,
        encoder_hidden_size=64,
        cross_attention_frequency=frequency,
        use_qformer_text_input=False,
    )
    model = QFormer(config).eval().to(device)
    for x in model.parameters():
        x.data = (torch.randn_like(x) * 0.05 if x.ndim > 1 else x + torch.randn_like(x) * 0.1).to(dtype)
    return model


def given(model: QFormer, images: int, tokens: int) -> tuple[nn.Parameter, torch.Tensor]:
    like = next(model.parameters())
    queries, embeds = torch.randn(1, 32, 768, device=like.device), torch.randn(images, tokens, 64, device=like.device)
    return nn.Parameter(queries.to(like.dtype)), embeds.to(like.dtype)


def outputs(model: QFormer, queries: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As PyTorch's operators compute them in fp64 and in the model's dtype."""
    dtype = queries.dtype
    with use_backend("reference"), torch.no_grad():
        low = model.encode_queries(queries, embeds)
        high = model.double().encode_queries(queries.double(), embeds.double())
    model.to(dtype)
    return high, low


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_biases_and_norms_of_fp32_parameters_stay_fp32():
    model = build(1, 64, torch.float32)
    queries, _ = given(model, 1, 1)
    with torch.no_grad():
        runner = _Runner(model, queries, torch.bfloat16, None)
        one = one_launch.OneLaunch(model.config, runner.weights, *runner.first, 15)
    output = model.encoder.layer[0].crossattention.output
    first = one.weights[0].view(torch.float32).view(3, 128)[:, :48]
    assert torch.equal(first[0], output.dense.bias[:48]) and one.weights.dtype == torch.bfloat16
    norm = model.encoder.layer[0].output_query.LayerNorm
    assert torch.equal(one.norm, torch.stack([norm.weight, norm.bias]))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """csrc/query_encoder.cuh over tests/csrc/ptx.cuh."""
    compiler, cutlass = shutil.which("c++"), importlib.util.find_spec("cutlass_library")
    nvcc = shutil.which("nvcc")
    if compiler is None or cutlass is None or nvcc is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64, CUTLASS's and CUDA's headers")
    folder = tmp_path_factory.mktemp("emulated")
    for name in (*SOURCES, "tests/csrc/ptx.cuh", "tests/csrc/query_encoder.cpp"):
        shutil.copy(ROOT / name, folder)
    toolkits = (os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    cuda = next(Path(home) for home in toolkits if home and Path(home, "include/cuda_runtime.h").exists())
    include = Path(cutlass.submodule_search_locations[0]) / "source/include"
    library = folder / "query_encoder.so"
    options = ["-std=c++20", "-O2", "-w", "-fPIC", "-shared", f"-I{include}", f"-I{cuda / 'include'}"]
    subprocess.run([compiler, *options, folder / "query_encoder.cpp", "-o", library], check=True)
    found = ctypes.CDLL(str(library))
    found.workspace.restype = ctypes.c_int64
    return found


@pytest.mark.parametrize(
    "images, tokens, layers, frequency, headdim, clusters, dtype",
    [
        (1, 257, 2, 1, 64, 15, torch.bfloat16),
        (1, 1, 1, 1, 32, 12, torch.float16),
        (2, 20, 2, 2, 32, 16, torch.bfloat16),
        (3, 400, 2, 1, 64, 13, torch.bfloat16),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_source_on_the_cpu(emulated, images, tokens, layers, frequency, headdim, clusters, dtype):
    model = build(layers, headdim, dtype, frequency=frequency)
    queries, embeds = given(model, images, tokens)
    truth, plain = outputs(model, queries, embeds)
    with torch.no_grad():
        runner = _Runner(model, queries, dtype, None)
        one = one_launch.OneLaunch(model.config, runner.weights, *runner.first, clusters)
        keys_values = runner.project(embeds.flatten(0, 1))
    size = emulated.workspace(images, layers, one.cross_layers.bit_count())
    workspace = torch.full((size,), 255, dtype=torch.uint8)

    def run(images):
        out = torch.full((images, 32, 768), torch.nan, dtype=dtype)
        tensors = one.weights, one.first_slots, one.norm, one.rows, one.queries, keys_values, workspace
        sizes = headdim, clusters, images, tokens, layers, one.cross_layers
        half, eps = ctypes.c_bool(dtype == torch.float16), ctypes.c_float(one.eps)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*tensors, out)]
        emulated.encode(half, *sizes, eps, *pointers[:-1], ctypes.c_int64(size), pointers[-1])
        return out

    found = run(images)
    assert error(found, truth) <= 1.2 * error(plain, truth)
    if tokens < 49:  # a launch leaves nothing to the next, of as many images or others
        assert torch.equal(run(1), found[:1]) and torch.equal(run(images), found)


@pytest.fixture
def on_gpu():
    if reason := extension.why_not():
        pytest.skip(reason)


def launches(model: QFormer, queries: nn.Parameter) -> tuple[_Runner, one_launch.OneLaunch]:
    runner = _Runner(model, queries, queries.dtype, None)
    assert runner.one_launch is not None
    return runner, runner.one_launch


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layers, headdim, frequency", [(1, 64, 2), (6, 32, 1), (12, 64, 2)])
@torch.no_grad()
def test_on_a_gpu(layers, headdim, frequency, dtype, on_gpu):
    model = build(layers, headdim, dtype, "cuda", frequency)
    queries, _ = given(model, 1, 1)
    runner, one = launches(model, queries)
    for tokens in (1, 49, 257, 577, 677):
        _, embeds = given(model, 8, tokens)
        truth, plain = outputs(model, queries, embeds)
        keys_values = runner.project(embeds.flatten(0, 1))
        for images in (1, 8, 3, 2, 7, 4, 6, 5, 1):  # one workspace for all of them
            found = one.run(keys_values[: images * tokens], images)
            assert error(found, truth[:images]) <= 2 * error(plain[:images], truth[:images])
            assert all(torch.equal(one.run(keys_values[: images * tokens], images), found) for _ in range(5))


@pytest.mark.cuda
@torch.no_grad()
def test_graphs_and_streams(on_gpu):
    model = build(12, 64, torch.bfloat16, "cuda")
    queries, embeds = given(model, 4, 257)
    runner, one = launches(model, queries)
    inputs = [runner.project(x.flatten(0, 1)) for x in embeds.split(1)]
    expected = [one.run(x, 1) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        found = []
        for x, stream in zip(inputs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(one.run(x, 1))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one.run(inputs[0], 1)
    inputs[0].copy_(inputs[1])
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected[1])


@pytest.mark.cuda
@torch.no_grad()
def test_encode_queries_takes_it(on_gpu, monkeypatch):
    """Of few images, with the weights as they are; and not where another backend is asked for."""
    model = build(2, 64, torch.bfloat16, "cuda")
    queries, embeds = given(model, one_launch.MAX_IMAGES + 1, 49)
    launched, run = [], one_launch.OneLaunch.run
    monkeypatch.setattr(one_launch.OneLaunch, "run", lambda self, x, n: launched.append(n) or run(self, x, n))
    for change in (0.0, 0.5):
        for x in model.encoder.parameters():
            x.mul_(1 - change)
        for images in range(1, len(embeds) + 1):
            with torch.inference_mode() if images == 2 else torch.no_grad():
                found = model.encode_queries(queries, embeds[:images])
            truth, plain = outputs(model, queries, embeds[:images])
            assert error(found, truth) <= 2 * error(plain, truth)
    assert launched == [*range(1, one_launch.MAX_IMAGES + 1)] * 2
    expected = model.encode_queries(queries, embeds[1:2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.encode_queries(queries, embeds[:1])
    assert len(launched) == 2 * one_launch.MAX_IMAGES + 2
    with use_backend("triton"):
        model.encode_queries(queries, embeds[:1])
    assert len(launched) == 2 * one_launch.MAX_IMAGES + 2
    embeds[0].copy_(embeds[1])
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
