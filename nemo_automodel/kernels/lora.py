"""``lora_linear``: a frozen linear layer plus its low-rank adapter, as one differentiable op.

The base GEMM stays in cuBLAS. The low-rank product is written to the output first and the base GEMM accumulates onto it
(``beta = 1``), so the output is never read back by a kernel of its own and is rounded once less than when two results
are added. The backward does the same for dX, computes no gradient of the frozen weight, and accumulates dA and dB in
fp32. Saved for backward: x and the [T, r] product. ``torch.compile`` keeps its graph whole and sees the kernels in it, so
that what it compiles launches them itself: calling an opaque op instead takes the host half a millisecond a layer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

MAX_RANK = 128
"""Above it the factors' tiles no longer fit beside the activation's in shared memory, and cuBLAS is as good."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def unsupported_reason(rank: int) -> str | None:
    """Why the Triton kernels cannot serve adapters of ``rank`` on this machine; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if rank > MAX_RANK:
        return f"dim {rank} is above {MAX_RANK}"
    return None


def runs_on(device_type: str) -> bool:
    """Whether the kernels run on this kind of device: on "cuda", and on "cpu" in Triton's interpreter (for tests)."""
    return device_type in _DEVICES


def is_faster_for(weight: torch.Tensor, device: torch.device | None = None) -> bool:
    """Whether the kernels were measured to be faster than plain torch for layers with such a ``weight``.

    ``device`` is where it will be, for one on the meta device; default where it is.
    """
    device = device or weight.device
    if device.type != "cuda" or torch.version.hip is not None or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``x @ weight^T + bias + scale * (x @ lora_a^T) @ lora_b^T`` by the Triton kernels.

    Args:
        x: activations ``[..., K]``, at least one row, fp32, fp16 or bf16.
        weight: frozen weight ``[N, K]`` of x's dtype, any strides; it gets no gradient.
        bias: ``[N]`` or None; frozen too.
        lora_a: ``[r, K]``, r at most 128, of any floating dtype; its gradient comes in that dtype, summed in fp32.
        lora_b: ``[N, r]``, as ``lora_a``.
        scale: alpha / r.
    """
    return _forward_op(x, weight, bias, lora_a, lora_b, scale)[0]


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from nemo_automodel.kernels import lora_triton

    rows = _rows(x)
    y = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    xa = lora_triton.shrink(rows, lora_a.t(), scale)
    lora_triton.expand(xa, lora_b.t(), y, bias=bias)
    _accumulate(y, rows, weight.t())
    return y.view(*x.shape[:-1], weight.shape[0]), xa


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    xa: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    with_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from nemo_automodel.kernels import lora_triton

    rows, dy_rows = _rows(x), _rows(dy)
    dx = torch.empty_like(rows) if with_dx else rows.new_empty(0)
    dyb = lora_triton.shrink(dy_rows, lora_b, scale)
    d_lora_a = lora_triton.gradient(dyb, rows).to(lora_a.dtype)
    d_lora_b = lora_triton.gradient(xa, dy_rows, transposed=True).to(lora_b.dtype)
    if with_dx:
        lora_triton.expand(dyb, lora_a, dx)
        _accumulate(dx, dy_rows, weight)
        dx = dx.view(x.shape)
    return dx, d_lora_a, d_lora_b


_library = torch.library.Library("automodel", "FRAGMENT")  # without custom_op's layers, which take longer than the call
_library.define("addmm_(Tensor(a!) y, Tensor x, Tensor w) -> ()")


def _addmm_(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    y.addmm_(x, w)


_library.impl("addmm_", _addmm_, "CompositeExplicitAutograd")


def _accumulate(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """``y += x @ w`` in place, in compiled code too, where torch's own ``addmm_`` would become a copy of y and a product."""
    torch.ops.automodel.addmm_(y, x, w)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., F]`` as ``[T, F]`` with contiguous rows; copies only what cannot be viewed so."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _op(name: str, function: Callable[..., Any]) -> Any:
    """``function`` as an op whose kernels the compiler sees; opaque to it in Triton's interpreter, which has none."""
    make = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return make(f"automodel::{name}", function, mutates_args=())


_forward_op = _op("lora_linear", _forward)
_backward_op = _op("lora_linear_backward", _backward)


@_forward_op.register_fake
def _(x, weight, bias, lora_a, lora_b, scale):
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, lora_a.shape[0])


@_backward_op.register_fake
def _(dy, x, xa, weight, lora_a, lora_b, scale, with_dx):
    dx = x.new_empty(x.shape) if with_dx else x.new_empty(0)
    return dx, torch.empty_like(lora_a), torch.empty_like(lora_b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, lora_a, lora_b, scale = inputs
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise RuntimeError("lora_linear gives its weight and bias no gradient; freeze them (requires_grad_(False))")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight, lora_a, lora_b)
    ctx.scale = scale


def _differentiate(ctx: Any, dy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, xa, weight, lora_a, lora_b = ctx.saved_tensors
    with_dx = ctx.needs_input_grad[0]
    dx, d_lora_a, d_lora_b = _backward_op(dy, x, xa, weight, lora_a, lora_b, ctx.scale, with_dx)
    return dx if with_dx else None, None, None, d_lora_a, d_lora_b, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
