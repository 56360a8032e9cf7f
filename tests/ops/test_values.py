"""Every public op against its formula written out row by row in fp64."""

import math

import pytest
import torch

from qformer_fast import Mask, SequenceLayout, ops, reference

NHEADS, HEADDIM, QUERIES = 2, 8, 3
F64 = torch.float64


def rand(*shape, grad=False):
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


@pytest.fixture
def layout():
    """Three sequences with queries (texts of 4, 0 and 2 tokens, images 1, 0, 1) and one text alone, all three masks."""
    return SequenceLayout.build(
        num_queries=QUERIES,
        image_index=[1, 0, 1],
        text_lengths=[4, 0, 2, 5],
        masks=[Mask.MULTIMODAL_CAUSAL, Mask.BIDIRECTIONAL, Mask.BIDIRECTIONAL, Mask.UNIMODAL],
        num_images=2,
    )


def members(layout):
    """Of each sequence (rows, sees): its row numbers and for each row the rows that it sees."""
    out, first_text = [], layout.num_query_rows
    for s, mask in enumerate(layout.masks.tolist()):
        queries = range(s * QUERIES, (s + 1) * QUERIES) if s < layout.num_query_sequences else range(0)
        begin, end = layout.text_offsets[s : s + 2].tolist()
        text = range(first_text + begin, first_text + end)
        sees = {}
        for row in [*queries, *text]:
            if mask == Mask.BIDIRECTIONAL:
                sees[row] = [*queries, *text]
            elif row in queries:
                sees[row] = list(queries)
            elif mask == Mask.UNIMODAL:
                sees[row] = list(text)
            else:
                sees[row] = [*queries, *range(text.start, row + 1)]
        out.append(sees)
    return out


def attend(q, k, v, scale):
    """One query (headdim,) over keys and values (n, headdim)."""
    weights = torch.tensor([math.exp(float(q @ key) * scale) for key in k], dtype=F64)
    return (weights[:, None] * v).sum(0) / weights.sum()


def expected_query_text_attention(qkv, layout, scale):
    out = torch.zeros(qkv.shape[0], NHEADS, HEADDIM, dtype=F64)
    for sees in members(layout):
        for row, seen in sees.items():
            for h in range(NHEADS):
                out[row, h] = attend(qkv[row, 0, h], qkv[seen, 1, h], qkv[seen, 2, h], scale)
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
def test_query_text_attention(layout, scale):
    qkv = rand(layout.num_rows, 3, NHEADS, HEADDIM)
    expected = expected_query_text_attention(qkv, layout, scale or HEADDIM**-0.5)
    actual = ops.query_text_attention(qkv, layout, softmax_scale=scale)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_query_text_attention_gradient(layout):
    qkv = rand(layout.num_rows, 3, NHEADS, HEADDIM, grad=True)
    torch.autograd.gradcheck(lambda x: ops.query_text_attention(x, layout), (qkv,))


@pytest.mark.parametrize("masked", [None, "tokens", "readers", "scores"])
def test_image_cross_attention(layout, masked):
    tokens = 5
    q, k, v = (
        rand(layout.num_query_rows, NHEADS, HEADDIM),
        rand(2, tokens, NHEADS, HEADDIM),
        rand(2, tokens, NHEADS, HEADDIM),
    )
    image_mask, added = None, torch.zeros(2, QUERIES, tokens, dtype=F64)
    if masked == "tokens":
        image_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool()[:, None]
        added.masked_fill_(~image_mask, -math.inf)
    elif masked == "readers":
        image_mask = torch.rand(2, QUERIES, tokens) > 0.4
        image_mask[..., 0] = True
        added.masked_fill_(~image_mask, -math.inf)
    elif masked == "scores":
        image_mask = added = rand(2, QUERIES, tokens)
    expected = torch.zeros_like(q)
    for s, image in enumerate(layout.image_index.tolist()):
        for i in range(QUERIES):
            for h in range(NHEADS):
                row = s * QUERIES + i
                scores = (k[image, :, h] @ q[row, h]) * HEADDIM**-0.5 + added[image, i]
                weights = scores.exp()
                expected[row, h] = (weights[:, None] * v[image, :, h]).sum(0) / weights.sum()
    actual = ops.image_cross_attention(q, k, v, layout, image_mask=image_mask)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_image_cross_attention_gradient_sums_over_sequences(layout):
    q = rand(layout.num_query_rows, NHEADS, HEADDIM, grad=True)
    k, v = rand(2, 4, NHEADS, HEADDIM, grad=True), rand(2, 4, NHEADS, HEADDIM, grad=True)
    torch.autograd.gradcheck(lambda *x: ops.image_cross_attention(*x, layout), (q, k, v))


