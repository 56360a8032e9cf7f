"""The fused sub-layers against the reference composition, with every gradient."""

import functools
import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qformer_fast import Mask, SequenceLayout, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
HIDDEN, NHEADS, WIDE, QUERIES, IMAGES, TOKENS = 32, 2, 48, 5, 3, 17
ATTENTION = ["qkv_weight", "qkv_bias", "out_weight", "out_bias", "norm_weight", "norm_bias"]
CROSS = ["q_weight", "q_bias", *ATTENTION[2:]]
FEED_FORWARD = ["up_weight", "up_bias", "down_weight", "down_bias", "norm_weight", "norm_bias"]
SHAPES = {
    "qkv_weight": (3 * HIDDEN, HIDDEN),
    "qkv_bias": (3 * HIDDEN,),
    "q_weight": (HIDDEN, HIDDEN),
    "q_bias": (HIDDEN,),
    "out_weight": (HIDDEN, HIDDEN),
    "out_bias": (HIDDEN,),
    "up_weight": (WIDE, HIDDEN),
    "up_bias": (WIDE,),
    "down_weight": (HIDDEN, WIDE),
    "down_bias": (HIDDEN,),
    "norm_weight": (HIDDEN,),
    "norm_bias": (HIDDEN,),
}


@pytest.fixture
def layout():
    return SequenceLayout.build(
        num_queries=QUERIES,
        image_index=[2, 0, 2],
        text_lengths=[4, 0, 9, 6],
        masks=[Mask.MULTIMODAL_CAUSAL, Mask.BIDIRECTIONAL, Mask.BIDIRECTIONAL, Mask.UNIMODAL],
        num_images=IMAGES,
        device=DEVICE,
    )


