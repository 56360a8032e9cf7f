r"""Every kernel once on a small batch of BLIP-2's width, and calls that must be rejected, for compute-sanitizer.

compute-sanitizer --tool memcheck python bench/sanitize.py
compute-sanitizer --tool racecheck --print-limit 100000 python bench/sanitize.py \
    --parts short long launchers extension one_launch

Several processes may share the work: --parts. Racecheck's list of hazards in cuBLAS's products of a step grows past 120
GiB.
"""

from __future__ import annotations

import argparse
import functools

import torch
from _cases import CASES, Sizes
from torch import Tensor

from qformer_fast import Blip2QFormer, QFormerConfig, extension, kernels, ops, reference
from qformer_fast.models.inference import _Runner
from qformer_fast.models.one_launch import OneLaunch
from qformer_fast.models.packing import GradientBuffers
from qformer_fast.models.qformer import QFormer
from qformer_fast.training.sweeps import StepInputs, step_in_parts

SHORT = Sizes(3, "cuda", vocab=523, layers=2)
LONG = Sizes(2, "cuda", vocab=523, layers=2, shortest=40, longest=70, tokens=50)


def new(*shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * std).requires_grad_()


def run_everything(sizes: Sizes) -> None:
    for op, make in CASES.items():
        for case in make(sizes):
            for dropout_p in case.dropouts:
                made = case.make(new)
                inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in made.items()}
                out = case.call(getattr(ops, op), inputs, dropout_p, backend="triton")
                if out.requires_grad:
                    torch.autograd.grad(out, [x for x in inputs.values() if x.requires_grad], torch.randn_like(out))
    torch.cuda.synchronize()


def run_step() -> None:
    """The step that CUDA graphs are captured of, whose kernels write gradients or add to those that are there."""
    model = Blip2QFormer(QFormerConfig(num_hidden_layers=2, vocab_size=523), dec_token_id=522).cuda()
    images, ids = torch.randn(4, 257, 1408, device="cuda"), torch.randint(200, 500, (4, 9))
    text = model.pack_captions(ids, None, 4).to("cuda")
    rows, labels = text.next_tokens()
    inputs = StepInputs(
        images=model.standardize(images),
        text=text.filled(64, 64),
        label_rows=rows,
        labels=labels,
        same_image=torch.eye(4, dtype=torch.bool, device="cuda"),
        scale=torch.ones((), device="cuda"),
        host_rows=torch.empty((), dtype=torch.int64, pin_memory=True),
    )
    with torch.autocast("cuda", torch.bfloat16):
        for add in (False, True):
            for _ in step_in_parts(model, inputs, 64, GradientBuffers(model.groups), add=add):
                pass
    torch.cuda.synchronize()


def run_launchers() -> None:
    """What a step launches and no op of _cases.py does, without the matrix products around it."""
    width = reference.standardized_width(1408)
    kernels.standardize_into(torch.empty(4, 257, width, device="cuda"), torch.randn(4, 257, 1408, device="cuda"), 1e-5)
    for rows in (64, 1536):
        parameters = [torch.randn(size, device="cuda") for size in ((rows, 1408), rows, 1408, 1408)]
        folded = kernels.fold_norm_fwd(*parameters, width, torch.bfloat16)
        kernels.fold_norm_bwd(folded, *parameters)
        for add in (False, True):
            kernels.fold_norm_bwd(folded, *parameters, [torch.zeros_like(p) for p in parameters], add, add)
    torch.cuda.synchronize()


def run_extension() -> None:
    for rows, hidden, intermediate in ((300, 768, 3072), (127, 136, 264)):
        x, bias = new(rows, hidden).detach(), new(intermediate).detach()
        up = x.new_empty(rows, intermediate)
        for gelu in (False, True):
            extension.linear(x, new(intermediate, hidden).detach(), bias, gelu=gelu)
        extension.linear_gelu_fwd(x, new(intermediate, hidden).detach(), bias, up)
        extension.linear_gelu_bwd(x, new(hidden, intermediate).detach(), up, bias)
        total = torch.zeros(intermediate, device="cuda")
        for add in (False, True):
            extension.linear_gelu_bwd(x, new(hidden, intermediate).detach(), up, bias, total, up, add)
    torch.cuda.synchronize()


@torch.no_grad()
def run_one_launch() -> None:
    config = QFormerConfig(num_hidden_layers=2, encoder_hidden_size=64, use_qformer_text_input=False)
    model = QFormer(config).to("cuda", torch.bfloat16).eval()
    runner = _Runner(model, torch.nn.Parameter(new(1, 32, 768).detach()), torch.bfloat16, None)
    one = OneLaunch(config, runner.weights, *runner.first)
    for images, tokens in ((1, 257), (2, 1), (5, 40)):
        one.run(runner.project(new(images * tokens, 64)), images)
    torch.cuda.synchronize()


def reject() -> None:
    """Calls with a wrong shape, device or dtype, of which none may go through."""
    x, layout = torch.randn(8, 32, device="cuda"), SHORT.layouts()["sweep1"]
    labels = torch.zeros(8, dtype=torch.int64, device="cuda")
    calls = (
        lambda: ops.bias_gelu(x, x[0, :31], backend="triton"),
        lambda: ops.bias_gelu(x, x[0].cpu(), backend="triton"),
        lambda: ops.bias_gelu(x.long(), x[0], backend="triton"),
        lambda: ops.dropout_add_layer_norm(x, x[:4], x[0], x[0], eps=1e-12, backend="triton"),
        lambda: ops.linear_cross_entropy(x, x[:, :3], None, labels, backend="triton"),
        lambda: ops.contrastive_similarity(x.view(2, 4, 32), x[:, :5], backend="triton"),
        lambda: ops.query_text_attention(x.new_zeros(5, 3, 2, 16), layout, backend="triton"),
    )
    accepted = 0
    for call in calls:
        try:
            call()
        except (ValueError, TypeError):
            continue
        accepted += 1
    torch.cuda.synchronize()
    if accepted:
        raise SystemExit(f"{accepted} wrong calls were accepted")


PARTS = {
    "short": functools.partial(run_everything, SHORT),
    "long": functools.partial(run_everything, LONG),
    "step": run_step,
    "launchers": run_launchers,
    "extension": run_extension,
    "one_launch": run_one_launch,
    "reject": reject,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    for part in parser.parse_args().parts:
        if part in ("extension", "one_launch") and (reason := extension.why_not()):
            print(f"{part} not run: {reason}")
            continue
        PARTS[part]()
        print(f"ran {part}", flush=True)


if __name__ == "__main__":
    main()
