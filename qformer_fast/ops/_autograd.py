"""Autograd of the custom ops: the first output is the op's result, all others are kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register_autograd(op: Any, backward: Callable[..., Any], setup_context: Callable[[Any, tuple, Any], None]) -> None:
    """``backward(ctx, dout)`` gets the gradient of the result alone.

    Autograd would otherwise fill a tensor with zeros for every other output, at each call.
    """

    def setup(ctx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        setup_context(ctx, inputs, output)

    def run(ctx, dout: Tensor | None, *_) -> Any:
        return (None,) * len(ctx.needs_input_grad) if dout is None else backward(ctx, dout)

    op.register_autograd(run, setup_context=setup)
