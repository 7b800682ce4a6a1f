"""Linear layer + cross-entropy without ever holding all logits, as one differentiable function.

The logits exist for one chunk of rows at a time. Each chunk is turned into its own gradient in place, and from it the
gradients of the hidden states, the head and its bias are computed during the forward pass; backward only multiplies
them by the incoming gradient. The idea is Liger's fused linear cross-entropy (arXiv:2410.10989); what differs is that
chunks are large enough for the matrix products to run at full speed, that the head's gradient is accumulated in fp32,
and that nothing is computed for rows or tensors that need none.

Shapes: T rows given, n rows with a label, H hidden size, V vocabulary (this rank's share of it, where it is sharded).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

_CHUNK_BYTES = {"cpu": 32 << 20}
_CHUNK_BYTES_ACCELERATOR = 1 << 30
_ROW_MULTIPLE = 128  # a tile of the matrix product
_COLUMN_MULTIPLE = 64  # 16-byte aligned rows for any vocabulary


@dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """What ``linear_cross_entropy`` computes: ``CE(softcap(logit_scale * (x @ W.T + bias)))``, summed over rows."""

    ignore_index: int = -100
    chunk_size: int | None = None  # rows; None = by `chunk_rows`
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c: logits become c * tanh(logits / c)
    vocab_group: Any = (
        None  # process group whose ranks hold equal shares of the vocabulary, in order; None = all is here
    )


def chunk_rows(rows: int, vocab_size: int, element_size: int, device_type: str) -> int:
    """How many rows to take at a time: as even as possible, with at most 1 GiB of logits (32 MiB on a CPU).

    1 GiB is 4096 rows of a 128k vocabulary in bf16: enough for the matrix products to run at their ceiling, and an
    eighth of what 8192 rows cost when bf16 logits, their fp32 copy and its gradient all exist.
    """
    budget = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES_ACCELERATOR)
    most = max(_ROW_MULTIPLE, budget // (vocab_size * element_size) // _ROW_MULTIPLE * _ROW_MULTIPLE)
    chunks = max(1, -(-rows // most))
    even = -(-rows // chunks)
    return min(most, max(1, -(-even // _ROW_MULTIPLE)) * _ROW_MULTIPLE)


@torch.library.custom_op("automodel::cross_entropy_rows", mutates_args={"logits"}, device_types="cpu")
def cross_entropy_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    with_grad: bool,
) -> torch.Tensor:
    """Cross-entropy of each row, in fp32; with ``with_grad`` the logits are overwritten by their own gradient.

    Args:
        logits: [n, V], any float dtype, rows contiguous. The gradient is with respect to these, before bias and scale.
        labels: [n] int64; a row of ``ignore_index`` has loss 0 and gradient 0.
        bias: [V] or None, added first.
        ignore_index: label of a row to skip.
        logit_scale: factor applied after the bias.
        logit_softcap: c in ``c * tanh(logits / c)``, applied last; 0 = none.
        with_grad: whether to write the gradient.

    Returns:
        [n] fp32, not reduced.
    """
    z, slope = _transformed(logits, bias, logit_scale, logit_softcap)
    kept = labels != ignore_index
    target = torch.where(kept, labels, 0).unsqueeze(1)
    log_z = torch.logsumexp(z, dim=-1, keepdim=True)
    loss = torch.where(kept, (log_z - z.gather(1, target)).squeeze(1), 0.0)
    if with_grad:
        grad = torch.exp(z - log_z)
        grad.scatter_add_(1, target, torch.full_like(log_z, -1.0))
        logits.copy_(grad.mul_(slope).mul_(kept.unsqueeze(1)))
    return loss


@cross_entropy_rows.register_kernel("cuda")
def _(logits, labels, bias, ignore_index, logit_scale, logit_softcap, with_grad):
    from nemo_automodel.kernels.linear_ce_triton import launch_cross_entropy_rows

    return launch_cross_entropy_rows(logits, labels, bias, ignore_index, logit_scale, logit_softcap, with_grad)


@cross_entropy_rows.register_fake
def _(logits, labels, bias, ignore_index, logit_scale, logit_softcap, with_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    label_indices: torch.Tensor | None = None,
    options: LinearCrossEntropyOptions = LinearCrossEntropyOptions(),
) -> torch.Tensor:
    """Sum over rows of the cross-entropy of ``hidden @ weight.T + bias``; gradients only for what requires them.

    Args:
        hidden: [T, H], dtype as ``weight``.
        weight: [V, H].
        bias: [V] or None.
        labels: [T] int64, of the whole vocabulary.
        label_indices: [n] int64, distinct: the rows to compute, which must include every labelled one. None = all T
            rows run through the head (on a CPU: the labelled ones, since looking at the labels costs nothing there).
        options: see ``LinearCrossEntropyOptions``.

    Returns:
        fp32 scalar. With no labelled row it is 0 and backpropagates zeros.
    """
    if label_indices is None and hidden.device.type == "cpu":
        label_indices = (labels != options.ignore_index).nonzero().squeeze(1)
    if label_indices is not None and label_indices.numel() == labels.numel():
        label_indices = None
    if not torch.is_grad_enabled():
        return _run_chunks(hidden, weight, bias, labels, label_indices, options, (False, False, False))[0]
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_indices, options)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, label_indices, options):
        needs = ctx.needs_input_grad[:3]
        loss, *grads = _run_chunks(hidden, weight, bias, labels, label_indices, options, needs)
        ctx.save_for_backward(label_indices, *grads)
        ctx.num_rows = hidden.shape[0]
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        label_indices, d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad_loss
            if label_indices is not None:
                full = d_hidden.new_zeros(ctx.num_rows, d_hidden.shape[1])
                d_hidden = full.index_copy_(0, label_indices, d_hidden)
        weight_dtype, bias_dtype = ctx.dtypes
        return d_hidden, _scaled(d_weight, grad_loss, weight_dtype), _scaled(d_bias, grad_loss, bias_dtype), *[None] * 3


def _scaled(grad: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """``(grad * factor).to(dtype)`` in one pass, rounded once, without an fp32 temporary."""
    if grad is None:
        return None
    if grad.is_cuda and dtype != grad.dtype:  # torch's own mixed-dtype product runs at a third of the bandwidth
        from nemo_automodel.kernels.linear_ce_triton import launch_scaled

        return launch_scaled(grad, factor, dtype)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


def _run_chunks(hidden, weight, bias, labels, label_indices, options, needs):
    """The loss and the (unscaled) gradients of hidden [n, H], weight [V, H] fp32, bias [V] fp32; None where unneeded."""
    if label_indices is not None:
        hidden, labels = hidden.index_select(0, label_indices), labels.index_select(0, label_indices)
    need_hidden, need_weight, need_bias = needs
    n, vocab_size = hidden.shape[0], weight.shape[0]
    element_size = hidden.element_size() if options.vocab_group is None else 16  # fp32 copies are made of sharded rows
    rows = options.chunk_size or chunk_rows(n, vocab_size, element_size, hidden.device.type)

    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if need_weight else None
    if d_weight is not None and n == 0:
        d_weight.zero_()  # otherwise the first chunk writes all of it
    d_bias = weight.new_zeros(vocab_size, dtype=torch.float32) if need_bias else None
    loss = hidden.new_empty(n, dtype=torch.float32)
    rows_of = cross_entropy_rows if options.vocab_group is None else partial(_sharded_rows, group=options.vocab_group)
    stride = -(-vocab_size // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE
    buffer = hidden.new_empty(min(rows, n), stride)
    buffer[:, vocab_size:] = 0  # a bf16 product on a CPU reads whole tiles, and NaN times 0 is NaN
    buffer = buffer[:, :vocab_size]
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        logits = buffer[: chunk.stop - start]
        torch.mm(hidden[chunk], weight.t(), out=logits)
        loss[chunk] = rows_of(
            logits,
            labels[chunk],
            bias,
            options.ignore_index,
            options.logit_scale,
            options.logit_softcap or 0.0,
            any(needs),
        )
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[chunk])
        if d_weight is not None:
            _accumulate_product(d_weight, logits.t(), hidden[chunk], beta=0 if start == 0 else 1)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=torch.float32)
    if d_hidden is not None and options.vocab_group is not None:
        dist.all_reduce(d_hidden, group=options.vocab_group)
    return loss.sum(), d_hidden, d_weight, d_bias


def _sharded_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float,
    with_grad: bool,
    group: Any,
) -> torch.Tensor:
    """As ``cross_entropy_rows``, each rank of ``group`` having V columns of the logits: two numbers a row are summed.

    In torch operations on every device, a few fp32 copies of one chunk's logits.
    """
    z, slope = _transformed(logits, bias, logit_scale, logit_softcap)
    columns = z.shape[1]
    kept = labels != ignore_index
    local = labels - dist.get_rank(group) * columns
    here = kept & (local >= 0) & (local < columns)
    target = torch.where(here, local, 0).unsqueeze(1)
    most = z.amax(dim=-1)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    exp = torch.exp(z - most.unsqueeze(1))
    sums = torch.stack([exp.sum(-1), torch.where(here, z.gather(1, target).squeeze(1), 0.0)])
    dist.all_reduce(sums, group=group)
    loss = torch.where(kept, sums[0].log() + most - sums[1], 0.0)
    if with_grad:
        grad = exp.div_(sums[0].unsqueeze(1))
        grad.scatter_add_(1, target, -here.to(grad.dtype).unsqueeze(1))
        logits.copy_(grad.mul_(slope).mul_(kept.unsqueeze(1)))
    return loss


def _transformed(
    logits: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The logits in fp32 after bias, scale and soft-cap, and the derivative of that."""
    z = logits.float()
    if bias is not None:
        z = z + bias.float()
    z = z * scale
    if not softcap:
        return z, scale
    squashed = torch.tanh(z / softcap)
    return squashed * softcap, (1 - squashed * squashed) * scale


def _accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int) -> None:
    """``total = beta * total + a @ b`` in fp32, whatever the dtype of ``a`` and ``b``."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif a.dtype != total.dtype:
        total.copy_(a @ b) if beta == 0 else total.add_(a @ b)
    else:
        total.addmm_(a, b, beta=beta)
