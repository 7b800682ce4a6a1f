"""Which part of a whole tensor this rank holds, and putting it there; the same for sharded and whole tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Intervals = tuple[tuple[int, int], ...]
"""Ranges ``[start, stop)`` along one dimension, in order: one for a plain shard, several for a strided one."""


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, sharded if the model is, under the name it has in the plain model."""
    live = model.state_dict(keep_vars=True)  # also lets FSDP put its shards back in place
    return {plain_name(name): tensor for name, tensor in live.items() if isinstance(tensor, Tensor)}


def plain_name(name: str) -> str:
    """A tensor's name without what ``torch.compile`` and activation checkpointing insert."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def local_of(tensor: Tensor) -> Tensor:
    """The values that this rank holds of ``tensor``, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_local(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor that is sharded as ``tensor`` is, with ``local`` as this rank's part, on whichever device that is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor(local, tensor._spec, requires_grad=False)  # ``from_local`` would move it to the mesh's device


def held(tensor: Tensor) -> tuple[Intervals, ...]:
    """For each dimension of ``tensor``, where in the whole this rank's part lies; communicates nothing."""
    if not isinstance(tensor, DTensor):
        return tuple(((0, size),) for size in tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(_held_along(size, mesh, _along(placements, d, tensor.ndim)) for d, size in enumerate(tensor.shape))


def count(intervals: Intervals) -> int:
    """How many indices ``intervals`` cover."""
    return sum(stop - start for start, stop in intervals)


def take(whole: Tensor, dim: int, intervals: Intervals) -> Tensor:
    """The parts ``intervals`` of ``whole`` along ``dim``, one after the other; a view where there is one only."""
    parts = [whole.narrow(dim, start, stop - start) for start, stop in intervals]
    if not parts:
        return whole.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@torch.no_grad()
def keep(tensor: Tensor, whole: Tensor) -> None:
    """Set ``tensor`` from its ``whole`` values (any device and dtype), each rank its own part."""
    for dim, intervals in enumerate(held(tensor)):
        whole = take(whole, dim, intervals)
    local_of(tensor).copy_(whole)


def _along(placements: tuple[Placement, ...], dim: int, ndim: int) -> tuple[Placement, ...]:
    """``placements`` for a vector laid out as dimension ``dim`` is."""
    found: list[Placement] = []
    for placement in placements:
        sharded = isinstance(placement, Shard | _StridedShard)
        if not sharded or placement.dim % ndim != dim:  # type: ignore[attr-defined]
            found.append(Replicate())
        elif isinstance(placement, _StridedShard):
            found.append(_StridedShard(0, split_factor=placement.split_factor))
        else:
            found.append(Shard(0))
    return tuple(found)


@lru_cache(maxsize=512)
def _held_along(size: int, mesh: DeviceMesh, placements: tuple[Any, ...]) -> Intervals:
    if all(isinstance(placement, Replicate) for placement in placements):
        return ((0, size),)
    positions = torch.arange(size, device=mesh.device_type)
    mine = distribute_tensor(positions, mesh, placements, src_data_rank=None).to_local().cpu()
    if mine.numel() == 0:
        return ()
    breaks = ((mine[1:] - mine[:-1]) != 1).nonzero().flatten() + 1
    runs = torch.tensor_split(mine, breaks.tolist())
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)