def test_a_row_that_sees_nothing_gives_zeros(layout):
    q = rand(layout.num_query_rows, NHEADS, HEADDIM, grad=True)
    k, v = rand(2, 4, NHEADS, HEADDIM, grad=True), rand(2, 4, NHEADS, HEADDIM, grad=True)
    image_mask = torch.tensor([[False] * 4, [True] * 4])[:, None]
    out = ops.image_cross_attention(q, k, v, layout, image_mask=image_mask)
    hidden = slice(QUERIES, 2 * QUERIES)
    assert out[hidden].abs().max() == 0
    out.backward(torch.randn_like(out))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert q.grad[hidden].abs().max() == 0 and k.grad[0].abs().max() == 0 and v.grad[0].abs().max() == 0


def layer_norm(y, weight, bias, eps):
    mean = y.mean(-1, keepdim=True)
    variance = ((y - mean) ** 2).mean(-1, keepdim=True)
    return (y - mean) / (variance + eps).sqrt() * weight + bias


def test_dropout_add_layer_norm():
    x, residual, weight, bias = rand(6, 16), rand(6, 16), rand(16), rand(16)
    actual = ops.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-3)
    torch.testing.assert_close(actual, layer_norm(x + residual, weight, bias, 1e-3))
    torch.autograd.gradcheck(
        lambda *a: ops.dropout_add_layer_norm(*a, eps=1e-3), [t.requires_grad_() for t in (x, residual, weight, bias)]
    )


def test_dropout_add_layer_norm_drops_and_scales():
    """Ones in, so each row takes two values, whose gap and spread LayerNorm maps in a known way."""
    x, residual = torch.ones(200, 500, dtype=F64), torch.zeros(200, 500, dtype=F64)
    weight, bias = torch.ones(500, dtype=F64), torch.zeros(500, dtype=F64)
    out = ops.dropout_add_layer_norm(x, residual, weight, bias, eps=1.0, dropout_p=0.25)
    kept = out > 0
    assert abs(kept.double().mean() - 0.75) < 0.01
    share = kept.double().mean(1)
    deviation = (1 / 0.75) * (share * (1 - share)).sqrt()
    gap = torch.stack([row[keep].mean() - row[~keep].mean() for row, keep in zip(out, kept, strict=True)])
    torch.testing.assert_close(gap * (deviation**2 + 1.0).sqrt(), torch.full_like(gap, 1 / 0.75))


def test_bias_gelu():
    x, bias = rand(5, 7), rand(7)
    y = x + bias
    expected = y / 2 * (1 + torch.tensor([[math.erf(v / math.sqrt(2)) for v in row] for row in y.tolist()], dtype=F64))
    torch.testing.assert_close(ops.bias_gelu(x, bias), expected)
    torch.autograd.gradcheck(ops.bias_gelu, (x.requires_grad_(), bias.requires_grad_()))


def test_embeddings():
    word, position, weight, bias = rand(11, 6, grad=True), rand(4, 6, grad=True), rand(6, grad=True), rand(6, grad=True)
    ids, positions = torch.tensor([3, 0, 3, 10]), torch.tensor([0, 1, 3, 0])
    actual = ops.embeddings(ids, positions, word, position, weight, bias, eps=1e-12, padding_idx=0)
    rows = torch.stack([word[i] + position[j] for i, j in zip(ids.tolist(), positions.tolist(), strict=True)])
    torch.testing.assert_close(actual, layer_norm(rows, weight, bias, 1e-12))
    actual.backward(torch.randn_like(actual))
    assert word.grad[0].abs().max() == 0, "the padding word gets no gradient"
    assert word.grad[3].abs().min() > 0


