"""Stage 1 as CUDA graphs against the model itself, and the filled-up shapes that they need."""

import contextlib
import gc

import pytest
import torch

from qformer_fast import Blip2QFormer, QFormerConfig, overlap
from qformer_fast.backend import available, interpreting, use_backend
from qformer_fast.layout import room_for
from qformer_fast.models.blip2_qformer import pairs_of
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.training import captures, graphs
from qformer_fast.training.graphs import GraphedStage1
from qformer_fast.training.sweeps import StepInputs, step_in_parts, written_groups

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg")
LENGTHS = [2, 12, 9, 5, 11, 3, 7]


def config(**options):
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2, vocab_size=30523)
    return QFormerConfig(**sizes, num_query_tokens=5, encoder_hidden_size=40, **options)


def build(device, dropout=0.0, **options):
    torch.manual_seed(0)
    options |= dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return Blip2QFormer(config(**options)).to(device).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(float(x.abs().max()), 1e-2)
        assert float((actual[name] - x).abs().max()) <= tolerance * scale, name


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "lengths, text_rows, negative_rows",
    [(LENGTHS, 49, 60), (LENGTHS, 64, 64), (LENGTHS, 200, 49), ([70, 2, 3], 160, 144)],
    ids=["no-filler-first", "few", "many", "long"],
)
def test_fillers_change_neither_losses_nor_gradients(lengths, text_rows, negative_rows, backend, make_captions):
    """What the graphs run, without them: more text rows than the captions have."""
    if reason := available()[backend]:
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # of weights so small that all images look alike temp's gradient would be nothing but rounding
    model, batch = build(device, initializer_range=0.2), len(lengths)
    ids, mask = (x.to(device) for x in make_captions(lengths, max(lengths)))
    images, same_image = torch.randn(batch, 6, 40, device=device), torch.eye(batch, dtype=torch.bool, device=device)
    own = torch.arange(batch, device=device)
    negatives = (own + 1) % batch, (own + 2) % batch
    expected = model(images, ids, mask, negatives=negatives)
    expected.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    text = model.pack_captions(ids, mask, batch)
    filled = text.filled(text_rows, text_rows)
    pair_rows = 2 * text_rows + negative_rows
    pairs = filled.select(pairs_of(negatives[1]), pair_rows, fill=pair_rows)
    assert filled.num_rows == text_rows and pairs.num_rows == pair_rows
    with use_backend(backend):
        weights = model.qformer.encoder_weights(model.query_tokens)
        label_rows, labels = text.next_tokens()
        first = model.first_sweep(model.image_kv(images), filled, label_rows, weights)
        loss_itm, logits = model.second_sweep(first, pairs, model.pair_layout(pairs, negatives[0]))
        loss = (
            model.contrast(model.features(first), same_image).loss_itc
            + loss_itm
            + model.caption_loss(first.itg_rows, labels)
        )
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(logits, expected.itm_logits)
        loss.backward()
    assert_same(gradients(model), wanted, 1e-4)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("frozen, checkpointing", [("", "none"), ("key", "layer"), ("word_embeddings", "feed_forward")])
def test_the_graphs_step_gives_the_models_gradients(frozen, checkpointing, backend, make_captions):
    """The step as it is captured, run without a capture: once on new gradients, then adding to them."""
    if reason := available()[backend]:
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = LENGTHS[:4] if backend == "triton" and interpreting() else LENGTHS
    model, batch, rows = build(device), len(lengths), sum(lengths) + 15
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    ids, mask = (x.to(device) for x in make_captions(lengths, 12))
    images, same_image = torch.randn(batch, 6, 40, device=device), torch.eye(batch, dtype=torch.bool, device=device)
    own = torch.arange(batch, device=device)
    negatives = (own + 1) % batch, (own + 2) % batch
    expected = model(images, ids, mask, negatives=negatives)
    (expected.loss * 0.5).backward()
    text = model.pack_captions(ids, mask, batch)
    label_rows, labels = text.next_tokens()
    scale, host_rows = torch.tensor(0.25, device=device), torch.zeros((), dtype=torch.int64)
    filled = text.filled(rows, 32)
    inputs = StepInputs(model.standardize(images), filled, label_rows, labels, same_image, scale, host_rows)
    found = GradientBuffers(model.groups)
    for parameter, gradient in found.of_parameters():
        if any(parameter is p for group in written_groups(model) for p in group):
            gradient.fill_(torch.nan)
    model.gradient_checkpointing_enable(checkpointing)
    for add in (False, True):
        with use_backend(backend):
            *_, out = step_in_parts(model, inputs, rows, found, negatives, add=add)
        assert 0 < int(host_rows) <= 12 * batch
        for name in LOSSES:
            torch.testing.assert_close(getattr(out, name), getattr(expected, name).detach())
    names = {id(p): name for name, p in model.named_parameters()}
    actual = {names[id(p)]: total for p, total in found.of_parameters() if p.requires_grad}
    assert_same(actual, gradients(model), 1e-4)


