"""Correctness first, then time: every provider of an op on the same inputs, against the floor of the machine.

A provider is timed only if its result and all its gradients are as close to fp64 as eager PyTorch's are. On a GPU a
CUDA graph of many calls is replayed; the calls take turns with copies of the inputs that together exceed the L2 cache
twice (256 copies at most: tiny inputs stay warm), and each writes memory of its own. Short calls and long ones, single
products too, keep the GPU busy for about as long, since its clock sinks within milliseconds. "fwd" is a training
forward, which keeps what backward needs. On a CPU: wall time, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]

MODES = ("fwd", "bwd", "fwd_bwd")
FACTOR = 2
COPIES = (2, 256)
SAMPLE_US = 2000
SLEEP_CYCLES = 2_000_000
# a time takes this long, unless that is fewer samples than FEWEST
SECONDS, FEWEST = 0.5, 10


def _same(x):
    return x


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Args:
        op, shape (str): the op's public name and what tells its sizes apart.
        make (Callable): ``make(new)`` draws fresh inputs by name; ``new(*shape, std=1.0)`` draws a normal tensor.
        options (dict): the op's other arguments.
        dropout_names (tuple): which arguments take the dropout probability.
        dropouts (tuple): the probabilities to time.
        modes (tuple): of ``MODES``; only "fwd" where there are no gradients.
        rows_read (dict): input that is a table -> rows of it that are read.
        flops (tuple): of forward and of backward, those of matrix products.
        gemms (tuple): (rows, out, in) of the op's own linear layers.
        check (Callable, Optional): ``check(inputs, out)`` -> what is wrong or None, where results are random.
        adapt (Callable): from the op's function to one that takes ``make``'s inputs by name.
    """

    op: str
    shape: str
    make: Callable[[Callable[..., Tensor]], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    dropout_names: tuple[str, ...] = ()
    dropouts: tuple[float, ...] = (0.0,)
    modes: tuple[str, ...] = MODES
    rows_read: dict[str, int] = field(default_factory=dict)
    flops: tuple[float, float] = (0.0, 0.0)
    gemms: tuple[tuple[int, int, int], ...] = ()
    check: Callable[[Inputs, Tensor], str | None] | None = None
    adapt: Callable[[Callable], Callable] = _same

    def call(self, function: Callable, inputs: Inputs, dropout_p: float, **others: Any) -> Tensor:
        return self.adapt(function)(**inputs, **self.options, **dict.fromkeys(self.dropout_names, dropout_p), **others)


@dataclass(frozen=True)
class Provider:
    """One implementation of a case.

    Args:
        run (Callable): ``run(inputs, dropout_p)`` -> out.
        prepare (Callable): from the op's inputs to the provider's own; differentiable, not timed.
        restore (Callable): from the provider's out to the op's; differentiable, not timed.
        capturable (bool): False where it waits for the device, so that no CUDA graph can hold it.
    """

    run: Callable[[Inputs, float], Tensor]
    prepare: Callable[[Inputs], Inputs] = _same
    restore: Callable[[Tensor], Tensor] = _same
    capturable: bool = True


@dataclass(frozen=True)
class Setup:
    """Where and how exactly to measure.

    Args:
        device (str): "cuda" or "cpu".
        dtype (torch.dtype): of all floating-point inputs.
        repeats (int): samples of each time, fewer where they take long.
    """

    device: str
    dtype: torch.dtype
    repeats: int

    def new(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * std

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own: what a graph captures must not wait for the default one."""
        if self.device == "cpu":
            yield
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            yield
        torch.cuda.synchronize()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_in_a_row(run: Callable[[], Any], times: int, device: str) -> float:
    """Of one of ``times`` runs between which the device has no rest."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / times


def graph_pools() -> int:
    """Bytes that CUDA graphs hold, which no statistic of live tensors counts."""
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))


def bytes_floor(case: Case, inputs: Inputs, out: Tensor, mode: str, dropout_p: float) -> int:
    """The fewest bytes that any implementation moves: each input read once, each output written once.

    - fwd reads the inputs and writes out.
    - bwd reads the inputs and dout and writes a gradient for every floating-point input, tables in full.
    - fwd_bwd is the sum of both: dout comes after out, so the inputs are read twice.
    - Of a table that rows are gathered from, the rows that occur are read (``Case.rows_read``).
    - dropout_add_layer_norm without dropout: the gradients of x and of residual are one tensor.
    - Nothing of the intermediate results counts, nor do saved activations, masks or softmax statistics.
    """
    read = sum(x[: case.rows_read.get(name)].nbytes for name, x in inputs.items())
    fwd = read + out.nbytes
    written = sum(x.nbytes for x in inputs.values() if x.is_floating_point())
    if case.op == "dropout_add_layer_norm" and dropout_p == 0:
        written -= inputs["residual"].nbytes
    bwd = read + out.nbytes + written
    return {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd}[mode]


