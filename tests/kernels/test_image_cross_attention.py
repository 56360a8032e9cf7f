"""The Triton kernels of image_cross_attention."""

import pytest
import torch

from qformer_fast import Mask, SequenceLayout, kernels, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# queries, images that the sequences look at, images, tokens, heads: images that no one or everyone looks at, more
# sequences or queries than a tile holds, one token, class token and whole blocks, blocks that are not full, wide heads
CASES = {
    "q3-17-tokens": (3, [1, 0, 1, 3], 4, 17, (2, 16)),
    "q8-one-token": (8, [0, 1], 2, 1, (2, 16)),
    "q32-257-tokens": (32, [1, 1, 0], 3, 257, (1, 64)),
    "q5-49-tokens": (5, [0, 0, 0], 1, 49, (3, 20)),
    "q40-33-tokens": (40, [2, 0], 3, 33, (2, 16)),
    "q33-all-on-one": (33, [1] * 7, 2, 65, (1, 32)),
    "q130-two-tiles": (130, [1, 0, 1], 2, 20, (1, 16)),
    "q4-300-tokens": (4, [1, 0, 1], 2, 300, (2, 16)),
    "q20-wide-heads": (20, [0, 1], 2, 40, (1, 80)),
}


def build(case, dtype, images=None):
    queries, index, num_images, tokens, heads = CASES[case]
    layout = SequenceLayout.build(
        num_queries=queries,
        image_index=index,
        text_lengths=[0] * len(index),
        masks=Mask.UNIMODAL,
        num_images=num_images,
        device=DEVICE,
    )
    q, dout = (torch.randn(len(index) * queries, *heads, device=DEVICE).to(dtype) for _ in range(2))
    buffer = torch.randn(num_images, tokens, 3, 2, *heads, device=DEVICE).to(dtype)
    return layout, q, buffer, dout


def run(op, q, buffer, dout):
    """Keys and values are layer 1's strided slices of the buffer of three layers."""
    q, buffer = q.detach().requires_grad_(), buffer.detach().requires_grad_()
    out = op(q, buffer[:, :, 1, 0], buffer[:, :, 1, 1])
    dq, dbuffer = torch.autograd.grad(out, (q, buffer), dout)
    return {"out": out.detach(), "dq": dq, "dk": dbuffer[:, :, 1, 0], "dv": dbuffer[:, :, 1, 1]}


def compare(assert_close, layout, q, buffer, dout, **options):
    actual = run(lambda *x: ops.image_cross_attention(*x, layout, backend="triton", **options), q, buffer, dout)
    low = run(lambda *x: reference.image_cross_attention(*x, layout, **options), q, buffer, dout)
    exact = [x.double() for x in (q, buffer, dout)]
    high = run(lambda *x: reference.image_cross_attention(*x, layout, **options), *exact)
    if buffer.shape[1] == 1:
        # the true dq and dk are zero, which has no scale of its own
        for name in ("dq", "dk"):
            assert actual.pop(name).abs().max() <= 0.05 * actual["dv"].abs().max()
    assert_close(actual, low, high)


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("multiprocessors", [1, 1000], ids=["many-heads", "few-heads"])
def test_forward_and_gradients(multiprocessors, case, dtype, assert_close, monkeypatch):
    """Few heads of images, for the device, take smaller tiles and several programs each."""
    monkeypatch.setattr(kernels.launch, "num_multiprocessors", lambda device: multiprocessors)
    compare(assert_close, *build(case, dtype))


@pytest.mark.parametrize("readers", ["one", "each"])
def test_masked_tokens(readers, assert_close):
    layout, q, buffer, dout = build("q5-49-tokens", torch.float16)
    mask = torch.rand(1, 1 if readers == "one" else 5, 49, device=DEVICE) > 0.4
    compare(assert_close, layout, q, buffer, dout, image_mask=mask)


def test_a_reader_that_sees_nothing_gives_zeros():
    layout, q, buffer, dout = build("q3-17-tokens", torch.float16)
    mask = torch.tensor([True, False, True, True], device=DEVICE)[:, None, None].expand(4, 1, 17)
    found = run(lambda *x: ops.image_cross_attention(*x, layout, image_mask=mask, backend="triton"), q, buffer, dout)
    blind = layout.image_index.repeat_interleave(3) == 1
    assert found["out"][blind].abs().max() == found["dq"][blind].abs().max() == 0
    assert found["dk"][1].abs().max() == found["dv"][1].abs().max() == 0
    assert all(x.isfinite().all() for x in found.values())
    assert found["out"][~blind].abs().min(-1).values.max() > 0


