"""What tensors pass where replicated and sharded compute meet, each a forward and its adjoint.

The pairs are Megatron-LM's (arXiv:1909.08053, and arXiv:2205.05198 for the sequence). All are functional collectives, so
torch.compile keeps its graph whole. ``Ranks`` names the process group; R is how many ranks it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel ranks, and which of them this process is."""

    group_name: str
    size: int
    rank: int
    group: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """The ranks of a one-dimensional ``mesh``."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank(), mesh.get_group())

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self


def all_reduce(x: Tensor, ranks: Ranks, op: str = "sum") -> Tensor:
    """Sum (or ``op``: "max") of ``x`` over the ranks; no gradient."""
    if x.numel() == 0:
        return x
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, ranks.group_name))


def _all_gather(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    if x.numel() == 0:
        return torch.cat([x] * ranks.size, dim=dim)
    out = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), ranks.size, ranks.group_name))
    if dim % x.ndim == 0:
        return out
    return torch.cat(out.chunk(ranks.size, dim=0), dim=dim)


def _slice(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    part = x.shape[dim] // ranks.size
    return x.narrow(dim, part * ranks.rank, part)


def _reduce_scatter(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    if x.device.type == "cpu":  # not every gloo has it
        return _slice(all_reduce(x, ranks), dim, ranks).contiguous()
    if dim % x.ndim != 0:
        x = torch.cat(x.chunk(ranks.size, dim=dim), dim=0)
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", ranks.size, ranks.group_name))


def copy_to_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """``x``, the same on every rank, into sharded compute: each rank's gradient is a part, so they are summed."""
    return _Copy.apply(x, ranks)


def reduce_from_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of each rank's part ``x``, out of sharded compute: its gradient is whole on every rank."""
    return _Reduce.apply(x, ranks)


