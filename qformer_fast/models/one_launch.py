"""Few images in one launch: the layers over queries alone as one kernel of the extension (csrc/query_encoder.cuh)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import extension
from qformer_fast.config import QFormerConfig
from qformer_fast.models.packing import EncoderWeights

# The kernel takes up to eight images; bench/bench_one_launch.py says up to how many it is faster than CUDA graphs.
MAX_IMAGES = 4
MAX_LAYERS = 32
HIDDEN, INTERMEDIATE, QUERIES, HEADDIMS = 768, 3072, 32, (32, 64)
# blocks of a cluster; columns and K of a slot, the piece of a weight that a warp reads at once; numbers of each of a
# product's three vectors, which have a slot together; slots that are copied at once; columns of a cluster that attends
CLUSTER, TILE, SLICE, VECTOR, PAGE, GROUP = 8, 8, 96, 128, 4, 64
LEAST_CLUSTERS = HIDDEN // GROUP
# blocks that share K: of products behind LayerNorm, and of those with a residual
WIDE, NARROW = 4, 8


@dataclasses.dataclass
class Product:
    """A weight (outputs, inputs) and what its epilogue takes, (up to 3, outputs) fp32.

    ``split`` blocks of a cluster share the inputs; where they are less than all, groups of blocks share the outputs.
    Where it ``attends``, the first LEAST_CLUSTERS have 64 of every 768 outputs.
    """

    weight: Tensor
    vectors: Tensor
    split: int
    attends: bool = False


def why_not(config: QFormerConfig, queries: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an encoder can't run in one launch, however few the images; None where it can."""
    if backends.asked_for() not in (None, "cuda"):
        return f"backend {backends.asked_for()!r} is asked for"
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if reason := extension.why_not():
        return reason
    if dtype not in extension.DTYPES:
        return f"it takes fp16 and bf16, got {dtype}"
    sizes = {
        "hidden_size": (config.hidden_size, [HIDDEN]),
        "intermediate_size": (config.intermediate_size, [INTERMEDIATE]),
        "the head dimension": (config.headdim, list(HEADDIMS)),
        "the number of queries": (queries, [QUERIES]),
    }
    wrong = [
        f"{name} must be one of {allowed}, got {size}" for name, (size, allowed) in sizes.items() if size not in allowed
    ]
    if wrong:
        return "; ".join(wrong)
    if config.num_hidden_layers > MAX_LAYERS:
        return f"it takes at most {MAX_LAYERS} layers, got {config.num_hidden_layers}"
    clusters = extension.encode_queries_clusters(torch.empty(0, dtype=dtype, device=device), config.headdim)
    if clusters < LEAST_CLUSTERS:
        return f"it needs {LEAST_CLUSTERS} clusters of {CLUSTER} multiprocessors at once, the device has {clusters}"
    return None


def pack(products: list[Product], clusters: int) -> tuple[Tensor, Tensor]:
    """Weights in the order in which the kernel's products need them, as slots (slots, 768) that each block reads one
    after the other, and where each block's begin, (blocks + 1,) int32.

    Of a weight's tiles of 8 outputs each cluster has outputs / 8 / clusters in a row. A block's slots of a product are
    one of its vectors, and for each of its tiles one for each 96 of its inputs: fragments of mma.m16n8k16's B, column
    and pair of K a thread, its halves of K together.
    """
    slots, owners = [], []
    for product in products:
        for found, blocks in (_vector_slots(product, clusters), _weight_slots(product, clusters)):
            slots.append(found)
            owners.append(blocks)
    owner = torch.cat(owners)
    order = owner.argsort(stable=True).to(slots[0].device)
    counts = torch.bincount(owner, minlength=clusters * CLUSTER)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    # the last block's last page may end behind its slots
    return torch.cat([torch.cat(slots)[order], slots[0].new_zeros(PAGE, TILE * SLICE)]), starts.to(slots[0].device)