def test_contrastive_similarity():
    images, texts = rand(3, 4, 5, grad=True), rand(6, 5, grad=True)
    expected = [[max(float((q @ t).detach()) for q in image) for t in texts] for image in images]
    torch.testing.assert_close(ops.contrastive_similarity(images, texts), torch.tensor(expected, dtype=F64))
    torch.autograd.gradcheck(ops.contrastive_similarity, (images, texts))


def test_contrastive_loss():
    """Of two pairs of one image and a third one, and a candidate of another image."""
    i2t, t2i, temp = rand(3, 4, grad=True), rand(3, 4, grad=True), torch.tensor(0.5, dtype=F64, requires_grad=True)
    same_image = torch.tensor([[True, True, False, False], [True, True, False, False], [False, False, True, False]])
    loss, *logits = ops.contrastive_loss(i2t, t2i, temp, same_image, label_smoothing=0.2)
    targets = torch.tensor([[0.45, 0.45, 0.05, 0.05], [0.45, 0.45, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], dtype=F64)
    rows = [-(targets * (x / temp).softmax(1).log()).sum(1) for x in (i2t, t2i)]
    torch.testing.assert_close(loss, torch.cat(rows).mean())
    assert all(torch.equal(x, sims / temp) for x, sims in zip(logits, (i2t, t2i), strict=True))
    torch.autograd.gradcheck(lambda *x: ops.contrastive_loss(*x, same_image, label_smoothing=0.2)[0], (i2t, t2i, temp))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy(smoothing, reduction):
    x, weight, bias = rand(5, 4, grad=True), rand(9, 4, grad=True), rand(9, grad=True)
    labels = torch.tensor([2, -100, 0, 8, 2])
    losses = []
    for row, label in zip(x, labels.tolist(), strict=True):
        if label == -100:
            losses.append(torch.zeros((), dtype=F64))
            continue
        scores = weight @ row + bias
        log_p = scores - scores.exp().sum().log()
        target = torch.full((9,), smoothing / 9, dtype=F64)
        target[label] += 1 - smoothing
        losses.append(-(target * log_p).sum())
    losses = torch.stack(losses)
    expected = {"mean": losses.sum() / 4, "sum": losses.sum(), "none": losses}[reduction]
    options = dict(label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(ops.linear_cross_entropy(x, weight, bias, labels, **options), expected)
    torch.autograd.gradcheck(lambda *a: ops.linear_cross_entropy(*a, labels, **options), (x, weight, bias))


@pytest.mark.parametrize("normed", [False, True])
def test_image_key_value(normed):
    x, weight, bias = rand(2, 3, 5, grad=True), rand(4, 5, grad=True), rand(4, grad=True)
    norm = (rand(5, grad=True), rand(5, grad=True)) if normed else ()
    y = layer_norm(x, *norm, 1e-5) if normed else x
    torch.testing.assert_close(ops.image_key_value(x, weight, bias, *norm), y @ weight.T + bias)
    torch.autograd.gradcheck(ops.image_key_value, (x, weight, bias, *norm))
    x_hat = layer_norm(x, torch.ones(5), torch.zeros(5), 1e-5).detach()
    ones_and_zeros = torch.cat([torch.ones(2, 3, 1), torch.zeros(2, 3, 2)], 2)
    standardized = reference.standardize_into(x.new_empty(2, 3, 8), x.detach(), 1e-5)
    torch.testing.assert_close(standardized, torch.cat([x_hat, ones_and_zeros], 2))
    parameters = (weight, bias, *norm)
    again = ops.image_key_value(standardized, *parameters, standardized=True)
    torch.testing.assert_close(again, (y if normed else x_hat) @ weight.T + bias)
    torch.autograd.gradcheck(lambda *p: ops.image_key_value(standardized, *p, standardized=True), parameters)


def test_sample_negatives_has_the_distribution_of_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    excluded = torch.tensor([False, False, False, True, False])
    draws = 40_000
    drawn = ops.sample_negatives(logits.expand(draws, -1), excluded.expand(draws, -1))
    counts = torch.bincount(drawn, minlength=5).double()
    expected = logits.double().masked_fill(excluded, -math.inf).softmax(0) * draws
    assert counts[3] == 0
    allowed = ~excluded
    chi_squared = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_squared < 16.3, "beyond the 99.9% point of 3 degrees of freedom"


def test_sample_negatives_survives_extremes_and_empty_rows():
    logits = torch.tensor([[3e4, -3e4, 3e4], [0.0, 5.0, 0.0]])
    excluded = torch.tensor([[True, False, True], [True, True, True]])
    drawn = torch.stack([ops.sample_negatives(logits, excluded) for _ in range(300)])
    assert (drawn[:, 0] == 1).all()
    assert torch.bincount(drawn[:, 1], minlength=3).min() > 60, "uniform where everything is excluded"


def block_parameters(hidden):
    return dict(
        out_weight=rand(hidden, hidden), out_bias=rand(hidden), norm_weight=rand(hidden), norm_bias=rand(hidden)
    )


def test_self_attention_block(layout):
    hidden = NHEADS * HEADDIM
    rows, qkv_weight, qkv_bias, tail = (
        rand(layout.num_rows, hidden),
        rand(3 * hidden, hidden),
        rand(3 * hidden),
        block_parameters(hidden),
    )
    qkv = (rows @ qkv_weight.T + qkv_bias).view(-1, 3, NHEADS, HEADDIM)
    context = expected_query_text_attention(qkv, layout, HEADDIM**-0.5).flatten(1)
    out = context @ tail["out_weight"].T + tail["out_bias"]
    expected = layer_norm(out + rows, tail["norm_weight"], tail["norm_bias"], 1e-12)
    actual = ops.self_attention_block(rows, layout, qkv_weight, qkv_bias, **tail, nheads=NHEADS)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_cross_attention_block(layout):
    hidden = NHEADS * HEADDIM
    rows, weight, bias, tail = (
        rand(layout.num_query_rows, hidden),
        rand(hidden, hidden),
        rand(hidden),
        block_parameters(hidden),
    )
    k, v = rand(2, 5, NHEADS, HEADDIM), rand(2, 5, NHEADS, HEADDIM)
    q = (rows @ weight.T + bias).view(-1, NHEADS, HEADDIM)
    context = torch.stack([
        torch.stack([attend(q[r, h], k[image, :, h], v[image, :, h], HEADDIM**-0.5) for h in range(NHEADS)])
        for s, image in enumerate(layout.image_index.tolist())
        for r in range(s * QUERIES, (s + 1) * QUERIES)
    ])  # fmt: skip
    out = context.flatten(1) @ tail["out_weight"].T + tail["out_bias"]
    expected = layer_norm(out + rows, tail["norm_weight"], tail["norm_bias"], 1e-12)
    actual = ops.cross_attention_block(rows, k, v, layout, weight, bias, **tail)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("queries", "texts"), [(4, 3), (4, 0), (0, 3)])
def test_split_feed_forward_block(queries, texts):
    hidden, wide = 6, 10
    parameters = [
        (rand(wide, hidden), rand(wide), rand(hidden, wide), rand(hidden), rand(hidden), rand(hidden)) for _ in range(2)
    ]
    rows = [rand(queries, hidden), rand(texts, hidden)]
    expected = []
    for x, (up, up_bias, down, down_bias, weight, bias) in zip(rows, parameters, strict=True):
        y = x @ up.T + up_bias
        y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
        expected.append(layer_norm(y @ down.T + down_bias + x, weight, bias, 1e-12))
    actual = ops.split_feed_forward_block(*rows, *parameters)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-9, atol=1e-10)