def test_shapes_that_are_known_are_taken_again():
    known = set()
    rows = [250, 257, 300, 318, 190, 250, 130, 300, 450]
    found = []
    for count in rows:
        found.append(room_for(count, 64, known))
        known.add(found[-1])
    assert found == [256, 384, 384, 384, 256, 256, 256, 384, 576]
    assert all(count <= room < count + 128 for count, room in zip(rows, found, strict=True))


def test_bad_arguments():
    with pytest.raises(ValueError, match="model must be on a CUDA device, got cpu"):
        GraphedStage1(build("cpu"))
    for width in (39, 41, 47):  # 41 to 47 are as wide as 40 when filled up
        with pytest.raises(ValueError, match=rf"image_embeds must be \(images, tokens, 40\), got \(2, 3, {width}\)"):
            build("cpu").standardize(torch.randn(2, 3, width))


@pytest.mark.parametrize(
    "given, environment, during, after",
    [
        ("", "", "expandable_segments:True", "expandable_segments:False"),
        ("expandable_segments:False", "", "expandable_segments:True", "expandable_segments:False"),
        (
            "roundup_power2_divisions:[256:1,512:2]",
            "",
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:True",
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:False",
        ),
        ("max_split_size_mb:128,expandable_segments:True", "", None, None),
        ("", "expandable_segments:False", None, None),
    ],
)
def test_a_capture_leaves_the_allocators_settings(given, environment, during, after, monkeypatch):
    settings = []
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", environment)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(captures, "_allocator_settings", lambda: given)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    with pytest.raises(ZeroDivisionError), captures.expandable_segments():
        assert settings == ([during] if during else [])
        _ = 1 / 0
    assert settings == ([during, after] if during else [])


