"""Autograd of the custom ops: the first outputs are the op's results, all others are kept for backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qformer_fast.ops._seeds import check_drawn_again


def register_autograd(
    op: Any, backward: Callable[..., Any], setup_context: Callable[[Any, tuple, Any], None], results: int = 1
) -> None:
    """``backward(ctx, dout)`` gets the gradients of the ``results`` alone, None for one that nobody uses.

    Autograd would otherwise fill a tensor with zeros for every other output, at each call.
    """

    def setup(ctx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[results:])
        setup_context(ctx, inputs, output)

    def run(ctx, *douts: Tensor | None) -> Any:
        if all(dout is None for dout in douts[:results]):
            return tuple([None] * len(x) if isinstance(x, list | tuple) else None for x in ctx.needs_input_grad)
        return backward(ctx, *douts[:results])

    op.register_autograd(run, setup_context=setup)


def frees_saved(dout: Tensor) -> bool:
    """Whether backward may write to what forward kept: nothing reads it afterwards, and no compiler traces the call."""
    traced = torch.compiler.is_compiling() or type(dout) is not Tensor
    return not (traced or torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())


def norm_totals(out_bias_and_norm: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """(out_bias, norm_weight, norm_bias) in the order in which dropout_add_layer_norm_bwd adds to them."""
    out_bias, norm_weight, norm_bias = out_bias_and_norm
    return None if out_bias is None else (norm_weight, norm_bias, out_bias)


def without_totals(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference as an op's implementation: autograd takes its gradients, wherever kernels would add them."""

    @functools.wraps(reference)
    def run(
        *args: Any, gradients=None, add_gradients=True, kv_gradients=None, accumulate=False, **options: Any
    ) -> Tensor:
        check_drawn_again(max((value for name, value in options.items() if name.endswith("dropout_p")), default=0.0))
        return reference(*args, **options)

    return run