def gather_from_ranks(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """The ranks' slices ``x`` put together along ``dim``, for compute that is the same on every rank."""
    return _Gather.apply(x, dim, ranks)


def split_to_ranks(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """This rank's slice along ``dim`` (its size a multiple of R) of ``x``, the same on every rank."""
    return _Split.apply(x, dim, ranks)


def gather_to_parts(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """As ``gather_from_ranks``, into sharded compute: the gradient's parts are summed and scattered."""
    return _GatherToParts.apply(x, dim, ranks)


def scatter_parts(x: Tensor, dim: int, ranks: Ranks) -> Tensor:
    """This rank's slice along ``dim`` (its size a multiple of R) of the sum of each rank's part ``x``."""
    return _ScatterParts.apply(x, dim, ranks)


def all_to_all(x: Tensor, out_sizes: list[int], in_sizes: list[int], ranks: Ranks) -> Tensor:
    """Rows of ``x``, the first ``in_sizes[0]`` to rank 0 and so on; returns ``out_sizes`` rows of each rank in turn."""
    return _AllToAll.apply(x, out_sizes, in_sizes, ranks)


def all_to_all_counts(counts: Tensor, ranks: Ranks) -> tuple[list[int], list[int], Tensor]:
    """Before ``all_to_all``: of ``counts``, as many entries for each rank, the rows (sent to, got from) each rank.

    Also returns the entries that arrive, rank after rank. The host waits for the device here.
    """
    equal = [len(counts) // ranks.size] * ranks.size
    arriving = _all_to_all(counts, equal, equal, ranks)
    sums = torch.stack([counts.view(ranks.size, -1).sum(1), arriving.view(ranks.size, -1).sum(1)])
    sent, got = sums.tolist()
    return sent, got, arriving


def exchange_slices(x: Tensor, dim: int, sizes: tuple[int, ...], ranks: Ranks) -> Tensor:
    """A fused weight's shard: ``x``, this rank's contiguous 1/R along ``dim``, as its 1/R of each fused part.

    ``sizes`` are the parts' whole sizes (q, k, v, say), each a multiple of R. Every rank sends what others lack and
    gets what it lacks, about 1/R of the weight; the gradient goes back the same way.
    """
    moved = _Exchange.apply(x.movedim(dim, 0), sizes, ranks)
    return moved.movedim(0, dim)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.ranks), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return _all_gather(x, dim, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _slice(grad, ctx.dim, ctx.ranks).contiguous(), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return _slice(x, dim, ranks).clone(memory_format=torch.contiguous_format)  # else all of x stays alive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, ctx.dim, ctx.ranks), None, None


class _GatherToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return _all_gather(x, dim, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _reduce_scatter(grad, ctx.dim, ctx.ranks), None, None


class _ScatterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, ranks: Ranks) -> Tensor:
        ctx.dim, ctx.ranks = dim, ranks
        return _reduce_scatter(x, dim, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, ctx.dim, ctx.ranks), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_sizes: list[int], in_sizes: list[int], ranks: Ranks) -> Tensor:
        ctx.sizes, ctx.ranks = (out_sizes, in_sizes), ranks
        return _all_to_all(x, out_sizes, in_sizes, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        out_sizes, in_sizes = ctx.sizes
        return _all_to_all(grad, in_sizes, out_sizes, ctx.ranks), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], ranks: Ranks) -> Tensor:
        ctx.sizes, ctx.ranks = sizes, ranks
        sends = [_overlap(ranks.rank, to, sizes, ranks.size) for to in range(ranks.size)]
        gets = [_overlap(owner, ranks.rank, sizes, ranks.size) for owner in range(ranks.size)]
        sent = torch.cat([_rows(x, pieces, 0) for pieces in sends])
        got = _all_to_all(sent, [_count(p) for p in gets], [_count(p) for p in sends], ranks)
        # owners hold a fused weight's rows in order, but a part may lie on several: put them in the parts' order
        return _reorder(got, gets, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sizes, ranks = ctx.sizes, ctx.ranks
        sends = [_overlap(ranks.rank, to, sizes, ranks.size) for to in range(ranks.size)]
        gets = [_overlap(owner, ranks.rank, sizes, ranks.size) for owner in range(ranks.size)]
        sent = torch.cat([_rows(grad, pieces, 1) for pieces in gets])
        got = _all_to_all(sent, [_count(p) for p in sends], [_count(p) for p in gets], ranks)
        return _reorder(got, sends, 0), None, None


def _overlap(owner: int, user: int, sizes: tuple[int, ...], ranks: int) -> list[tuple[int, int, int]]:
    """(start in ``owner``'s contiguous shard, start in ``user``'s parts, length) of what the one holds for the other."""
    shard = sum(sizes) // ranks
    low, high = owner * shard, (owner + 1) * shard
    pieces, base, used = [], 0, 0
    for size in sizes:
        part = size // ranks
        first = base + user * part
        start, stop = max(first, low), min(first + part, high)
        if start < stop:
            pieces.append((start - low, used + start - first, stop - start))
        base, used = base + size, used + part
    return pieces


def _count(pieces: list[tuple[int, int, int]]) -> int:
    return sum(length for _, _, length in pieces)


def _rows(x: Tensor, pieces: list[tuple[int, int, int]], side: int) -> Tensor:
    return torch.cat([x.narrow(0, piece[side], piece[2]) for piece in pieces]) if pieces else x[:0]


def _reorder(x: Tensor, by_rank: list[list[tuple[int, int, int]]], side: int) -> Tensor:
    """``x``, received piece after piece, in the order of the pieces' starts on ``side``."""
    starts, offset = [], 0
    for piece in (piece for pieces in by_rank for piece in pieces):
        starts.append((piece[side], offset, piece[2]))
        offset += piece[2]
    return torch.cat([x.narrow(0, at, length) for _, at, length in sorted(starts)])


def _all_to_all(x: Tensor, out_sizes: list[int], in_sizes: list[int], ranks: Ranks) -> Tensor:
    out = _ops.all_to_all_single(x.contiguous(), out_sizes, in_sizes, ranks.group_name)
    return _ops.wait_tensor(out)