def test_own_leaves_see_every_step_of_the_optimizer():
    model = build("cpu")
    model.text_proj.bias.requires_grad_(False)
    twin = captures._with_own_leaves(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    for (name, parameter), (twin_name, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == twin_name and other is not parameter and other.requires_grad == parameter.requires_grad
        assert torch.equal(other, parameter), name
    loss = twin.text_features(torch.tensor([[101, 7, 102]])).sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def batches(make_captions):
    def make(lengths):
        ids, mask = make_captions(lengths, 32)
        return torch.randn(len(lengths), 6, 40, device="cuda"), ids, mask

    return [make(LENGTHS), make([9, 4, 32, 2, 6, 20, 3]), make(LENGTHS[::-1])]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bucket", [1, 64])
def test_losses_and_gradients_are_the_models(bucket, dtype, tolerance, batches):
    """Also with a bucket of one row, where most draws find too little room and are run again."""
    model = build("cuda")
    graphed = GraphedStage1(model, dtype=dtype, bucket=bucket)
    for images, ids, mask in batches * 2:
        model.zero_grad()
        out = graphed(images, ids, mask, [0, 1, 0, 2, 3, 4, 5])
        actual = gradients(model)
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            expected = model(images, ids, mask, [0, 1, 0, 2, 3, 4, 5], negatives=out.negatives)
        expected.loss.backward()
        for name in LOSSES:
            torch.testing.assert_close(getattr(out, name), getattr(expected, name).detach(), rtol=tolerance, atol=1e-4)
        assert_same(actual, gradients(model), tolerance)
        assert all((index != torch.arange(7, device="cuda")).all() for index in out.negatives)


@pytest.mark.cuda
@pytest.mark.parametrize("bucket", [1, 64])
def test_accumulation_scale_and_zero_grad(bucket, batches):
    """Also with a bucket of one row, where steps are run again while there are gradients to add to."""
    model = build("cuda", initializer_range=0.2)
    graphed = GraphedStage1(model, bucket=bucket)
    first, second = (graphed(*batch, scale=scale) for batch, scale in ((batches[0], 0.5), (batches[1], 2.0)))
    actual = gradients(model)
    model.zero_grad(set_to_none=True)
    for batch, out, scale in ((batches[0], first, 0.5), (batches[1], second, 2.0)):
        (model(*batch, negatives=out.negatives).loss * scale).backward()
    assert_same(actual, gradients(model), 1e-4)
    model.zero_grad(set_to_none=False)
    graphed(*batches[0], scale=torch.tensor(0.0, device="cuda"))
    assert all(g.abs().max() == 0 for g in gradients(model).values())


@pytest.mark.cuda
def test_some_gradients_are_there_and_a_failed_step_leaves_none(batches, monkeypatch):
    model = build("cuda", initializer_range=0.2)
    graphed = GraphedStage1(model, bucket=64)
    with monkeypatch.context() as patch:
        patch.setattr(graphed, "_capture", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graphed(*batches[0])
    assert gradients(model) == {}
    graphed(*batches[0])
    before = gradients(model)
    kept = [name for name in before if "query" in name or "norm" in name.lower()]
    for name, parameter in model.named_parameters():
        # some as they are, some in tensors of the user's own, others none
        parameter.grad = parameter.grad.clone() if name in kept[::2] else parameter.grad if name in kept else None
    second = graphed(*batches[1])
    actual = gradients(model)
    model.zero_grad(set_to_none=True)
    model(*batches[1], negatives=second.negatives).loss.backward()
    expected = {name: x + before[name] if name in kept else x for name, x in gradients(model).items()}
    assert_same(actual, expected, 1e-4)


@pytest.mark.cuda
def test_earlier_shapes_are_given_up_where_memory_lacks(batches, monkeypatch):
    model = build("cuda", initializer_range=0.2)
    graphed = GraphedStage1(model, bucket=64)
    graphed(*batches[0])
    (first,) = graphed._captures
    record, failures = graphs._StepCapture.record, [torch.OutOfMemoryError("no memory")]

    def fails_once(self, *args):
        if failures:
            raise failures.pop()
        record(self, *args)

    monkeypatch.setattr(graphs._StepCapture, "record", fails_once)
    images, ids, mask = (x[:5] for x in batches[0])
    model.zero_grad()
    out = graphed(images, ids, mask)
    assert not failures and first not in graphed._captures and len(graphed._captures) == 1
    actual = gradients(model)
    model.zero_grad()
    model(images, ids, mask, negatives=out.negatives).loss.backward()
    assert_same(actual, gradients(model), 1e-4)
    failures.append(torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        GraphedStage1(model, bucket=64)(*batches[0])


@pytest.mark.cuda
def test_each_replay_draws_its_own_dropout(batches):
    model = build("cuda", dropout=0.3)
    graphed = GraphedStage1(model, bucket=64)

    def losses(seed):
        torch.manual_seed(seed)
        return [float(graphed(*batches[0]).loss) for _ in range(3)]

    losses(0)
    first, again, other = losses(1), losses(1), losses(2)
    assert first == again
    assert len({*first, *other}) == 6


@pytest.mark.cuda
def test_checkpointing_levels_change_no_bit_and_hold_less_memory(make_captions):
    """With dropout, whose masks backward makes again; a level that is set later takes graphs of its own."""
    ids, mask = make_captions([3 + i % 13 for i in range(32)], 16)
    images = torch.randn(32, 257, 1408, device="cuda")
    model = Blip2QFormer(QFormerConfig(num_hidden_layers=4)).cuda().train()
    found, pools = {}, {}
    for level in ("none", "feed_forward", "layer"):
        model.gradient_checkpointing_enable(level)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphed = GraphedStage1(model, dtype=torch.bfloat16)
        torch.manual_seed(1)
        for _ in range(3):
            graphed(images, ids, mask)
        found[level] = gradients(model)
        pools[level] = torch.cuda.memory_reserved() - before
        model.zero_grad(set_to_none=True)
        del graphed
    for level in ("feed_forward", "layer"):
        assert [name for name, x in found["none"].items() if not torch.equal(x, found[level][name])] == []
    assert pools["layer"] < pools["feed_forward"] < pools["none"]


@pytest.mark.cuda
def test_checkpointing_in_a_graph_wants_the_kernels_dropout(batches):
    model = build("cuda", dropout=0.3)
    model.gradient_checkpointing_enable()
    with use_backend("reference"), pytest.raises(RuntimeError, match="needs the kernels' dropout"):
        GraphedStage1(model, bucket=64)(*batches[0])


@pytest.mark.cuda
def test_kernels_beside_each_other_change_no_bit(make_captions, monkeypatch):
    """BLIP-2's width, so that kernels run long enough to meet."""
    ids, mask = make_captions([3 + i % 13 for i in range(32)], 16)
    images = torch.randn(32, 257, 1408, device="cuda")
    found = []
    for alone in (False, True):
        torch.manual_seed(0)
        model = Blip2QFormer(QFormerConfig(num_hidden_layers=3)).cuda().train()
        graphed = GraphedStage1(model, dtype=torch.bfloat16)
        if alone:
            monkeypatch.setattr(overlap, "overlapping", lambda streams: contextlib.nullcontext())
            monkeypatch.setattr(overlap, "overlapping_in_captures", contextlib.nullcontext)
        graphed(images, ids, mask)
        torch.manual_seed(1)
        for _ in range(5):
            graphed(images, ids, mask)
        found.append(gradients(model))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


@pytest.mark.cuda
def test_training_with_a_changing_learning_rate(batches):
    """Twelve steps, losses beside those of a twin without graphs."""
    model, twin = build("cuda"), build("cuda")
    graphed = GraphedStage1(model, bucket=64)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, twin)]
    losses = []
    for step in range(12):
        batch = batches[step % 3]
        out = graphed(*batch)
        expected = twin(*batch, negatives=out.negatives)
        expected.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-3, atol=1e-3)
        losses.append(float(out.loss))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
