"""Stage 2's Q-Former as CUDA graphs: the same numbers as without, few captures."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from qformer_fast import Blip2OPT, QFormerConfig
from qformer_fast.models import blip2_opt, graphed

BATCH = 16


def build(device="cpu", *, dropout=0.0, keep_text=True, hidden=64):
    torch.manual_seed(0)
    config = QFormerConfig(
        vocab_size=100, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=hidden // 32, num_query_tokens=8,
        intermediate_size=2 * hidden, encoder_hidden_size=48, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, use_qformer_text_input=keep_text,
    )  # fmt: skip
    language_model = OPTForCausalLM(
        OPTConfig(
            vocab_size=120, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    return Blip2OPT(config, language_model).to(device).train()


def question(batch=BATCH, shortest=4, longest=14):
    width = int(torch.randint(longest - 2, longest + 1, ()))
    mask = (torch.arange(width) < torch.randint(shortest, width + 1, (batch, 1))).long()
    return torch.randint(5, 100, (batch, width)) * mask, mask


@pytest.mark.parametrize("with_text", [False, True])
def test_questions_of_any_length_come_in_few_kinds(monkeypatch, with_text):
    captured = []

    class Capture:
        has_gradients = False

        def __init__(self, encode, inputs, places, pool):
            captured.append([tuple(x.shape) for x in inputs])

    monkeypatch.setattr(graphed, "_Graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(blip2_opt, "can_capture", lambda *_: True)
    model = build()
    for _ in range(40):
        text = question() if with_text else ()
        model.encode_images(torch.randn(BATCH, 5, 48), *text)
    assert 1 <= len(captured) <= (4 if with_text else 1)


def step(model, images, text, seed):
    torch.manual_seed(seed)
    ids = torch.arange(6).repeat(len(images), 1) + 5
    model.zero_grad(set_to_none=True)
    out = model(images, ids, torch.ones_like(ids), ids, *text)
    out.loss.backward()
    return out.loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.cuda
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_graphs_give_the_losses_and_gradients_of_the_plain_path(with_text, autocast):
    """Filled-up text runs in other shapes, so that sums may round otherwise."""
    plain, replayed = build("cuda", keep_text=with_text), build("cuda", keep_text=with_text)
    plain.cuda_graphs = False
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        for number in range(6):
            torch.manual_seed(number)
            images = torch.randn(BATCH, 257, 48, device="cuda")
            text = question() if with_text else ()
            loss, gradients = step(plain, images, text, number)
            found, others = step(replayed, images, text, number)
            tolerance = dict(rtol=1e-4, atol=1e-5) if autocast is None else dict(rtol=2e-2, atol=1e-3)
            torch.testing.assert_close(found, loss, **tolerance)
            assert gradients.keys() == others.keys()
            # a key's bias has no gradient but rounding's
            for name, gradient in ((name, x) for name, x in gradients.items() if not name.endswith("key.bias")):
                scale = gradient.abs().max()
                assert (others[name] - gradient).abs().max() <= tolerance["rtol"] * scale + 1e-7, name
    assert len(replayed._graphs._graphs) >= 1
    assert len(plain._graphs._graphs) == 0


@pytest.mark.cuda
def test_each_replay_drops_others():
    model = build("cuda", dropout=0.2, keep_text=False)
    images = torch.randn(BATCH, 257, 48, device="cuda")
    outputs = [model.encode_images(images) for _ in range(1)]
    for _ in range(4):
        out = model.encode_images(images)
        out.sum().backward()
        outputs.append(out.detach())
    assert len(model._graphs._graphs) == 1
    assert not torch.equal(outputs[-1], outputs[-2])


@pytest.mark.cuda
def test_weights_that_an_optimizer_changed_are_seen_by_the_next_replay():
    model = build("cuda", keep_text=False)
    images = torch.randn(BATCH, 257, 48, device="cuda")
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(8):
        losses.append(step(model, images, (), 0)[0].item())
        optimizer.step()
    assert len(model._graphs._graphs) == 1
    assert losses[-1] < losses[0]
    reference = build("cuda", keep_text=False)
    reference.load_state_dict(model.state_dict())
    reference.cuda_graphs = False
    torch.testing.assert_close(step(model, images, (), 0)[0], step(reference, images, (), 0)[0], rtol=1e-4, atol=1e-5)
