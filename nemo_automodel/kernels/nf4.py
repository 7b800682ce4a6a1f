"""``nf4_linear``: a frozen linear layer whose weight is kept in four bits, as one differentiable op, with or without LoRA.

bitsandbytes packs and unpacks the weight (Dettmers et al. 2023, arXiv 2305.14314); the product itself is an ordinary one in
the activation's dtype. The whole weight exists only while an op runs: unpacked in forward and once more in backward, and
never kept between them. That is why these are opaque ops: a compiler that saw the unpacking would keep its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_automodel.kernels import lora

BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one where they are packed too."""


@dataclass
class Packed:
    """A weight ``[N, K]`` in four bits.

    Attributes:
        values: uint8, two weights each.
        scales: One a block: fp32, or uint8 where they are packed in turn by ``scale_scales``, ``scale_offset`` (fp32) and
            ``scale_code`` (the 256 values that their bytes stand for).
    """

    values: Tensor
    scales: Tensor
    scale_scales: Tensor | None
    scale_offset: Tensor | None
    scale_code: Tensor | None


def pack(weight: Tensor, kind: str, nested: bool) -> Packed:
    """``weight`` in four bits of ``kind`` (``nf4`` or ``fp4``), where it is; ``nested`` packs the scales in eight."""
    from bitsandbytes import functional

    values, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=nested
    )
    if not nested:
        return Packed(values, state.absmax, None, None, None)
    outer = state.state2
    assert outer is not None
    assert outer.blocksize == SCALES_BLOCK
    return Packed(values, state.absmax, outer.absmax, state.offset, outer.code.to(weight.device))


def unpack(packed: Packed, shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
    """The weight ``[N, K]`` that ``packed`` stands for."""
    from bitsandbytes import functional

    scales = packed.scales
    if packed.scale_scales is not None:
        scales = functional.dequantize_blockwise(
            scales, absmax=packed.scale_scales, code=packed.scale_code, blocksize=SCALES_BLOCK
        )
        scales += packed.scale_offset
    state = functional.QuantState(scales, torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type=kind)
    return functional.dequantize_4bit(packed.values, state)


def nf4_linear(x: Tensor, packed: Packed, out_features: int, kind: str) -> Tensor:
    """``x @ W^T``; ``x`` [..., K] gets a gradient, W none. The result is in x's dtype."""
    return _forward_op(x, *_parts(packed), out_features, kind)


def nf4_lora_linear(
    x: Tensor, packed: Packed, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, kind: str
) -> Tensor:
    """``lora.lora_linear`` by the Triton kernels, over a packed weight."""
    return _lora_forward_op(x, *_parts(packed), bias, lora_a, lora_b, scale, kind)[0]


def _parts(packed: Packed) -> tuple[Any, ...]:
    return packed.values, packed.scales, packed.scale_scales, packed.scale_offset, packed.scale_code


def _forward(x: Tensor, values: Tensor, scales: Tensor, s: Tensor | None, o: Tensor | None, c: Tensor | None,
             out_features: int, kind: str) -> Tensor:  # fmt: skip
    weight = unpack(Packed(values, scales, s, o, c), (out_features, x.shape[-1]), x.dtype, kind)
    return torch.nn.functional.linear(x, weight)


def _backward(dy: Tensor, values: Tensor, scales: Tensor, s: Tensor | None, o: Tensor | None, c: Tensor | None,
              in_features: int, kind: str) -> Tensor:  # fmt: skip
    return dy @ unpack(Packed(values, scales, s, o, c), (dy.shape[-1], in_features), dy.dtype, kind)


def _lora_forward(x: Tensor, values: Tensor, scales: Tensor, s: Tensor | None, o: Tensor | None, c: Tensor | None,
                  bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, kind: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight = unpack(Packed(values, scales, s, o, c), (lora_b.shape[0], x.shape[-1]), x.dtype, kind)
    return lora._forward(x, weight, bias, lora_a, lora_b, scale)


def _lora_backward(dy: Tensor, x: Tensor, xa: Tensor, values: Tensor, scales: Tensor, s: Tensor | None, o: Tensor | None,
                   c: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, kind: str, with_dx: bool,
                   ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    packed, shape = Packed(values, scales, s, o, c), (lora_b.shape[0], x.shape[-1])
    weight = unpack(packed, shape, x.dtype, kind) if with_dx else x.new_empty(0)
    return lora._backward(dy, x, xa, weight, lora_a, lora_b, scale, with_dx)


_PACKED = "Tensor values, Tensor scales, Tensor? s, Tensor? o, Tensor? c"
_forward_op = torch.library.custom_op(
    "automodel::nf4_linear",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, {_PACKED}, int out_features, str kind) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "automodel::nf4_linear_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, {_PACKED}, int in_features, str kind) -> Tensor",
)
_lora_forward_op = torch.library.custom_op(
    "automodel::nf4_lora_linear",
    _lora_forward,
    mutates_args=(),
    schema=f"(Tensor x, {_PACKED}, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, str kind) -> (Tensor, Tensor)",
)
_lora_backward_op = torch.library.custom_op(
    "automodel::nf4_lora_linear_backward",
    _lora_backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor xa, {_PACKED}, Tensor lora_a, Tensor lora_b, float scale, str kind,"
    " bool with_dx) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(x, values, scales, s, o, c, out_features, kind):
    return x.new_empty(*x.shape[:-1], out_features)


@_backward_op.register_fake
def _(dy, values, scales, s, o, c, in_features, kind):
    return dy.new_empty(*dy.shape[:-1], in_features)


@_lora_forward_op.register_fake
def _(x, values, scales, s, o, c, bias, lora_a, lora_b, scale, kind):
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], lora_b.shape[0]), x.new_empty(tokens, lora_a.shape[0])


@_lora_backward_op.register_fake
def _(dy, x, xa, values, scales, s, o, c, lora_a, lora_b, scale, kind, with_dx):
    dx = x.new_empty(x.shape) if with_dx else x.new_empty(0)
    return dx, torch.empty_like(lora_a), torch.empty_like(lora_b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *parts, _, kind = inputs
    ctx.save_for_backward(*parts)
    ctx.in_features, ctx.kind = x.shape[-1], kind


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dy, *ctx.saved_tensors, ctx.in_features, ctx.kind), *[None] * 7


def _lora_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *parts, _, lora_a, lora_b, scale, kind = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *parts, lora_a, lora_b)
    ctx.scale, ctx.kind = scale, kind


def _lora_differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    with_dx = ctx.needs_input_grad[0]
    dx, d_lora_a, d_lora_b = _lora_backward_op(dy, *ctx.saved_tensors, ctx.scale, ctx.kind, with_dx)
    return dx if with_dx else None, *[None] * 6, d_lora_a, d_lora_b, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
_lora_forward_op.register_autograd(_lora_differentiate, setup_context=_lora_save)
