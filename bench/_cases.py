"""The ops at BLIP-2's sizes, as one step of stage 1 meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from _harness import Case, Inputs
from torch import Tensor
from torch.nn import functional as F

from qformer_fast import Mask, SequenceLayout

DROPOUTS = (0.0, 0.1)
EPS = 1e-12


@dataclass(frozen=True)
class Sizes:
    """``batch`` pairs on ``device``; captions have between ``shortest`` and ``longest`` tokens. All ranks together have
    ``candidates`` pairs.
    """

    batch: int
    device: str
    hidden: int = 768
    nheads: int = 12
    intermediate: int = 3072
    queries: int = 32
    tokens: int = 257
    layers: int = 6
    vocab: int = 30523
    positions: int = 512
    embed_dim: int = 256
    candidates: int = 8192
    shortest: int = 6
    longest: int = 18

    @classmethod
    def tiny(cls, batch: int, device: str) -> Sizes:
        """For tests on a CPU."""
        sizes = dict(hidden=32, nheads=2, intermediate=48, queries=4, tokens=5, layers=2, vocab=40, positions=8)
        return cls(batch, device, **sizes, embed_dim=16, candidates=1030, shortest=2, longest=5)

    @property
    def headdim(self) -> int:
        return self.hidden // self.nheads

    def lengths(self) -> Tensor:
        """(batch,) tokens of each caption, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shortest, self.longest + 1, (self.batch,), generator=generator)

    def negatives(self, seed: int) -> Tensor:
        """(batch,) another pair's number for every pair, the same in every run."""
        shift = torch.randint(1, self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed))
        return (torch.arange(self.batch) + shift) % self.batch

    def layouts(self) -> dict[str, SequenceLayout]:
        """Sweep 1: [queries | caption] and the caption alone. Sweep 2: pairs (own, own), (negative image, own text),
        (own image, negative text).
        """
        own, lengths = torch.arange(self.batch), self.lengths()
        common = dict(num_queries=self.queries, num_images=self.batch, device=self.device)
        sweep1 = SequenceLayout.build(
            image_index=own,
            text_lengths=torch.cat([lengths, lengths]),
            masks=[Mask.MULTIMODAL_CAUSAL] * self.batch + [Mask.UNIMODAL] * self.batch,
            **common,
        )
        sweep2 = SequenceLayout.build(
            image_index=torch.cat([own, self.negatives(1), own]),
            text_lengths=torch.cat([lengths, lengths, lengths[self.negatives(2)]]),
            masks=Mask.BIDIRECTIONAL,
            **common,
        )
        return {"sweep1": sweep1, "sweep2": sweep2}


def bias_gelu(sizes: Sizes) -> Iterator[Case]:
    rows, width = 3 * sizes.batch * sizes.queries, sizes.intermediate
    yield Case("bias_gelu", f"{rows}x{width}", lambda new: {"x": new(rows, width), "bias": new(width)})


