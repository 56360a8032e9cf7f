"""The Triton kernels of query_text_attention, one tile a sequence and streamed."""

import pytest
import torch

from qformer_fast import Mask, SequenceLayout, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = [Mask.MULTIMODAL_CAUSAL, Mask.BIDIRECTIONAL, Mask.UNIMODAL, Mask.MULTIMODAL_CAUSAL, Mask.UNIMODAL]


def build(num_queries, query_sequences, lengths):
    return SequenceLayout.build(
        num_queries=num_queries,
        image_index=[0] * query_sequences,
        text_lengths=lengths,
        masks=MASKS[: len(lengths)],
        num_images=1,
        device=DEVICE,
    )


# four, two and one head in a tile of 64 rows; then streamed
LAYOUTS = {
    "tiny": lambda: build(3, 2, [4, 0, 5]),
    "one-token": lambda: build(0, 0, [1]),
    "blip2": lambda: build(32, 3, [18, 0, 32, 7, 20]),
    "64-queries-no-text": lambda: build(64, 1, [0]),
    "100-queries": lambda: build(100, 2, [5, 33, 60]),
    "long-text": lambda: build(3, 1, [150, 70]),
}
HEADS = {"2x16": (2, 16), "1x64": (1, 64), "3x20": (3, 20)}


def inputs(layout, heads, dtype):
    qkv = torch.randn(layout.num_rows, 3, *heads, device=DEVICE).to(dtype)
    return qkv, torch.randn(layout.num_rows, *heads, device=DEVICE).to(dtype)


def run(op, qkv, dout):
    qkv = qkv.detach().requires_grad_()
    out = op(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    return {"out": out.detach(), "dq": dqkv[:, 0], "dk": dqkv[:, 1], "dv": dqkv[:, 2]}


def arguments(layout, seed, scale, dropout_p):
    return (
        layout.text_offsets, layout.masks, seed, layout.num_query_sequences, layout.num_queries,
        layout.max_text_length, scale, dropout_p,
    )  # fmt: skip


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_and_gradients(name, dtype, assert_close):
    layout, heads = LAYOUTS[name](), HEADS["1x64" if name == "blip2" else "2x16"]
    qkv, dout = inputs(layout, heads, dtype)
    actual = run(lambda x: ops.query_text_attention(x, layout, softmax_scale=0.3, backend="triton"), qkv, dout)
    low = run(lambda x: reference.query_text_attention(x, layout, softmax_scale=0.3), qkv, dout)
    high = run(lambda x: reference.query_text_attention(x, layout, softmax_scale=0.3), qkv.double(), dout.double())
    assert_close(actual, low, high)


@pytest.mark.parametrize("name", ["blip2", "100-queries"])
def test_head_dimension_that_is_no_power_of_two(name, assert_close):
    layout = LAYOUTS[name]()
    qkv, dout = inputs(layout, HEADS["3x20"], torch.float16)
    actual = run(lambda x: ops.query_text_attention(x, layout, backend="triton"), qkv, dout)
    low = run(lambda x: reference.query_text_attention(x, layout), qkv, dout)
    assert_close(actual, low, run(lambda x: reference.query_text_attention(x, layout), qkv.double(), dout.double()))


@pytest.mark.parametrize("name", ["tiny", "blip2", "100-queries"])
def test_dropout_equals_the_formula_with_the_same_mask(name, assert_close):
    layout = LAYOUTS[name]()
    qkv, dout = inputs(layout, HEADS["2x16"], torch.float32)
    others = arguments(layout, torch.tensor([11], device=DEVICE), 0.25, 0.3)
    op = torch.ops.qformer_fast.query_text_attention_fwd
    actual = run(lambda x: op(x, *others)[0], qkv, dout)
    high = run(lambda x: op(x, *others)[0], qkv.double(), dout.double())
    assert_close(actual, high, high, atol=2e-6)
    none = run(lambda x: op(x, *arguments(layout, None, 0.25, 0.0))[0], qkv, dout)
    assert (actual["out"] - none["out"]).abs().max() > 0.05


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["blip2", "100-queries"])
def test_same_result_twice(name, dropout_p):
    layout = LAYOUTS[name]()
    qkv, dout = inputs(layout, HEADS["2x16"], torch.float16)

    def once():
        torch.manual_seed(3)
        return run(lambda x: ops.query_text_attention(x, layout, dropout_p=dropout_p, backend="triton"), qkv, dout)

    first, *others = (once() for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_formula(dropout_p):
    layout = LAYOUTS["tiny"]()
    qkv = torch.randn(layout.num_rows, 3, 2, 4, device=DEVICE).double().requires_grad_()
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    others = arguments(layout, seed, 0.6, dropout_p)
    op = torch.ops.qformer_fast.query_text_attention_fwd
    assert torch.autograd.gradcheck(lambda x: op(x, *others)[0], (qkv,))
    if not dropout_p:
        plain = reference.query_text_attention(qkv, layout, softmax_scale=0.6)
        torch.testing.assert_close(op(qkv, *others)[0], plain)


def test_opcheck():
    layout = LAYOUTS["tiny"]()
    qkv, _ = inputs(layout, HEADS["2x16"], torch.float32)
    op = torch.ops.qformer_fast.query_text_attention_fwd.default
    torch.library.opcheck(op, (qkv.requires_grad_(), *arguments(layout, None, 0.25, 0.0)))


def test_compiles_without_a_graph_break():
    layout = LAYOUTS["tiny"]()
    qkv, _ = inputs(layout, HEADS["2x16"], torch.float32)

    def twice(qkv):
        return 2 * ops.query_text_attention(qkv, layout, backend="triton")

    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(qkv), twice(qkv))


def test_what_the_kernels_do_not_take():
    layout = SequenceLayout.build(
        num_queries=2,
        image_index=[0],
        text_lengths=[3],
        masks=Mask.BIDIRECTIONAL,
        num_images=1,
        attention_mask=torch.ones(1, 5, 5, dtype=torch.bool),
        device=DEVICE,
    )
    with pytest.raises(RuntimeError, match="can't run this query_text_attention: a layout with an attention_mask"):
        ops.query_text_attention(torch.zeros(5, 3, 1, 8, device=DEVICE), layout, backend="triton")
    with pytest.raises(RuntimeError, match="head dimensions up to 128, got 160"):
        layout = LAYOUTS["tiny"]()
        ops.query_text_attention(torch.zeros(layout.num_rows, 3, 1, 160, device=DEVICE), layout, backend="triton")
