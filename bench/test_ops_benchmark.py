"""pytest-benchmark over the ops: ``pytest bench/test_ops_benchmark.py --benchmark-json=out.json``; it needs a GPU.

What is reported is time on the device, for one call, with cold inputs. A provider that is less exact than it must be
or can't run is skipped with the reason. Select with -k: ops, modes, providers and shapes are in the names.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _cases import CASES, Sizes
from _harness import MODES, Gate, Setup, make_arm, sampler
from _providers import PROVIDERS, reference_provider

BATCHES = (8, 128)
ROUNDS = 50
SETUP = Setup("cuda", torch.bfloat16, ROUNDS)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU, this machine has none")


class DeviceClock:
    """A timer that advances only by what was measured on the device."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


clock = DeviceClock()


def _parameters() -> Iterator[pytest.param]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in BATCHES:
        for make in CASES.values():
            for case in make(Sizes(batch, device)):
                for dropout_p in case.dropouts:
                    for mode in case.modes:
                        name = f"{case.op}-{case.shape}-p{dropout_p}-{mode}"
                        yield pytest.param(case, dropout_p, mode, id=name)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(("case", "dropout_p", "mode"), _parameters())
def test_op(benchmark, case, dropout_p, mode, name):
    assert mode in MODES
    provider = PROVIDERS[name](case)
    if provider is None:
        pytest.skip(f"{name} has no {case.op}")
    try:
        error = Gate(case, reference_provider(case), SETUP)(provider)
        with SETUP.stream():
            arm = make_arm(case, provider, mode, dropout_p, SETUP)
            timing, sample = sampler(arm, mode, provider.capturable, SETUP)
    except Exception as reason:
        pytest.skip(f"{type(reason).__name__}: {reason}")

    def run() -> None:
        clock.seconds += sample() * 1e-6

    benchmark.group = f"{case.op} {case.shape} dropout {dropout_p} {mode}"
    benchmark.extra_info |= {"max_error": error, "timing": timing}
    with SETUP.stream():
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=3)