def arguments(layout, num_images, seed, dropout_p, image_mask=None):
    order = layout.sequences_by_image(num_images)
    return *order, image_mask, seed, layout.num_queries, 0.25, dropout_p


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", ["q3-17-tokens", "q40-33-tokens", "q5-49-tokens"])
def test_dropout_equals_the_formula_with_the_same_mask(case, masked, assert_close):
    layout, q, buffer, dout = build(case, torch.float16)
    images, tokens = buffer.shape[:2]
    mask = torch.ones(images, 1, tokens, dtype=torch.bool, device=DEVICE) if masked else None
    others = arguments(layout, images, torch.tensor([11], device=DEVICE), 0.3, mask)
    op = torch.ops.qformer_fast.image_cross_attention_fwd
    actual = run(lambda *x: op(*x, *others)[0], q, buffer, dout)
    high = run(lambda *x: op(*x, *others)[0], q.double(), buffer.double(), dout.double())
    assert_close(actual, high, high, atol=4e-3)
    none = run(lambda *x: op(*x, *arguments(layout, images, None, 0.0, mask))[0], q, buffer, dout)
    assert (actual["out"] - none["out"]).abs().max() > 0.05


@pytest.mark.parametrize("case", ["q32-257-tokens", "q4-300-tokens"])
def test_gradients_of_keys_and_values_add_to_what_is_there(case):
    layout, q, buffer, dout = build(case, torch.float16)
    k, v = buffer[:, :, 1, 0], buffer[:, :, 1, 1]
    others = arguments(layout, len(buffer), None, 0.0)
    saved = q, k, v, *kernels.image_cross_attention_fwd(q, k, v, *others)
    dq, dk, dv = kernels.image_cross_attention_bwd(dout, *saved, *others)
    sums = torch.ones_like(buffer)
    again = kernels.image_cross_attention_bwd_into(
        sums[:, :, 1, 0], sums[:, :, 1, 1], dout, *saved, *others, accumulate=True
    )
    assert torch.equal(again, dq)
    torch.testing.assert_close(sums[:, :, 1, 0], dk + 1, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(sums[:, :, 1, 1], dv + 1, rtol=2e-3, atol=1e-3)
    assert (sums[:, :, [0, 2]] == 1).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("case", ["q32-257-tokens", "q4-300-tokens"])
def test_same_result_twice(case, dropout_p):
    layout, q, buffer, dout = build(case, torch.float16)

    def once():
        torch.manual_seed(3)
        op = lambda *x: ops.image_cross_attention(*x, layout, dropout_p=dropout_p, backend="triton")  # noqa: E731
        return run(op, q, buffer, dout)

    first, *others = (once() for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_formula(dropout_p):
    layout, q, buffer, _ = build("q3-17-tokens", torch.float64)
    q, k, v = (x[..., :4].contiguous().requires_grad_() for x in (q, buffer[:, :6, 0, 0], buffer[:, :6, 0, 1]))
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    others = arguments(layout, 4, seed, dropout_p)
    op = torch.ops.qformer_fast.image_cross_attention_fwd
    assert torch.autograd.gradcheck(lambda *x: op(*x, *others)[0], (q, k, v))
    if not dropout_p:
        plain = reference.image_cross_attention(q, k, v, layout, softmax_scale=0.25)
        torch.testing.assert_close(op(q, k, v, *others)[0], plain)


def test_opcheck():
    layout, q, buffer, _ = build("q3-17-tokens", torch.float16)
    k, v = (buffer[:, :, 1, i].clone().requires_grad_() for i in (0, 1))
    op = torch.ops.qformer_fast.image_cross_attention_fwd.default
    torch.library.opcheck(op, (q.requires_grad_(), k, v, *arguments(layout, 4, None, 0.0)))


def test_compiles_without_a_graph_break():
    layout, q, buffer, _ = build("q3-17-tokens", torch.float16)
    k, v = buffer[:, :, 1].unbind(2)

    def twice(q, k, v):
        return 2 * ops.image_cross_attention(q, k, v, layout, backend="triton")

    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(q, k, v), twice(q, k, v))


def test_what_the_kernels_do_not_take():
    layout, q, buffer, _ = build("q3-17-tokens", torch.float16)
    k, v = buffer[:, :, 1].unbind(2)
    with pytest.raises(RuntimeError, match="its kernels take a bool image_mask, got torch.float32"):
        ops.image_cross_attention(q, k, v, layout, image_mask=torch.zeros(4, 1, 17, device=DEVICE), backend="triton")
