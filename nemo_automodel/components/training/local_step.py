"""An elementwise optimizer's step on this rank's own part of each sharded weight, without DTensor dispatch.

The host's time for it, which is per tensor, is then that of plain tensors. What is stored stays as it is: state is made by
the optimizer itself, as DTensors for weights that are DTensors.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor

_ELEMENTWISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.SGD,
    }
)
"""These very classes: a subclass may do what it likes, and others look at whole matrices or at all weights."""

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


def step_on_local_tensors(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Let ``optimizer`` update local tensors in place of DTensors, where its class is known to be elementwise.

    Any other optimizer is left as it is, and so is a step in which a weight, its gradient and its state are not laid out
    alike. torch's optimizers collect the tensors of a step in lists (``_init_group``): those lists are what is changed, so
    that hooks, schedulers, ``found_inf`` and ``state_dict`` see nothing of it.
    """
    if type(optimizer) not in _ELEMENTWISE or optimizer.defaults["differentiable"]:
        return optimizer
    collect: Any = type(optimizer)._init_group  # type: ignore[attr-defined]
    owner = weakref.ref(optimizer)  # a cycle would keep its state after its last user

    def init_group(group: dict[str, Any], *lists: list[Any]) -> Any:
        found = collect(owner(), group, *lists)
        if _alike(lists):
            for tensors in lists:
                tensors[:] = [_local(t) for t in tensors]
        return found

    optimizer._init_group = init_group  # type: ignore[attr-defined]
    if type(optimizer) is torch.optim.SGD:
        optimizer.register_step_post_hook(_keep_momentum)
    return optimizer


def _alike(lists: tuple[list[Any], ...]) -> bool:
    """Whether everything in ``lists``, of which the first holds the weights, lies among the ranks as its weight does."""
    for tensors in lists[1:]:
        for weight, tensor in zip(lists[0], tensors, strict=False):
            if not isinstance(tensor, DTensor):
                continue
            if not isinstance(weight, DTensor) or tensor.placements != weight.placements:
                return False
            if tensor.device_mesh != weight.device_mesh:
                return False
    return True


@torch.no_grad()
def _keep_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """SGD stores its momentum by the tensors that it updated: move it to the weights that these are parts of."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            local = _local(weight)
            if local is weight or local not in optimizer.state:
                continue
            made, state = optimizer.state.pop(local)["momentum_buffer"], optimizer.state[weight]
            if state.get("momentum_buffer") is None and made is not None:
                state["momentum_buffer"] = torch.empty_like(weight)
                state["momentum_buffer"].to_local().copy_(made)


def _local(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # ``to_local`` may make a new one each time
