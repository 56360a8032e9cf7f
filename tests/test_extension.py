"""The CUDA extension: its build's reasons, and on a GPU its kernels against fp64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qformer_fast import extension, ops, products, reference
from qformer_fast.backend import use_backend

ROOT = Path(__file__).resolve().parents[1]
BUILT = next(Path(extension.__file__).parent.glob("_C*.so"), None)
needs_build = pytest.mark.skipif(BUILT is None, reason="the extension was not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# rows, inputs, outputs
SHAPES = [(1, 8, 8), (127, 136, 264), (129, 48, 24), (300, 768, 3072)]


@pytest.fixture
def on_gpu():
    if reason := extension.why_not():
        pytest.skip(reason)


def setup_py(wish, tmp_path):
    """setup.py in a build environment without torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    environment = os.environ | {"QFORMER_FAST_EXT": wish, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_build_without_torch(tmp_path):
    pytest.importorskip("setuptools")
    asked = setup_py("1", tmp_path)
    assert asked.returncode != 0 and "QFORMER_FAST_EXT=1, but" in asked.stderr
    for wish in ("auto", "0"):
        assert setup_py(wish, tmp_path).returncode == 0


@needs_build
def test_loads_without_a_device():
    reason = extension.why_not()
    assert reason in (None, "there is no CUDA device") or "compute capability" in reason or "driver" in reason
    runtime, driver = torch.ops.qformer_fast_cuda.cuda_versions()
    assert runtime >= 12000 and (driver or reason)
    assert "Tensor(a!) up" in str(torch.ops.qformer_fast_cuda.linear_gelu_fwd.default._schema)
    x = torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.qformer_fast_cuda.linear_gelu_fwd(x, x, x[:1], x, x)


@needs_build
@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ((13000, 12080), "it needs a driver for CUDA 13, this one is for 12.8"),
        ((13020, 13000), None),
        ((12080, 13000), None),
    ],
    ids=["older", "older-minor", "newer"],
)
def test_driver(versions, expected, monkeypatch):
    """On a Hopper device that torch can use, versions of the extension's CUDA and of the driver."""
    extension.why_not()
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: extension.CAPABILITY)
    monkeypatch.setattr(torch.ops.qformer_fast_cuda, "cuda_versions", lambda: versions)
    assert extension._probe.__wrapped__() == expected


def given(device):
    """Arguments of each operator; encode_queries must not run on its own, which have the right shapes and no more."""

    def rand(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device).to(dtype)

    x, weight, bias, up, out = (rand(*shape) for shape in [(130, 32), (64, 32), (1, 64), (130, 64), (130, 64)])
    sums, norm = rand(2, 64, dtype=torch.float32), rand(2, 768, dtype=torch.float32)
    packed = rand(100, 768), rand(1, 97, dtype=torch.int32), norm
    rows, queries, keys_values = rand(32, 768), rand(32, 768), rand(257, 6 * 2 * 768)
    workspace, encoded = rand(1, 4096, dtype=torch.uint8), rand(32, 768)
    sizes = 1, 12, 0b010101010101, 64, 1e-12
    return {
        "linear": (x, weight, bias, True, out),
        "linear_gelu_fwd": (x, weight, bias, up, out),
        "linear_gelu_bwd": (x, rand(32, 64), up, bias, out, rand(130, 64), sums),
        "encode_queries": (*packed, rows, queries, keys_values, *sizes, workspace, encoded),
    }


@needs_build
@pytest.mark.parametrize("name", extension.OPERATORS)
def test_fakes(name):
    """As tracing sees the operators, without a device: nothing returned, what is written to keeps its shape."""
    extension.why_not()
    operator = getattr(torch.ops.qformer_fast_cuda, name)
    with FakeTensorMode():
        assert operator(*given("cuda")[name]) is None
    torch.library.opcheck(operator.default, given("meta")[name])


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in extension.OPERATORS if name != "encode_queries"])
def test_opcheck(name, on_gpu):
    torch.library.opcheck(getattr(torch.ops.qformer_fast_cuda, name).default, given("cuda")[name])


