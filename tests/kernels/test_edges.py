"""Layouts and sizes at the edges, which only a GPU holds or runs in reasonable time."""

import pytest
import torch

from qformer_fast import Mask, SequenceLayout, kernels, ops, reference

pytestmark = pytest.mark.cuda
BF16 = torch.bfloat16


def build(image_index, lengths, num_images, masks=Mask.BIDIRECTIONAL, queries=32):
    return SequenceLayout.build(
        num_queries=queries,
        image_index=image_index,
        text_lengths=lengths,
        masks=masks,
        num_images=num_images,
        device="cuda",
    )


def same_as_alone(found, expected):
    """A kernel's result does not depend on what else is in the launch."""
    assert torch.equal(found, expected)


def test_self_attention_rows_past_2_31_bytes():
    sequences = 12000
    layout = build([0] * sequences, [11] * sequences, 1)
    qkv = torch.randn(layout.num_rows, 3, 12, 64, device="cuda", dtype=BF16)
    assert qkv.nbytes > 2**31
    dout = torch.randn(layout.num_rows, 12, 64, device="cuda", dtype=BF16)
    qkv.requires_grad_()
    out = ops.query_text_attention(qkv, layout, backend="triton")
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    last = torch.cat([layout.padded_rows[-1], layout.padded_rows[0]])
    few = build([0, 0], [11, 11], 1)
    order = torch.cat([last[:32], last[43:75], last[32:43], last[75:]])
    part = qkv.detach()[order].requires_grad_()
    alone = ops.query_text_attention(part, few, backend="triton")
    same_as_alone(out[order], alone)
    same_as_alone(dqkv[order], torch.autograd.grad(alone, part, dout[order])[0])


def test_keys_and_values_past_2_31_bytes():
    images = 300
    layout = build(torch.arange(images), [0] * images, images)
    buffer = torch.randn(images, 257, 12, 2, 12, 64, device="cuda", dtype=BF16)
    assert buffer.nbytes > 2**31
    k, v = buffer[:, :, 11, 0], buffer[:, :, 11, 1]
    q, dout = torch.randn(2, images * 32, 12, 64, device="cuda", dtype=BF16)
    order = layout.sequences_by_image(images), None, None, 32, 0.125, 0.0
    arguments = (*order[0], *order[1:])
    out, lse = kernels.image_cross_attention_fwd(q, k, v, *arguments)
    sums = torch.zeros_like(buffer)
    kernels.image_cross_attention_bwd_into(
        sums[:, :, 11, 0], sums[:, :, 11, 1], dout, q, k, v, out, lse, *arguments, accumulate=True
    )
    last = 20  # enough heads of images for the same tiles
    part = build(torch.arange(last), [0] * last, last)
    inputs = [x.clone().requires_grad_() for x in (q[-last * 32 :], k[-last:], v[-last:])]
    alone = ops.image_cross_attention(*inputs, part, backend="triton")
    same_as_alone(out[-last * 32 :], alone)
    _, dk, dv = torch.autograd.grad(alone, inputs, dout[-last * 32 :])
    same_as_alone(sums[-last:, :, 11, 0], dk)
    same_as_alone(sums[-last:, :, 11, 1], dv)


def test_rows_past_2_31_bytes():
    x, residual, dout = (torch.randn(1_450_000, 768, device="cuda", dtype=BF16) for _ in range(3))
    assert x.nbytes > 2**31
    weight, bias = torch.randn(2, 768, device="cuda")
    rows = torch.cat([torch.arange(5), torch.arange(len(x) - 5, len(x))]).cuda()
    for op in (
        lambda x, residual: ops.dropout_add_layer_norm(x, residual, weight, bias, backend="triton"),
        lambda x, residual: ops.bias_gelu(x, bias, backend="triton"),
    ):
        with torch.no_grad():
            same_as_alone(op(x, residual)[rows], op(x[rows], residual[rows]))
        whole, part = x.detach().requires_grad_(), x[rows].detach().requires_grad_()
        (dx,) = torch.autograd.grad(op(whole, residual), whole, dout)
        same_as_alone(dx[rows], torch.autograd.grad(op(part, residual[rows]), part, dout[rows])[0])


@pytest.mark.parametrize("looks", ["everyone at one image", "no one at most images"])
def test_batch_of_1024(looks, assert_close):
    sequences, images = 1024, 1024 if looks.startswith("no") else 1
    index = [0, 1023] * 512 if images > 1 else [0] * sequences
    layout = build(index, [0] * sequences, images)
    q, dout = torch.randn(2, layout.num_query_rows, 2, 64, device="cuda", dtype=BF16)
    k, v = torch.randn(2, images, 257, 2, 64, device="cuda", dtype=BF16)

    def run(op, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = op(*tensors)
        return dict(zip("oqkv", (out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))), strict=True))

    actual = run(lambda *x: ops.image_cross_attention(*x, layout, backend="triton"), q, k, v)
    low = run(lambda *x: reference.image_cross_attention(*x, layout), q, k, v)
    high = run(lambda *x: reference.image_cross_attention(*x, layout), q.double(), k.double(), v.double())
    assert_close(actual, low, high)


def test_one_sequence_of_one_token():
    layout = build([], [1], 1, Mask.UNIMODAL, queries=0)
    qkv = torch.randn(1, 3, 12, 64, device="cuda", dtype=BF16)
    same_as_alone(ops.query_text_attention(qkv, layout, backend="triton"), qkv[:, 2])