def _owners(product: Product, clusters: int) -> Tensor:
    """The first of the blocks that have a tile, (tiles,); those with other inputs follow CLUSTER / split apart."""
    tile = torch.arange(product.weight.shape[0] // TILE)
    # otherwise the cluster c whose tiles begin at c * tiles // clusters and end before (c + 1) * tiles // clusters
    cluster = tile * TILE % HIDDEN // GROUP if product.attends else ((tile + 1) * clusters - 1) // len(tile)
    order = cluster.argsort(stable=True)
    counts = torch.bincount(cluster, minlength=clusters)
    place = torch.empty_like(tile)
    place[order] = tile - (counts.cumsum(0) - counts)[cluster[order]]
    groups = CLUSTER // product.split
    # the group g whose tiles begin at g * count // groups
    return cluster * CLUSTER + ((place + 1) * groups - 1) // counts[cluster]


def _weight_slots(product: Product, clusters: int) -> tuple[Tensor, Tensor]:
    """(slots, 768) and whose they are, a block's in the order of its tiles."""
    weight, split = product.weight, product.split
    tiles, slices = weight.shape[0] // TILE, weight.shape[1] // split // SLICE
    parts = weight.reshape(tiles, TILE, split, slices, SLICE // 16, 2, 4, 2)
    slots = parts.permute(2, 0, 3, 4, 1, 6, 5, 7).reshape(-1, TILE * SLICE)
    blocks = _owners(product, clusters) + torch.arange(split)[:, None] * (CLUSTER // split)
    return slots, blocks.repeat_interleave(slices, 1).flatten()


def _vector_slots(product: Product, clusters: int) -> tuple[Tensor, Tensor]:
    """(slots, 768) of the weight's dtype that hold fp32, and whose they are: of each block that has tiles."""
    owner, count = _owners(product, clusters), len(product.vectors)
    order = owner.argsort(stable=True).to(product.vectors.device)
    columns = product.vectors.view(count, -1, TILE)[:, order].flatten(1)
    firsts, tiles = owner.unique(return_counts=True)
    slots = columns.new_zeros(len(firsts), 3, VECTOR)
    begin = 0
    for slot, length in zip(slots, (tiles * TILE).tolist(), strict=True):
        slot[:count, :length] = columns[:, begin : begin + length]
        begin += length
    found = slots.flatten(1).view(product.weight.dtype)
    blocks = firsts + torch.arange(product.split)[:, None] * (CLUSTER // product.split)
    return found.repeat(product.split, 1), blocks.flatten()


def fold(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What W LayerNorm(x) + c needs to be ((W diag(w)) x - mean(x) (W w)) / deviation(x) + (W b + c): W diag(w) in
    W's dtype, the sums of its columns W w, and W b + c, both fp32."""
    folded = (weight.float() * norm_weight.float()).to(weight.dtype)
    return folded, folded.float().sum(1), weight.float() @ norm_bias.float() + bias.float()


class OneLaunch:
    """An encoder's weights as the kernel reads them, and its launches.

    Args:
        config (QFormerConfig): for which :func:`why_not` gives None.
        weights (EncoderWeights): of its layers, in the dtype of the rows.
        rows, queries (Tensor): (32, 768) and (32, nheads, headdim), what does not depend on the images: the rows after
            the first self-attention and what the first cross-attention asks.
        clusters (int, Optional): of eight blocks. Default: as many as the device holds at once.
    """

    def __init__(
        self,
        config: QFormerConfig,
        weights: EncoderWeights,
        rows: Tensor,
        queries: Tensor,
        clusters: int | None = None,
    ):
        self.rows, self.queries = rows.contiguous(), queries.flatten(1).contiguous()
        self.headdim, self.eps, self.layers = config.headdim, config.layer_norm_eps, len(weights.layers)
        self.cross_layers = sum(1 << layer for layer in config.cross_attention_layers)
        products, norm = [], None
        for layer in weights.layers:
            for block in layer.self_attention, layer.cross_attention, layer.query_feed_forward:
                if block is None:
                    continue
                first, first_bias, second, second_bias, *next_norm = block.parameters
                # self-attention of layer 0 and what its cross-attention asks come before the images
                if norm is not None:
                    folded, *vectors = fold(first.to(rows.dtype), first_bias, *norm)
                    attends = block is not layer.query_feed_forward
                    products.append(Product(folded, torch.stack(vectors), WIDE, attends))
                if block is not weights.layers[0].self_attention:
                    # of the rows given nothing is left to normalize
                    weight, bias = norm or (torch.ones_like(second_bias), torch.zeros_like(second_bias))
                    vectors = torch.stack([x.float() for x in (second_bias, weight, bias)])
                    products.append(Product(second.to(rows.dtype), vectors, NARROW))
                    norm = next_norm
        clusters = clusters or extension.encode_queries_clusters(rows, config.headdim)
        self.weights, self.first_slots = pack(products, clusters)
        self.norm = torch.stack([x.float() for x in norm])
        self._workspaces: dict[int, Tensor] = {}
        self._bytes: dict[int, int] = {}  # of a workspace, by images

    def run(self, keys_values: Tensor, images: int) -> Tensor:
        """(images * tokens, layers * 2 * 768), of at most eight images -> (images, 32, 768)."""
        out = keys_values.new_empty(images * QUERIES, HIDDEN)
        extension.encode_queries(
            self.weights,
            self.first_slots,
            self.norm,
            self.rows,
            self.queries,
            keys_values,
            images,
            self.layers,
            self.cross_layers,
            self.headdim,
            self.eps,
            self._workspace(images),
            out,
        )
        return out.view(images, QUERIES, HIDDEN)

    def _workspace(self, images: int) -> Tensor:
        """Memory of the current stream, whose launches follow each other."""
        if images not in self._bytes:
            looking = self.cross_layers.bit_count()
            self._bytes[images] = extension.encode_queries_workspace(self.rows, images, self.layers, looking)
        size = self._bytes[images]
        with torch.cuda.device(self.rows.device):
            stream = None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream
        found = self._workspaces.get(stream)
        if found is None or found.numel() < size:
            with torch.inference_mode(False):
                found = self.rows.new_full((size,), 255, dtype=torch.uint8)
            if stream is not None:
                self._workspaces[stream] = found
        return found
