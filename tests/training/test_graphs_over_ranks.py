"""Stage 1 over ranks as CUDA graphs, on one GPU: a process group of one rank against the model itself."""

import socket

import pytest
import torch
import torch.distributed as dist

from qformer_fast import Blip2QFormer, QFormerConfig
from qformer_fast.models.distributed import DistributedStage1
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.training import graphs_over_ranks
from qformer_fast.training.averaging import Averaging
from qformer_fast.training.graphs_over_ranks import GraphedRanks


def test_flat_buffers_are_parts_of_one_tensor():
    groups = [(torch.zeros(3, 5), torch.zeros(2, 5)), (torch.zeros(()),), (torch.zeros(7).double(),), (torch.zeros(9),)]
    buffers, wholes = GradientBuffers.flat(groups, [1, 0, 1, 1], lambda size, dtype: torch.zeros(size, dtype=dtype))
    assert [x.shape for x in buffers.buffers] == [(5, 5), (), (7,), (9,)]
    found = [[(x.dtype, x.numel()) for x in part] for part in wholes]
    assert found == [[(torch.float32, 64)], [(torch.float32, 128), (torch.float64, 32)]]
    first = [wholes[1][0], wholes[0][0], wholes[1][1], wholes[1][0]]
    for number, (x, whole) in enumerate(zip(buffers.buffers, first, strict=True), 1):
        x += number
        assert (x.data_ptr() - whole.data_ptr()) % 256 == 0
    assert [[float(whole.sum()) for whole in part] for part in wholes] == [[2], [25 + 9 * 4, 7 * 3]]


@pytest.fixture
def one_rank():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(model, run, dtype):
    """What ``run`` adds to no gradients, and what it returns."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        out = run()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, out


def build(dropout=0.0, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=2, num_query_tokens=5)
    dropouts = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return Blip2QFormer(QFormerConfig(**sizes, **dropouts, encoder_hidden_size=40), **options).cuda().train()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bucket", [None, 1])
@pytest.mark.parametrize("local_gradients", [True, False])
def test_losses_and_gradients_are_the_models(local_gradients, bucket, dtype, tolerance, one_rank, make_captions):
    """Gradients as near to fp32's as the model's own in this precision. With a bucket of one row nearly every step
    records sweep 2 anew, also behind one that has changed the parameters in place.
    """
    model = build(local_gradients=local_gradients)
    graphed = GraphedRanks(DistributedStage1(model), dtype=dtype, bucket=bucket)
    first = [2, 12, 9, 5, 11, 3, 7]
    for number, lengths in enumerate((first, [4, 3, 8, 8, 2, 10, 6], [9, 2], first, first)):
        batch = len(lengths)
        ids, mask = make_captions(lengths, 12)
        images = torch.randn(batch, 6, 40, device="cuda")
        own = torch.arange(batch, device="cuda")
        negatives = tuple((own + 1 + (number + i) % (batch - 1)) % batch for i in (0, 1))

        def backward(images=images, ids=ids, mask=mask, negatives=negatives):
            out = model(images, ids.cuda(), mask.cuda(), negatives=negatives)
            (out.loss * 1.5).backward()
            return out

        exact, _ = gradients_of(model, backward, None)
        expected, losses = gradients_of(model, backward, dtype)
        model.zero_grad(set_to_none=True)
        # two halves of the gradient: written, then added to
        for scale in (1.0, 0.5):
            out = graphed(images, ids, mask, scale=scale, negatives=negatives)
        for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
            torch.testing.assert_close(getattr(out, name), getattr(losses, name).detach(), rtol=tolerance, atol=1e-3)
        assert out.itm_logits.shape == (3 * batch, 2) and out.itm_labels.tolist() == [1] * batch + [0] * 2 * batch
        off = {}
        for name, p in model.named_parameters():
            # temp's is a sum of probabilities times similarities, these over temp ** 2
            scale = max(float(exact[name].abs().max()), 1.0 if name == "temp" else 1e-2)
            away, allowed = (float((x - exact[name]).abs().max()) for x in (p.grad, expected[name]))
            if away > 2 * allowed + tolerance * scale:
                off[name] = away, allowed
        assert off == {}
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.01)


@pytest.mark.cuda
def test_each_step_draws_its_own_dropout_and_negatives(one_rank, make_captions):
    """Also where sweep 2 is recorded on the way."""
    ids, mask = make_captions([2, 12, 9, 5, 11, 3, 7], 12)
    images = torch.randn(7, 6, 40, device="cuda")

    def losses(seed, graphed):
        graphed.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        return [float(graphed(images, ids, mask, average=False).loss) for _ in range(3)]

    graphed = GraphedRanks(DistributedStage1(build(dropout=0.3)), bucket=1)
    first, again, other = losses(1, graphed), losses(1, graphed), losses(2, graphed)
    assert first == again
    assert len({*first, *other}) == 6


@pytest.mark.cuda
def test_an_event_in_a_graph_is_that_of_its_latest_replay():
    """Averages of gradients begin behind such events, while the graph's other kernels run."""
    x, event = torch.zeros((), device="cuda"), torch.cuda.Event(external=True)
    beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cuda._sleep(2_000_000)
        x += 1
        event.record()
        torch.cuda._sleep(50_000_000)
    seen, expected = [], []
    for number in range(1, 21):
        # more than one may be under way
        for _ in range(number % 3 + 1):
            graph.replay()
        expected.append(sum(expected[-1:]) + number % 3 + 1)
        beside.wait_event(event)
        with torch.cuda.stream(beside):
            seen.append(x.clone())
        beside.synchronize()
        assert not torch.cuda.current_stream().query()
    assert torch.stack(seen).tolist() == expected


class Kept(Averaging):
    """Instead of averages, each tensor as it was when its average was begun."""

    def __init__(self):
        self.stream, self.kept = torch.cuda.Stream(), []

    def zeros(self, size, dtype):
        return torch.zeros(size, dtype=dtype, device="cuda")

    def begin(self, whole):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.kept.append((whole, whole.clone()))

    def join(self):
        torch.cuda.current_stream().wait_stream(self.stream)


@pytest.mark.cuda
def test_gradients_are_done_where_their_averages_begin(one_rank, make_captions, monkeypatch):
    """At BLIP-2's width, with kernels that run long beside each other; written gradients, and some that are added."""
    averaging = Kept()
    monkeypatch.setattr(graphs_over_ranks, "averaging_over", lambda *_: averaging)
    model = Blip2QFormer(QFormerConfig()).cuda().train()
    graphed = GraphedRanks(DistributedStage1(model), dtype=torch.bfloat16)
    captions, images = make_captions([12] * 32, 12), torch.randn(32, 257, 1408, device="cuda")
    for step in range(6):
        averaging.kept.clear()
        graphed(images, *captions)
        assert sum(len(whole) for whole, _ in averaging.kept) >= sum(p.numel() for p in model.parameters())
        for number, (whole, kept) in enumerate(averaging.kept):
            assert bool(whole.any()) and torch.equal(whole, kept), (step, number)
        if step % 2:
            model.zero_grad(set_to_none=True)