def draw(names, dtype=torch.float32):
    scale = {name: HIDDEN**-0.5 if name.endswith("weight") else 0.3 for name in names}
    tensors = {name: torch.randn(SHAPES[name], device=DEVICE) * scale[name] for name in names}
    tensors["norm_weight"] = 1 + tensors["norm_weight"]
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def blocks(layout):
    """Of each block: rows and other inputs as drawn tensors, and a call of an implementation on them."""
    rows = torch.randn(layout.num_rows, HIDDEN, device=DEVICE)
    query_rows = torch.randn(layout.num_query_rows, HIDDEN, device=DEVICE)
    k, v = torch.randn(2, IMAGES, TOKENS, NHEADS, HIDDEN // NHEADS, device=DEVICE)
    query, text = draw(FEED_FORWARD), draw(FEED_FORWARD)
    both = {f"query_{name}": x for name, x in query.items()} | {f"text_{name}": x for name, x in text.items()}

    def feed_forward(run, query_rows, text_rows, *parameters, **options):
        return run(query_rows, text_rows, parameters[:6], parameters[6:], eps=1e-6, **options)

    return {
        "self_attention_block": (
            {"rows": rows} | draw(ATTENTION),
            lambda run, rows, *parameters, **options: run(
                rows, layout, *parameters, nheads=NHEADS, eps=1e-6, **options
            ),
        ),
        "cross_attention_block": (
            {"query_rows": query_rows, "k": k, "v": v} | draw(CROSS),
            lambda run, rows, k, v, *parameters, **options: run(rows, k, v, layout, *parameters, eps=1e-6, **options),
        ),
        "split_feed_forward_block": (
            {"query_rows": query_rows, "text_rows": rows[layout.num_query_rows :]} | both,
            feed_forward,
        ),
    }


BLOCKS = ["self_attention_block", "cross_attention_block", "split_feed_forward_block"]


def gradients(call, run, inputs, dout, **options):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = call(run, *inputs.values(), **options)
    found = torch.autograd.grad(out, list(inputs.values()), dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(inputs, found, strict=True))


def hold_to_values(found, expected):
    """A key projection's bias shifts all scores alike, so its true gradient is zero: held to the value's scale."""
    if "qkv_bias" in found:
        for results in (found, *expected):
            _, dkey, dvalue = results["qkv_bias"].chunk(3)
            assert results is not found or dkey.abs().max() <= 0.05 * dvalue.abs().max()
            dkey.zero_()


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("name", BLOCKS)
def test_forward_and_gradients(name, dtype, layout, assert_close):
    inputs, call = blocks(layout)[name]
    inputs = {key: x.to(dtype) for key, x in inputs.items()}
    dout = torch.randn(layout.num_query_rows if "cross" in name else layout.num_rows, HIDDEN, device=DEVICE).to(dtype)
    actual = gradients(call, getattr(ops, name), inputs, dout, backend="triton")
    low = gradients(call, getattr(reference, name), inputs, dout)
    exact = {key: x.double() for key, x in inputs.items()}
    high = gradients(call, getattr(reference, name), exact, dout.double())
    hold_to_values(actual, (low, high))
    assert_close(actual, low, high)


@pytest.mark.parametrize("rows", ["queries", "text"])
def test_feed_forward_of_one_kind_of_rows(rows, layout, assert_close):
    given = torch.randn(7, HIDDEN, device=DEVICE)
    parameters = draw(FEED_FORWARD)

    def call(run, given, *parameters, **options):
        empty = given[:0]
        if rows == "queries":
            return run(given, empty, parameters, None, eps=1e-6, **options)
        return run(empty, given, None, parameters, eps=1e-6, **options)

    inputs, dout = {"rows": given} | parameters, torch.randn(7, HIDDEN, device=DEVICE)
    actual = gradients(call, ops.split_feed_forward_block, inputs, dout, backend="triton")
    low = gradients(call, reference.split_feed_forward_block, inputs, dout)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(actual, low, gradients(call, reference.split_feed_forward_block, exact, dout.double()))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_kept_graph_goes_back_twice(name, p, layout):
    """Only where autograd frees what forward saved may backward write to it."""
    inputs, call = blocks(layout)[name]
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    dropout = ["dropout_p"] if "feed" in name else ["attention_dropout_p", "hidden_dropout_p"]
    out = call(getattr(ops, name), *inputs.values(), **dict.fromkeys(dropout, p), backend="triton")
    dout = torch.randn_like(out)
    kept, again = (torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(out, list(inputs.values()), dout)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, again, last, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_with_dropout_are_those_of_the_formula(name, layout, assert_close):
    """The kernels in fp32 and the formula in fp64 drop the same elements when their seeds are the same."""
    inputs, call = blocks(layout)[name]
    dout = torch.randn(layout.num_query_rows if "cross" in name else layout.num_rows, HIDDEN, device=DEVICE)
    implementation = importlib.import_module(f"qformer_fast.ops.{name}")._kernels

    def run(*args, **options):
        torch.manual_seed(5)
        if name == "split_feed_forward_block":
            return implementation(*args, **options, dropout_p=0.3)
        masks = {} if name == "self_attention_block" else {"image_mask": None}
        return implementation(*args, **options, **masks, attention_dropout_p=0.3, hidden_dropout_p=0.2)

    actual = gradients(call, run, inputs, dout)
    high = gradients(call, run, {key: x.double() for key, x in inputs.items()}, dout.double())
    hold_to_values(actual, (high,))
    assert_close(actual, high, high, atol=1e-5)
    none = gradients(call, getattr(reference, name), inputs, dout)
    assert (actual["out"] - none["out"]).abs().max() > 0.05


@pytest.mark.parametrize("keep", [False, True])
def test_feed_forward_backward_writes_over_what_forward_kept(keep, layout, monkeypatch):
    inputs, call = blocks(layout)["split_feed_forward_block"]
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    module = importlib.import_module("qformer_fast.ops.split_feed_forward_block")
    kept, op = [], module.split_feed_forward_block_fwd
    monkeypatch.setattr(module, "split_feed_forward_block_fwd", lambda *args: kept.append(op(*args)) or kept[0])
    out = call(ops.split_feed_forward_block, *inputs.values(), dropout_p=0.0, backend="triton")
    (_, up, x, *_), before = kept[0], [y.clone() for y in kept[0]]
    torch.autograd.grad(out, list(inputs.values()), torch.randn_like(out), retain_graph=keep)
    assert torch.equal(up, before[1]) == torch.equal(x, before[2]) == keep


@pytest.mark.parametrize("name", BLOCKS)
def test_under_gradient_checkpointing(name, layout):
    """What forward kept is made again, with the same dropout, and may be read once."""
    inputs, call = blocks(layout)[name]
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    dropout = ["dropout_p"] if "feed" in name else ["attention_dropout_p", "hidden_dropout_p"]
    options = dict.fromkeys(dropout, 0.25) | {"backend": "triton"}
    found = []
    for run in (lambda f, *x: f(*x), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(3)
        out = run(lambda *x: call(getattr(ops, name), *x, **options), *inputs.values())
        dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        found.append([out, *torch.autograd.grad(out, list(inputs.values()), dout)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("name", BLOCKS)
def test_captured_in_a_graph(name, layout):
    """Query and text rows go side by side there."""
    inputs, call = blocks(layout)[name]
    dout = torch.randn(layout.num_query_rows if "cross" in name else layout.num_rows, HIDDEN, device=DEVICE)
    op, stream, graph = getattr(ops, name), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = gradients(call, op, inputs, dout)
        with torch.cuda.graph(graph, stream=stream):
            found = gradients(call, op, inputs, dout)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    assert [key for key, x in expected.items() if not torch.equal(found[key], x)] == []


@pytest.mark.parametrize("first", ["added", "written"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_added_to_what_is_given(name, p, first, layout):
    """bf16 weights whose gradients are fp32; keys' and values' are written to, then added to, slices of a buffer."""
    inputs, call = blocks(layout)[name]
    inputs = {key: x if x.ndim == 1 else x.bfloat16() for key, x in inputs.items()}
    dout = torch.randn(layout.num_query_rows if "cross" in name else layout.num_rows, HIDDEN, device=DEVICE)
    options = {"backend": "triton"}
    options |= {"dropout_p": p} if "feed" in name else {"attention_dropout_p": p, "hidden_dropout_p": p}

    def run(*args, **more):
        torch.manual_seed(5)
        return getattr(ops, name)(*args, **options, **more)

    expected = gradients(call, run, inputs, dout)
    parameters = [key for key in inputs if key.endswith(("weight", "bias"))]
    start = {key: torch.randn(inputs[key].shape, device=DEVICE) for key in parameters}
    totals = {key: x.clone() for key, x in start.items()}
    if first == "written":
        start = {key: torch.zeros_like(x) for key, x in start.items()}
        for x in totals.values():
            x.fill_(torch.nan)
    given = list(totals.values())
    more = {"gradients": [given[:6], given[6:]] if "feed" in name else given}
    if "cross" in name:
        buffer = torch.full((*inputs["k"].shape[:2], 4, *inputs["k"].shape[2:]), torch.nan, device=DEVICE).bfloat16()
        more |= {"kv_gradients": (buffer[:, :, 1], buffer[:, :, 3])}
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    for time in (1, 2):
        more["add_gradients"] = first == "added" or time == 2
        if "cross" in name:
            more["accumulate"] = time == 2
        out = call(run, *leaves.values(), **more)
        out.backward(dout.to(out.dtype))
        rows = [key for key in inputs if key.endswith("rows")]
        assert all((leaves[key].grad is None) == (key not in rows) for key in inputs)
        actual = {key: (totals[key] - start[key]) / time for key in parameters}
        if "cross" in name:
            actual |= {"k": buffer[:, :, 1] / time, "v": buffer[:, :, 3] / time}
        for key, x in actual.items():
            scale = max(float(expected[key].abs().max()), 0.05)
            assert float((x - expected[key]).abs().max()) <= 0.02 * scale, key
    for key in rows:
        torch.testing.assert_close(leaves[key].grad, 2 * expected[key])


@pytest.mark.parametrize("used", ["both", "queries", "text"])
def test_self_attention_gives_query_and_text_rows_apart(used, layout):
    """As a cut through the rows together, also where only one part is read."""
    inputs, call = blocks(layout)["self_attention_block"]
    counts = layout.num_query_rows, layout.num_text_rows
    weights = [torch.randn(n, HIDDEN, device=DEVICE) for n in counts]
    read = {"both": (0, 1), "queries": (0,), "text": (1,)}[used]

    def run(split):
        leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
        torch.manual_seed(5)
        options = {"attention_dropout_p": 0.25, "hidden_dropout_p": 0.25, "backend": "triton"}
        out = call(ops.self_attention_block, *leaves.values(), **options, **({"split": True} if split else {}))
        parts = out if split else out.split(counts)
        assert [len(part) for part in parts] == list(counts)
        found = torch.autograd.grad(sum((parts[i] * weights[i]).sum() for i in read), list(leaves.values()))
        return [*parts, *found]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_that_do_not_fit_are_named(name, layout):
    inputs, call = blocks(layout)[name]
    parameters = [x for key, x in inputs.items() if key.endswith(("weight", "bias"))][:6]

    def run(totals):
        totals = [totals, None] if "feed" in name else totals
        return call(getattr(ops, name), *inputs.values(), gradients=totals)

    with pytest.raises(ValueError, match=r"gradients(\[\d\])? must be 6 tensors, got"):
        run(parameters[1:])
    with pytest.raises(ValueError, match=r"gradients(\[\d\])?\[0\] must be"):
        run([parameters[0][1:], *parameters[1:]])
    with pytest.raises(TypeError, match=r"gradients(\[\d\])?\[0\] must be torch.float32 or fp32, got torch.float64"):
        run([parameters[0].double(), *parameters[1:]])
    with pytest.raises(ValueError, match=r"gradients(\[\d\])?\[0\] must be contiguous"):
        run([parameters[0].t().contiguous().t(), *parameters[1:]])


def test_gradients_of_keys_and_values_that_do_not_fit_are_named(layout):
    inputs, call = blocks(layout)["cross_attention_block"]
    k = inputs["k"]

    def run(*kv_gradients):
        return call(ops.cross_attention_block, *inputs.values(), kv_gradients=kv_gradients)

    with pytest.raises(ValueError, match="kv_gradients must be 2 tensors, got 1"):
        run(k)
    with pytest.raises(ValueError, match=r"kv_gradients\[1\] must be"):
        run(k, k[1:])
    with pytest.raises(TypeError, match=r"kv_gradients\[0\] must be torch.float32 or fp32, got torch.bfloat16"):
        run(k.bfloat16(), k)
    with pytest.raises(ValueError, match="kv_gradients must have heads contiguous and equal strides"):
        run(k, k.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_keeps_fp32_parameters_and_their_gradients(name, layout):
    inputs, call = blocks(layout)[name]
    dout = torch.randn(layout.num_query_rows if "cross" in name else layout.num_rows, HIDDEN, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(call, getattr(ops, name), inputs, dout, backend="triton")
    assert found.pop("out").dtype == torch.bfloat16
    assert {x.dtype for x in found.values()} == {torch.float32}


ALSO_SPLIT = pytest.mark.parametrize(
    "name, options", [*((name, {}) for name in BLOCKS), ("self_attention_block", {"split": True})]
)


@ALSO_SPLIT
def test_compiles_without_a_graph_break(name, options, layout):
    inputs, call = blocks(layout)[name]

    def twice(*tensors):
        out = call(getattr(ops, name), *tensors, backend="triton", **options)
        return 2 * (torch.cat(out) if options else out)

    compiled = torch.compile(twice, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs.values()), twice(*inputs.values()))


@ALSO_SPLIT
def test_opcheck(name, options, layout, monkeypatch):
    inputs, call = blocks(layout)[name]
    module = importlib.import_module(f"qformer_fast.ops.{name}")
    seen = []
    op = getattr(module, f"{name}_fwd")
    monkeypatch.setattr(module, f"{name}_fwd", lambda *args: seen.append(args) or op(*args))
    call(getattr(ops, name), *[x.requires_grad_() for x in inputs.values()], backend="triton", **options)
    # without leave to overwrite what is kept for backward, which opcheck compares after backward; add_gradients, also
    # False then, says nothing without gradients; the last argument is whether there is a backward
    args = [*(False if x is True else x for x in seen[0][:-1]), True]
    torch.library.opcheck(getattr(torch.ops.qformer_fast, f"{name}_fwd").default, args)