def measure(
    case: Case, reference: Provider, providers: dict[str, Provider], setup: Setup, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Records of every provider, dropout probability and mode; one record with an "error" for a provider that fails."""
    gate = Gate(case, reference, setup)
    label = {"op": case.op, "shape": case.shape, "dtype": str(setup.dtype).split(".")[1]}
    records = []
    for name, provider in providers.items():
        try:
            with _warnings_as_reason():
                max_error = gate(provider)
                for row in time_provider(case, provider, setup):
                    records.append({**label, "provider": name, **row, "max_error": max_error})
        except Exception as error:
            records.append({**label, "provider": name, "error": " ".join(f"{type(error).__name__}: {error}".split())})
    for row in records:
        if "error" not in row:
            floor = bytes_floor(case, gate.inputs, gate.out, row["mode"], row["dropout_p"])
            row |= _rates(case, row["mode"], row["p50_us"], floor, ceilings)
    gemms = [{"mode": mode, "dropout_p": 0.0, **time_gemms(case, mode, setup)} for mode in case.modes if case.gemms]
    return records + [{**label, "provider": "gemms", **row} for row in gemms]


def time_provider(case: Case, provider: Provider, setup: Setup) -> Iterator[dict[str, Any]]:
    """Times and peak memory of every dropout probability and mode."""
    for dropout_p in case.dropouts:
        peak = peak_mib(case, provider, dropout_p, setup)
        for mode in case.modes:
            yield {
                "mode": mode,
                "dropout_p": dropout_p,
                **time_mode(case, provider, mode, dropout_p, setup),
                "peak_mib": peak,
            }


class Gate:
    """What fp64 and eager PyTorch compute for one draw of a case's inputs, and how far others may be from it."""

    def __init__(self, case: Case, reference: Provider, setup: Setup) -> None:
        self.case = case
        self.inputs = case.make(setup.new)
        with torch.no_grad():
            self.out = reference.run(self.inputs, 0.0)
        if case.check:
            return
        self.dout = torch.randn_like(self.out)
        exact = {name: x.double() if x.is_floating_point() else x for name, x in self.inputs.items()}
        self.truth = self._results(reference, exact)
        plain = self._results(reference, self.inputs)
        self.scale = {name: float(x.abs().max().clamp_min(1e-30)) for name, x in self.truth.items()}
        atol = max(1e-6, torch.finfo(setup.dtype).eps / 2)
        self.allowed = {name: FACTOR * self._error(name, x) + atol for name, x in plain.items()}

    def __call__(self, provider: Provider) -> float | None:
        """The provider's largest error, relative to the largest value of the same result.

        Raises:
            ValueError: an error of more than twice eager's, plus half a unit in the last place of the largest value.
        """
        if self.case.check:
            out = provider.restore(provider.run(provider.prepare(self.inputs), 0.0))
            if wrong := self.case.check(self.inputs, out):
                raise ValueError(wrong)
            return None
        errors = {name: self._error(name, x) for name, x in self._results(provider, self.inputs).items()}
        for name, error in errors.items():
            if not error <= self.allowed[name]:
                raise ValueError(f"{name} has error {error:.3g}, allowed {self.allowed[name]:.3g}")
        return max(errors.values())

    def _results(self, provider: Provider, inputs: Inputs) -> Inputs:
        inputs = _leaves(inputs)
        out = provider.restore(provider.run(provider.prepare(inputs), 0.0))
        wanted = {name: x for name, x in inputs.items() if x.requires_grad}
        gradients = torch.autograd.grad(out, list(wanted.values()), self.dout.to(out.dtype))
        return {"out": out.detach(), **{f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}}

    def _error(self, name: str, x: Tensor) -> float:
        truth = self.truth[name]
        if x.shape != truth.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(truth.shape)}")
        return float((x.double() - truth).abs().max()) / self.scale[name]


