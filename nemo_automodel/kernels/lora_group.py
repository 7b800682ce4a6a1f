"""``lora_linears``: the adapted linear layers that share one input, as one differentiable op.

x is read once for all the narrow products of the forward (the A factors are put below one another) and once for all the
gradients of A; dX is begun with all low-rank parts at once, and each base GEMM accumulates onto it. Alone, each layer
reads x twice and makes a dX of its own, and the dX are summed: 8 passes over x's size a layer, 4 and a bit here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_automodel.kernels.lora import MAX_RANK, _rows


def fits(ranks: list[int]) -> bool:
    """Whether adapters of these ranks go through the kernels together."""
    return sum(ranks) <= MAX_RANK


def lora_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor], scale: float
) -> list[Tensor]:
    """``lora.lora_linear`` for each of several layers over the same ``x``.

    Args:
        x: activations ``[..., K]``, at least one row, fp32, fp16 or bf16.
        weights: frozen weights ``[N_i, K]`` of x's dtype, any strides; they get no gradient.
        biases: ``[N_i]`` each, frozen too; none at all, or one for every layer.
        lora_as: ``[r_i, K]``, the ranks together at most 128, all of one floating dtype, which their gradients have too.
        lora_bs: ``[N_i, r_i]``, likewise.
        scale: alpha / r.
    """
    made: list[Tensor] = _forward_op(x, weights, biases, lora_as, lora_bs, scale)
    return list(made[:-1])  # a list where it is compiled, too


def _forward(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor], scale: float
) -> list[Tensor]:
    from nemo_automodel.kernels import lora_triton

    rows = _rows(x)
    xa = lora_triton.shrink(rows, torch.cat(lora_as).t(), scale)
    outputs = []
    for i, (weight, lora_b, part) in enumerate(zip(weights, lora_bs, _parts(xa, lora_as), strict=True)):
        y = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        lora_triton.expand(part, lora_b.t(), y, bias=biases[i] if biases else None)
        y.addmm_(rows, weight.t())
        outputs.append(y.view(*x.shape[:-1], weight.shape[0]))
    return [*outputs, xa]


def _backward(
    dys: list[Tensor],
    x: Tensor,
    xa: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scale: float,
    with_dx: bool,
) -> list[Tensor]:
    from nemo_automodel.kernels import lora_triton

    rows, dy_rows = _rows(x), [_rows(dy) for dy in dys]
    dyb = torch.empty_like(xa)
    d_lora_bs = []
    for dy, lora_b, d_part, part in zip(dy_rows, lora_bs, _parts(dyb, lora_as), _parts(xa, lora_as), strict=True):
        lora_triton.shrink(dy, lora_b, scale, out=d_part)
        d_lora_bs.append(lora_triton.gradient(part, dy, transposed=True).to(lora_b.dtype))
    d_lora_a = lora_triton.gradient(dyb, rows)
    ranks = [lora_a.shape[0] for lora_a in lora_as]
    d_lora_as = [d.to(a.dtype, copy=True) for d, a in zip(d_lora_a.split(ranks), lora_as, strict=True)]
    dx = torch.empty_like(rows) if with_dx else rows.new_empty(0)
    if with_dx:
        lora_triton.expand(dyb, torch.cat(lora_as), dx)
        for dy, weight in zip(dy_rows, weights, strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(x.shape)
    return [dx, *d_lora_as, *d_lora_bs]


def _parts(wide: Tensor, lora_as: list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of ``wide`` [T, sum of ranks] that belong to each adapter."""
    return wide.split([lora_a.shape[0] for lora_a in lora_as], dim=1)


_forward_op = torch.library.custom_op(
    "automodel::lora_linears",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_as, Tensor[] lora_bs, float scale) -> Tensor[]",
)
_backward_op = torch.library.custom_op(
    "automodel::lora_linears_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor[] dys, Tensor x, Tensor xa, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, float scale,"
    " bool with_dx) -> Tensor[]",
)


@_forward_op.register_fake
def _(x, weights, biases, lora_as, lora_bs, scale):
    tokens = x.numel() // x.shape[-1]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(tokens, sum(lora_a.shape[0] for lora_a in lora_as))]


@_backward_op.register_fake
def _(dys, x, xa, weights, lora_as, lora_bs, scale, with_dx):
    dx = x.new_empty(x.shape) if with_dx else x.new_empty(0)
    return [dx, *(torch.empty_like(factor) for factor in (*lora_as, *lora_bs))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, lora_as, lora_bs, scale = inputs
    if any(frozen.requires_grad for frozen in (*weights, *biases)):
        raise RuntimeError("lora_linears gives weights and biases no gradient; freeze them (requires_grad_(False))")
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x, output[-1], *weights, *lora_as, *lora_bs)
    ctx.scale, ctx.layers, ctx.biases = scale, len(weights), len(biases)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n = ctx.layers
    x, xa, *rest = ctx.saved_tensors
    weights, lora_as, lora_bs = rest[:n], rest[n : 2 * n], rest[2 * n :]
    with_dx = ctx.needs_input_grad[0]
    dx, *factors = _backward_op(grads[:n], x, xa, weights, lora_as, lora_bs, ctx.scale, with_dx)
    return dx if with_dx else None, [None] * n, [None] * ctx.biases, factors[:n], factors[n:], None


_forward_op.register_autograd(_differentiate, setup_context=_save)
