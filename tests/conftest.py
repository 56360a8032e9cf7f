"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# without a GPU the kernels run under Triton's interpreter; it must be asked for before they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]
# the installed package is what is tested, also where pytest puts the root on the path
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

from qformer_fast import Blip2QFormer, QFormerConfig  # noqa: E402
from qformer_fast.backend import interpreting  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def original():
    """bench/_original.py: the original's own code, loaded by file path."""
    spec = importlib.util.spec_from_file_location("_original", ROOT / "bench" / "_original.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.why_missing():
        pytest.skip(module.why_missing())
    return module


TINY = dict(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
    encoder_hidden_size=48,
    num_query_tokens=8,
)


@pytest.fixture
def tiny_config() -> QFormerConfig:
    return QFormerConfig(**TINY)


def spread_weights(model: torch.nn.Module, std: float = 0.05) -> None:
    """Moves every parameter off its initial value, so that no bias is zero and no LayerNorm the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


@pytest.fixture
def tiny_model(tiny_config: QFormerConfig) -> Blip2QFormer:
    """A small stage-1 model in fp64 and eval mode, no parameter at its initial value."""
    model = Blip2QFormer(tiny_config, embed_dim=32).double().eval()
    spread_weights(model)
    return model


def make_captions(lengths: list[int], width: int, vocab_size: int = 30522) -> tuple[Tensor, Tensor]:
    """Random captions [CLS] ... [SEP], right-padded to ``width``: (batch, width) ids and mask."""
    input_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(input_ids, lengths, strict=True):
        row[:length] = torch.randint(1000, vocab_size, (length,))
        row[0], row[length - 1] = 101, 102
    return input_ids, (input_ids != 0).long()


@pytest.fixture(name="make_captions")
def _make_captions():
    return make_captions


@pytest.fixture(name="spread_weights")
def _spread_weights():
    return spread_weights


@pytest.fixture
def assert_close():
    """Compares a kernel's results with fp64, name by name; see :func:`_assert_close`."""
    return _assert_close


def _assert_close(
    actual: dict[str, Tensor], low: dict[str, Tensor], high: dict[str, Tensor], *, factor: float = 2, atol: float = 1e-6
) -> None:
    """The largest error to fp64 is at most ``factor`` times the error of plain PyTorch in the kernel's dtype + atol.

    Args:
        actual, low, high (dict): the kernel's results, plain PyTorch's in the same dtypes, and fp64's.
        atol (float): relative to the largest magnitude of ``high``; at least half a unit in the last place, which the
            rounding of an exact result may cost.
    """
    for name, x in actual.items():
        # the interpreter cuts fp32 off to bf16 where a GPU rounds: twice the error
        doubled = 2 if x.dtype == torch.bfloat16 and not x.is_cuda else 1
        expected, plain = high[name].double().cpu(), low[name].double().cpu()
        assert x.shape == expected.shape, f"{name} is {tuple(x.shape)}, expected {tuple(expected.shape)}"
        error = (x.double().cpu() - expected).abs()
        assert error.isfinite().all(), f"{name} has NaN or Inf"
        unit = max(atol, torch.finfo(x.dtype).eps / 2)
        allowed = doubled * factor * (plain - expected).abs().max() + unit * expected.abs().max().clamp_min(1e-3)
        at = error.flatten().argmax()
        assert error.max() <= allowed, (
            f"{name}: error {error.max():.3g} > {allowed:.3g} at {int(at)}: "
            f"{float(x.flatten()[at]):.6g} v. {float(expected.flatten()[at]):.6g}"
        )


@pytest.fixture
def poison():
    """Uninitialised memory is NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows a program for kernels of one: a program costs the interpreter milliseconds, however many rows it has."""
    if not interpreting():
        return
    from qformer_fast.kernels import launch

    settings = launch.settings

    def with_more_rows(kernel, device):
        found = settings(kernel, device)
        return found | {"BLOCK_M": 16} if found.get("BLOCK_M") == 1 else found

    monkeypatch.setattr(launch, "settings", with_more_rows)


@pytest.fixture(autouse=True)
def _interpreted_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter patches triton.language at each call inside a kernel; once a function is enough."""
    if not interpreting():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = functools.cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):
        patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def _interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bit patterns of bf16 operands; they are widened before its ``tl.dot``."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        data = interpreter._convert_float(x.data, language.bfloat16, language.float32, None)
        return interpreter.TensorHandle(data.view("float32"), language.float32)

    def create_dot(self, a, b, *others):
        return plain(self, widen(a), widen(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def assert_gradients_close():
    """Compares gradients name by name, relative to their norm.

    Where the true gradient is zero the same value projection's gradient is the scale: always for key biases, since
    softmax does not see a shift, and for what ``zero`` matches besides.
    """

    def check(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, zero: str = "$^") -> None:
        assert actual.keys() == expected.keys()
        errors = {}
        for name, gradient in actual.items():
            scale = expected[name]
            if name.endswith("key.bias") or re.search(zero, name):
                scale = expected[re.sub(r"(query|key)\.", "value.", name)]
            errors[name] = float((gradient - expected[name]).norm() / scale.norm().clamp_min(1e-30))
        worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert worst[0][1] <= tolerance, f"gradients differ by more than {tolerance}: {worst}"

    return check
