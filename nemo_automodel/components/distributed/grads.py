"""Gradient norm and clipping over a mesh, without a host synchronisation and without DTensor dispatch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class GradClipper:
    """Scales all gradients so that their global L2 norm is at most ``max_norm``.

    Args:
        max_norm: Upper bound of the norm over every parameter on every rank, above 0. Default 1.0; null only measures it.
        optimizer: What steps with these gradients (given by the recipe). One that can divide them by itself (torch's fused
            ones and ours: the ``grad_scale`` of mixed-precision training) is told by how much, and no pass over them is
            made for it: they stay unclipped in ``.grad``. None: they are clipped in place, as float64 ones always are.
    """

    def __init__(self, max_norm: float | None = 1.0, optimizer: torch.optim.Optimizer | None = None):
        self.max_norm = max_norm
        self._optimizer = optimizer if getattr(optimizer, "_step_supports_amp_scaling", False) else None

    @torch.no_grad()
    def __call__(self, params: Iterable[torch.nn.Parameter]) -> torch.Tensor:
        """Clip the gradients of ``params``; returns the norm before clipping, a scalar on the device."""
        grads = [p.grad for p in params if p.grad is not None]
        norm = global_grad_norm(grads)
        if self.max_norm is not None:
            divisor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
            if (
                self._optimizer is not None and divisor.dtype == torch.float32
            ):  # what it takes; not of float64 gradients
                self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
                return norm
            factor = 1 / divisor
            by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
            for grad in grads:
                by_dtype[grad.dtype].append(_local(grad))
            for dtype, members in by_dtype.items():  # a factor of another dtype means one slow kernel a tensor
                torch._foreach_mul_(members, factor.to(dtype))
        return norm


def global_grad_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all ``grads``, each counted once however it is sharded over its mesh."""
    groups: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        where = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else (None, ())
        groups[(*where, grad.dtype)].append(grad)
    total = torch.zeros((), device=grads[0].device) if grads else torch.zeros(())
    for (mesh, placements, dtype), members in groups.items():
        norms = torch._foreach_norm([_local(g) for g in members], 2, dtype=torch.promote_types(dtype, torch.float32))
        square_sum = torch.stack(norms).square().sum()
        for dim, placement in enumerate(placements):
            if hasattr(placement, "dim") and mesh.size(dim) > 1:  # sharded, strided or not
                dist.all_reduce(square_sum, group=mesh.get_group(dim))
        total = total + square_sum
    return total.sqrt()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