def test_asked_for_by_name_it_says_why_not():
    reason = extension.why_not()
    if reason is None:
        pytest.skip("it can run here")
    x, weight = torch.zeros(2, 8), torch.zeros(8, 8)
    parameters = (weight, weight[0], weight, weight[0], weight[0], weight[0])
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run here"):
        ops.split_feed_forward_block(x, x[:0], parameters, None, backend="cuda")


def draw(rows, inputs, outputs, dtype, bias_dtype=None):
    def rand(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    bias = torch.randn(outputs, device="cuda").to(bias_dtype or dtype) * 0.5
    return rand(rows, inputs), rand(outputs, inputs) * inputs**-0.5, bias


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("float_bias", [False, True], ids=["bias", "float-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear_gelu(shape, float_bias, dtype, on_gpu, assert_close):
    x, weight, bias = draw(*shape, dtype, torch.float32 if float_bias else None)
    up = x.new_empty(shape[0], shape[2])
    out = extension.linear_gelu_fwd(x, weight, bias, up)

    def plain(x, weight, bias):
        up = x @ weight.t()
        return {"up": up, "out": F.gelu((up + bias).to(up.dtype))}

    assert_close({"up": up, "out": out}, plain(x, weight, bias), plain(x.double(), weight.double(), bias.double()))


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("gelu", [False, True], ids=["bias", "gelu"])
@pytest.mark.parametrize("float_bias", [False, True], ids=["bias", "float-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear(shape, float_bias, gelu, dtype, on_gpu, assert_close):
    given = draw(*shape, dtype, torch.float32 if float_bias else None)
    out = extension.linear(*given, gelu=gelu)

    def plain(x, weight, bias):
        y = (x @ weight.t() + bias).to(x.dtype)
        return {"out": F.gelu(y) if gelu else y}

    assert_close({"out": out}, plain(*given), plain(*(x.double() for x in given)))
    assert torch.equal(extension.linear(*given, gelu=gelu), out)


@pytest.mark.cuda
def test_which_products_take_the_extension(on_gpu, monkeypatch):
    x, weight, bias = draw(8192, 64, 768, torch.bfloat16)
    calls = []
    monkeypatch.setattr(extension, "linear", lambda rows, *_, **__: calls.append(len(rows)) or rows)
    products.linear(x, weight, bias)
    products.linear(x[:8191], weight, bias)
    products.linear(x, weight, bias, backend="triton")
    products.linear(x.float(), weight.float(), bias)
    with use_backend("triton"):
        products.linear(x, weight, bias)
    assert calls == [8192]


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("float_bias", [False, True], ids=["bias", "float-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear_gelu_bwd(shape, float_bias, dtype, on_gpu, assert_close):
    """With dout's width as inputs: the product's weight is (dout's width, up's width)."""
    rows, width, intermediate = shape
    dout, weight, bias = draw(rows, width, intermediate, dtype, torch.float32 if float_bias else None)
    weight = weight.t().contiguous()
    up = torch.randn(rows, intermediate, device="cuda").to(dtype)

    def plain(dout, weight, up, bias):
        y = (up + bias).to(up.dtype).requires_grad_()
        out = F.gelu(y)
        (dup,) = torch.autograd.grad(out, y, dout @ weight)
        return {"dup": dup, "dbias": dup.sum(0), "out": out.detach()}

    names = "dup", "dbias", "out"
    actual = dict(zip(names, extension.linear_gelu_bwd(dout, weight, up, bias), strict=True))
    assert actual["dbias"].dtype == bias.dtype
    assert_close(actual, plain(dout, weight, up, bias), plain(*(x.double() for x in (dout, weight, up, bias))))
    for i in range(20):
        copy = up.clone()
        out = copy if i % 2 else None
        again = dict(zip(names, extension.linear_gelu_bwd(dout, weight, copy, bias, out=out), strict=True))
        assert all(torch.equal(again[name], actual[name]) for name in names)


@pytest.mark.cuda
def test_views(on_gpu):
    """Rows, weights and biases need not start at 16 bytes, nor be contiguous."""
    given = draw(300, 64, 128, torch.bfloat16)
    flat = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in given]
    assert all(x.data_ptr() % 16 for x in flat)
    up, expected_up = (given[0].new_empty(300, 128) for _ in range(2))
    assert torch.equal(extension.linear_gelu_fwd(*flat, up), extension.linear_gelu_fwd(*given, expected_up))
    assert torch.equal(up, expected_up)
    strided = given[0], given[1].t().contiguous().t(), given[2]
    assert torch.equal(extension.linear_gelu_fwd(*strided, up), extension.linear_gelu_fwd(*given, expected_up))


@pytest.mark.cuda
def test_wrong_arguments_are_refused(on_gpu):
    x, weight, bias = draw(16, 32, 64, torch.bfloat16)
    up = x.new_empty(16, 64)
    wrong = {
        "rows must be bf16 or fp16": (x.float(), weight, bias, up),
        "weight has another dtype": (x, weight.half(), bias, up),
        "weight must be": (x, weight[:, :24], bias, up),
        "up must be contiguous": (x, weight, bias, up.new_empty(64, 16).t()),
        "bias must be": (x, weight, bias[:8], up),
        "bias has another dtype": (x, weight, bias.half(), up),
        "up must be": (x, weight, bias, up[:8]),
        "aligned to 16 bytes": (x, weight, bias, x.new_empty(16 * 64 + 1)[1:].view(16, 64)),
        "multiples of 8": (x[:, :12].contiguous(), weight[:, :12].contiguous(), bias, up),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            extension.linear_gelu_fwd(*arguments)


@pytest.mark.cuda
@DTYPES
@pytest.mark.parametrize("rows", [(extension.FWD_ROWS + 5, 300), (9001, 0)], ids=lambda r: f"{r[0]}-{r[1]}")
def test_feed_forward_block(rows, dtype, on_gpu, assert_close):
    hidden, wide = 96, 200
    shapes = (wide, hidden), (wide,), (hidden, wide), (hidden,), (hidden,), (hidden,)

    def rand(*shape):
        return (torch.randn(*shape, device="cuda") * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).to(dtype)

    inputs = [rand(count, hidden) * 8 for count in rows] + [rand(*shape) for shape in shapes * 2]
    dout = rand(sum(rows), hidden)

    def results(run, inputs, dout, **options):
        inputs = [x.detach().requires_grad_() for x in inputs]
        query, text, *parameters = inputs
        out = run(query, text, parameters[:6], parameters[6:], eps=1e-6, **options)
        wanted = [x for x in inputs[: 8 if not rows[1] else None] if x.numel()]
        found = torch.autograd.grad(out, wanted, dout.to(out.dtype))
        return {"out": out.detach()} | {str(i): g for i, g in enumerate(found)}

    actual = results(ops.split_feed_forward_block, inputs, dout, backend="cuda")
    low = results(reference.split_feed_forward_block, inputs, dout)
    high = results(reference.split_feed_forward_block, [x.double() for x in inputs], dout.double())
    assert_close(actual, low, high)


@pytest.mark.cuda
def test_what_the_extension_does_not_take(on_gpu):
    def block(hidden, wide, dtype):
        x = torch.zeros(4, hidden, device="cuda", dtype=dtype)
        weight = x.new_zeros(wide, hidden)
        parameters = (weight, weight[:, 0], weight.t().contiguous(), x[0], x[0], x[0])
        return ops.split_feed_forward_block(x, x[:0], parameters, None, backend="cuda")

    with pytest.raises(RuntimeError, match="its products take fp16 and bf16, got torch.float32"):
        block(16, 32, torch.float32)
    with pytest.raises(RuntimeError, match=r"widths that are multiples of 8, got \[36\]"):
        block(16, 36, torch.bfloat16)