@contextlib.contextmanager
def _warnings_as_reason() -> Iterator[None]:
    """SDPA says in warnings why a kernel of its can't run, and raises an error without the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            reasons = dict.fromkeys(str(w.message).split(" (Triggered")[0] for w in caught)
            raise RuntimeError(" ".join([str(error), *reasons])) from error


def _leaves(inputs: Inputs) -> Inputs:
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}


def make_arm(
    case: Case, provider: Provider, mode: str, dropout_p: float, setup: Setup
) -> Callable[[], list[Callable[[], Any]]]:
    """A function that returns the calls to time; for "bwd" it runs the forwards that they go back through.

    On a GPU there is a call for each of enough copies of the inputs to be cold.
    """
    sets = [_leaves(provider.prepare(case.make(setup.new)))]
    if setup.device == "cuda":
        l2 = torch.cuda.get_device_properties().L2_cache_size
        copies = math.ceil(2 * l2 / sum(x.nbytes for x in sets[0].values()))
        copies = min(max(COPIES[0], copies), COPIES[1])
        sets += [_leaves(provider.prepare(case.make(setup.new))) for _ in range(copies - 1)]
    if mode == "fwd":
        calls = [lambda inputs=inputs: provider.run(inputs, dropout_p) for inputs in sets]
        return lambda: calls
    # a loss is the end of a training step: its gradient is one
    out = provider.run(sets[0], dropout_p)
    dout = torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out)

    def backward(out: Tensor, inputs: Inputs) -> Any:
        return torch.autograd.grad(out, [x for x in inputs.values() if x.requires_grad], dout)

    if mode == "fwd_bwd":
        calls = [lambda inputs=inputs: backward(provider.run(inputs, dropout_p), inputs) for inputs in sets]
        return lambda: calls
    return lambda: [functools.partial(backward, provider.run(inputs, dropout_p), inputs) for inputs in sets]


def sampler(arm: Callable, mode: str, capturable: bool, setup: Setup) -> tuple[str, Callable[[], float]]:
    """How time is taken ("graph", "events" or "wall"), and a function that measures once: microseconds a call.

    A graph repeats the calls to last about ``SAMPLE_US``.
    """
    for call in arm():
        call()
    if setup.device == "cpu":
        return "wall", lambda: _per_call(arm(), _wall)
    if not capturable:
        return "events", lambda: _per_call(arm(), between_events)
    calls, sample = _capture(arm, mode, 1)
    sample()
    rounds = round(SAMPLE_US / (sample() * calls))
    return "graph", _capture(arm, mode, rounds)[1] if rounds > 1 else sample


def _capture(arm: Callable, mode: str, rounds: int) -> tuple[int, Callable[[], float]]:
    """How many calls a CUDA graph of ``rounds`` times ``arm``'s has, and a function that measures it once."""
    torch.cuda.synchronize()
    stream, graph, forward = torch.cuda.current_stream(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    if mode != "bwd":
        calls = arm() * rounds
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
        del kept
        return len(calls), lambda: between_events(graph.replay) / len(calls)
    # the forwards are a graph of their own, replayed before each sample and not timed
    with torch.cuda.graph(forward, stream=stream):
        calls = [call for _ in range(rounds) for call in arm()]
    with torch.cuda.graph(graph, pool=forward.pool(), stream=stream):
        kept = [call() for call in calls]
    del kept

    def sample() -> float:
        forward.replay()
        return between_events(graph.replay) / len(calls)

    return len(calls), sample


def _per_call(calls: list[Callable], clock: Callable[[Callable], float]) -> float:
    return clock(lambda: [call() for call in calls]) / len(calls)


def _wall(work: Callable) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e6


def between_events(work: Callable, sleep_cycles: int = SLEEP_CYCLES) -> float:
    """Microseconds on the device; it sleeps first, so that it never waits for the launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(sleep_cycles)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _time(arm: Callable, mode: str, capturable: bool, setup: Setup) -> dict[str, Any]:
    timing, sample = sampler(arm, mode, capturable, setup)
    begin = time.perf_counter()
    sample()
    fitting = int(SECONDS / (time.perf_counter() - begin))
    samples = [sample() for _ in range(min(setup.repeats, max(FEWEST, fitting)))]
    p20, p50, p80 = (statistics.quantiles(samples, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"p20_us": _digits(p20), "p50_us": _digits(p50), "p80_us": _digits(p80), "timing": timing}


def _digits(x: float) -> float:
    return float(f"{x:.5g}")


def time_mode(case: Case, provider: Provider, mode: str, dropout_p: float, setup: Setup) -> dict[str, Any]:
    """p20_us, p50_us, p80_us, and "timing": how they were taken; "events" includes the host's launches."""
    if provider.capturable:
        try:
            with setup.stream():
                return _time(make_arm(case, provider, mode, dropout_p, setup), mode, True, setup)
        except RuntimeError as error:
            if setup.device == "cpu" or "captur" not in str(error):
                raise
    with setup.stream():
        return _time(make_arm(case, provider, mode, dropout_p, setup), mode, False, setup)


# the product that gives a linear layer's out, dx or dweight -> shapes of its factors, from (rows, out, in), and itself
PRODUCTS: dict[str, tuple[Callable, Callable]] = {
    "out": (lambda rows, out, width: ((rows, width), (out, width)), lambda x, weight: x @ weight.T),
    "dx": (lambda rows, out, width: ((rows, out), (out, width)), lambda dout, weight: dout @ weight),
    "dweight": (lambda rows, out, width: ((rows, out), (rows, width)), lambda dout, x: dout.T @ x),
}


def time_gemms(case: Case, mode: str, setup: Setup) -> dict[str, Any]:
    """As ``time_mode``: the sum over the matrix products of the case's linear layers, each timed by itself."""
    names = ["out"] * ("fwd" in mode) + ["dx", "dweight"] * ("bwd" in mode)
    return time_products(Counter((name, shape) for shape in case.gemms for name in names), setup)


def time_products(products: Counter[tuple[str, tuple[int, int, int]]], setup: Setup) -> dict[str, Any]:
    """As ``time_mode``: the sum over (key of ``PRODUCTS``, (rows, out, in)), each distinct one timed once."""
    total, timing = Counter(), ""
    for (name, shape), count in products.items():
        factors, multiply = PRODUCTS[name]
        shapes = factors(*shape)
        part = Case("gemm", "", lambda new, shapes=shapes: {"a": new(*shapes[0]), "b": new(*shapes[1])})
        provider = Provider(lambda inputs, _, multiply=multiply: multiply(inputs["a"].detach(), inputs["b"].detach()))
        found = time_mode(part, provider, "fwd", 0.0, setup)
        timing = found.pop("timing")
        total.update({key: count * value for key, value in found.items()})
    return {**{key: _digits(value) for key, value in total.items()}, "timing": timing}


def peak_mib(case: Case, provider: Provider, dropout_p: float, setup: Setup) -> float | None:
    """Device memory of one forward and backward, inputs aside."""
    if setup.device == "cpu":
        return None
    call = make_arm(case, provider, case.modes[-1], dropout_p, setup)()[0]
    call()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return _digits(peak / 2**20)


def measure_ceilings(setup: Setup) -> dict[str, float]:
    """What the machine reaches at best: bytes read and written a second by a copy, operations of a large product."""
    on_gpu = setup.device == "cuda"
    size, width = (2**29, 8192) if on_gpu else (2**20, 128)
    with setup.stream():
        source = torch.ones(size, device=setup.device, dtype=torch.int16)
        target = torch.empty_like(source)
        copied = _time(lambda: [lambda: target.copy_(source)], "fwd", True, setup)["p50_us"]
        a, b = setup.new(width, width), setup.new(width, width)
        multiplied = _time(lambda: [lambda: a @ b], "fwd", True, setup)["p50_us"]
    return {"gb_s": _digits(2 * source.nbytes / copied / 1e3), "tflop_s": _digits(2 * width**3 / multiplied / 1e6)}


def _rates(case: Case, mode: str, p50_us: float, floor: int, ceilings: dict[str, float]) -> dict[str, Any]:
    fwd, bwd = case.flops
    flops = {"fwd": fwd, "bwd": bwd, "fwd_bwd": fwd + bwd}[mode]
    floor_us = max(floor / ceilings["gb_s"] / 1e3, flops / ceilings["tflop_s"] / 1e6)
    return {
        "bytes": floor,
        "flops": flops,
        "gb_s": _digits(floor / p50_us / 1e3),
        "tflop_s": _digits(flops / p50_us / 1e6),
        "floor_us": _digits(floor_us),
        "floor_ratio": _digits(p50_us / floor_us),
    }
