"""``attention_op``: an attention kernel with a backward of its own as one torch op, opaque to ``torch.compile``.

Shape legend: B batch, H query heads, G key/value heads, S tokens, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attention_op(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], arguments: str, num_gradients: int = 3
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register ``automodel::<name>`` and its backward, and return the op.

    Args:
        name: of the op.
        forward: takes query [B, H, S, E], key and value [B, G, S, E] and what ``arguments`` says; returns the output
            [B, S, H, E] and the log-sum-exp [B, H, S] in fp32 (fp64 for fp64), both contiguous.
        backward: takes the output's gradient, the output, the log-sum-exp and all that ``forward`` takes; returns a gradient of
            each of the first ``num_gradients`` of these, laid out as ``torch.empty_like`` of it.
        arguments: names and types, as in a torch schema, of what follows the value.
        num_gradients: how many have one (default 3: query, key and value).
    """
    inputs = f"Tensor query, Tensor key, Tensor value, {arguments}"
    gradients = ", ".join(["Tensor"] * num_gradients)
    op = torch.library.custom_op(
        f"automodel::{name}", forward, mutates_args=(), schema=f"({inputs}) -> (Tensor, Tensor)"
    )
    backward_op = torch.library.custom_op(
        f"automodel::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor dout, Tensor out, Tensor lse, {inputs}) -> ({gradients})",
    )

    @op.register_fake
    def _(query, key, value, *_):
        batch, heads, length, size = query.shape
        summed = torch.promote_types(query.dtype, torch.float32)
        return query.new_empty(batch, length, heads, size), query.new_empty(batch, heads, length, dtype=summed)

    @backward_op.register_fake
    def _(dout, out, lse, *inputs):
        return tuple(torch.empty_like(x) for x in inputs[:num_gradients])

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output, *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]

    def differentiate(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        inputs = [y if x is None else x for x, y in zip(tensors, ctx.options, strict=True)]
        return *backward_op(dout, out, lse, *inputs), *[None] * (len(inputs) - num_gradients)

    op.register_autograd(differentiate, setup_context=save)
    return op