def dropout_add_layer_norm(sizes: Sizes) -> Iterator[Case]:
    rows, hidden = 3 * sizes.batch * (sizes.queries + (sizes.shortest + sizes.longest) // 2), sizes.hidden
    yield Case(
        "dropout_add_layer_norm",
        f"{rows}x{hidden}",
        lambda new: {"x": new(rows, hidden), "residual": new(rows, hidden), "weight": new(hidden), "bias": new(hidden)},
        options={"eps": EPS},
        dropout_names=("dropout_p",),
        dropouts=DROPOUTS,
    )


def embeddings(sizes: Sizes) -> Iterator[Case]:
    lengths = sizes.lengths().repeat(3)
    positions = torch.cat([torch.arange(int(n)) for n in lengths]).to(sizes.device)
    rows = len(positions)
    ids = torch.randint(sizes.vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(sizes.device)

    def make(new: Callable[..., Tensor]) -> Inputs:
        return {
            "input_ids": ids,
            "position_ids": positions,
            "word_weight": new(sizes.vocab, sizes.hidden),
            "position_weight": new(sizes.positions, sizes.hidden),
            "weight": new(sizes.hidden),
            "bias": new(sizes.hidden),
        }

    yield Case(
        "embeddings",
        f"{rows}x{sizes.hidden}",
        make,
        options={"eps": EPS},
        dropout_names=("dropout_p",),
        dropouts=DROPOUTS,
        rows_read={"word_weight": len(ids.unique()), "position_weight": len(positions.unique())},
    )


def query_text_attention(sizes: Sizes) -> Iterator[Case]:
    for sweep, layout in sizes.layouts().items():
        flops = _self_attention_flops(sizes, layout)
        yield Case(
            "query_text_attention",
            f"b{sizes.batch}-{sweep}",
            lambda new, layout=layout: {"qkv": new(layout.num_rows, 3, sizes.nheads, sizes.headdim)},
            options={"layout": layout},
            dropout_names=("dropout_p",),
            dropouts=DROPOUTS,
            flops=(flops, 2.5 * flops),
        )


def image_cross_attention(sizes: Sizes) -> Iterator[Case]:
    for sweep, layout in sizes.layouts().items():
        flops = _cross_attention_flops(sizes, layout)

        def make(new: Callable[..., Tensor], layout: SequenceLayout = layout) -> Inputs:
            return {"q": new(layout.num_query_rows, sizes.nheads, sizes.headdim), **_keys_values(sizes, new)}

        yield Case(
            "image_cross_attention",
            f"b{sizes.batch}-{sweep}",
            make,
            options={"layout": layout},
            dropout_names=("dropout_p",),
            dropouts=DROPOUTS,
            flops=(flops, 2.5 * flops),
        )


def linear_cross_entropy(sizes: Sizes) -> Iterator[Case]:
    # next tokens of a batch of 128, and of the largest batch that is asked for
    for rows in (1400, 11000) if sizes.batch == 128 else (11 * sizes.batch,):

        def make(new: Callable[..., Tensor], rows: int = rows) -> Inputs:
            return {
                "x": new(rows, sizes.hidden),
                "weight": new(sizes.vocab, sizes.hidden, std=sizes.hidden**-0.5),
                "bias": new(sizes.vocab),
                "labels": torch.randint(sizes.vocab, (rows,), device=sizes.device),
            }

        flops = 2 * rows * sizes.hidden * sizes.vocab
        options = {"label_smoothing": 0.1}
        yield Case("linear_cross_entropy", f"{rows}x{sizes.vocab}", make, options=options, flops=(flops, 2 * flops))


def contrastive_similarity(sizes: Sizes) -> Iterator[Case]:
    batch, queries, dim = sizes.batch, sizes.queries, sizes.embed_dim
    for texts in (batch, sizes.candidates):

        def make(new: Callable[..., Tensor], texts: int = texts) -> Inputs:
            images = F.normalize(new(batch, queries, dim), dim=-1)
            return {"image_features": images, "text_features": F.normalize(new(texts, dim), dim=-1)}

        products = 2 * batch * texts * dim
        shape = f"{batch}x{queries}x{dim}" + f"-{texts}" * (texts != batch)
        yield Case("contrastive_similarity", shape, make, flops=(queries * products, 2 * products))


def contrastive_loss(sizes: Sizes) -> Iterator[Case]:
    batch = sizes.batch
    for candidates in (batch, sizes.candidates):

        def make(new: Callable[..., Tensor], candidates: int = candidates) -> Inputs:
            same_image = torch.eye(batch, candidates, dtype=torch.bool, device=sizes.device)
            sims = {name: new(batch, candidates, std=0.1) for name in ("sim_i2t", "sim_t2i")}
            return {**sims, "temp": new(1, std=0.0) + 0.07, "same_image": same_image}

        options = {"label_smoothing": 0.1}
        yield Case("contrastive_loss", f"{batch}x{candidates}", make, options=options, adapt=_loss_alone)


def sample_negatives(sizes: Sizes) -> Iterator[Case]:
    batch = sizes.batch

    def make(new: Callable[..., Tensor]) -> Inputs:
        return {"logits": new(batch, batch, std=5.0), "excluded": torch.eye(batch, dtype=bool, device=sizes.device)}

    def check(inputs: Inputs, out: Tensor) -> str | None:
        if out.shape != (batch,) or out.min() < 0 or out.max() >= batch:
            return f"not {batch} indices below {batch}: {out}"
        return "an excluded index was drawn" if inputs["excluded"].gather(1, out[:, None]).any() else None

    yield Case("sample_negatives", f"{batch}x{batch}", make, modes=("fwd",), check=check)


def self_attention_block(sizes: Sizes) -> Iterator[Case]:
    hidden = sizes.hidden
    for sweep, layout in sizes.layouts().items():
        rows = layout.num_rows

        def make(new: Callable[..., Tensor], rows: int = rows) -> Inputs:
            qkv = {"qkv_weight": new(3 * hidden, hidden, std=hidden**-0.5), "qkv_bias": new(3 * hidden)}
            return {"rows": new(rows, hidden), **qkv, **_output_parameters(sizes, new)}

        gemms = ((rows, 3 * hidden, hidden), (rows, hidden, hidden))
        yield Case(
            "self_attention_block",
            f"b{sizes.batch}-{sweep}",
            make,
            options={"layout": layout, "nheads": sizes.nheads, "eps": EPS},
            dropout_names=("attention_dropout_p", "hidden_dropout_p"),
            dropouts=DROPOUTS,
            flops=_block_flops(gemms, _self_attention_flops(sizes, layout)),
            gemms=gemms,
        )


def cross_attention_block(sizes: Sizes) -> Iterator[Case]:
    hidden = sizes.hidden
    for sweep, layout in sizes.layouts().items():
        rows = layout.num_query_rows

        def make(new: Callable[..., Tensor], rows: int = rows) -> Inputs:
            q = {"q_weight": new(hidden, hidden, std=hidden**-0.5), "q_bias": new(hidden)}
            return {
                "query_rows": new(rows, hidden),
                **_keys_values(sizes, new),
                **q,
                **_output_parameters(sizes, new),
            }

        gemms = ((rows, hidden, hidden), (rows, hidden, hidden))
        yield Case(
            "cross_attention_block",
            f"b{sizes.batch}-{sweep}",
            make,
            options={"layout": layout, "eps": EPS},
            dropout_names=("attention_dropout_p", "hidden_dropout_p"),
            dropouts=DROPOUTS,
            flops=_block_flops(gemms, _cross_attention_flops(sizes, layout)),
            gemms=gemms,
        )


def split_feed_forward_block(sizes: Sizes) -> Iterator[Case]:
    hidden, width = sizes.hidden, sizes.intermediate
    parts = ("query", "text")

    def adapt(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Parameters come by name and go in as two tuples."""

        def run(query_rows: Tensor, text_rows: Tensor, *, eps: float, dropout_p: float, **others) -> Tensor:
            options = {"backend": others.pop("backend")} if "backend" in others else {}
            groups = [tuple(x for name, x in others.items() if name.startswith(part)) for part in parts]
            return function(query_rows, text_rows, *groups, eps=eps, dropout_p=dropout_p, **options)

        return run

    for sweep, layout in sizes.layouts().items():
        counts = (layout.num_query_rows, layout.num_text_rows)

        def make(new: Callable[..., Tensor], counts: tuple[int, int] = counts) -> Inputs:
            inputs = {f"{part}_rows": new(count, hidden) for part, count in zip(parts, counts, strict=True)}
            for part in parts:
                inputs[f"{part}_up_weight"] = new(width, hidden, std=hidden**-0.5)
                inputs[f"{part}_up_bias"] = new(width)
                inputs[f"{part}_down_weight"] = new(hidden, width, std=width**-0.5)
                inputs |= {f"{part}_{name}": new(hidden) for name in ("down_bias", "norm_weight", "norm_bias")}
            return inputs

        gemms = tuple(shape for count in counts for shape in ((count, width, hidden), (count, hidden, width)))
        yield Case(
            "split_feed_forward_block",
            f"b{sizes.batch}-{sweep}",
            make,
            options={"eps": EPS},
            dropout_names=("dropout_p",),
            dropouts=DROPOUTS,
            flops=_block_flops(gemms, 0),
            gemms=gemms,
            adapt=adapt,
        )


CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    make.__name__: make
    for make in (
        bias_gelu,
        dropout_add_layer_norm,
        embeddings,
        query_text_attention,
        image_cross_attention,
        linear_cross_entropy,
        contrastive_similarity,
        contrastive_loss,
        sample_negatives,
        self_attention_block,
        cross_attention_block,
        split_feed_forward_block,
    )
}


def _keys_values(sizes: Sizes, new: Callable[..., Tensor]) -> Inputs:
    """k and v of the second layer, strided slices of the all-layers buffer as in models.qformer.ImageKV."""
    buffer = new(sizes.batch, sizes.tokens, sizes.layers, 2, sizes.nheads, sizes.headdim)
    return {"k": buffer[:, :, 1, 0], "v": buffer[:, :, 1, 1]}


def _output_parameters(sizes: Sizes, new: Callable[..., Tensor]) -> Inputs:
    hidden = sizes.hidden
    vectors = {name: new(hidden) for name in ("out_bias", "norm_weight", "norm_bias")}
    return {"out_weight": new(hidden, hidden, std=hidden**-0.5), **vectors}


def _loss_alone(contrastive_loss: Callable) -> Callable:
    return lambda temp, **inputs: contrastive_loss(temp=temp[0], **inputs)[0]


def _self_attention_flops(sizes: Sizes, layout: SequenceLayout) -> int:
    """Of q k^T and p v, without regard to the mask."""
    lengths = layout.text_offsets.diff().tolist()
    lengths[: layout.num_query_sequences] = [n + sizes.queries for n in lengths[: layout.num_query_sequences]]
    return 4 * sizes.hidden * sum(n * n for n in lengths)


def _cross_attention_flops(sizes: Sizes, layout: SequenceLayout) -> int:
    return 4 * sizes.hidden * layout.num_query_rows * sizes.tokens


def _block_flops(gemms: tuple[tuple[int, int, int], ...], attention: int) -> tuple[float, float]:
    products = sum(2 * rows * out * width for rows, out, width in gemms)
    return products + attention, 2 * products + 2.5 * attention
