"""An elementwise optimizer's step on this rank's own part of each sharded weight, without DTensor dispatch.

The host's time for it, which is per tensor, is then that of plain tensors. What is stored stays as it is: state is made by
the optimizer itself, as DTensors for weights that are DTensors.

Large weights of torch's fused Adam and AdamW are updated by a kernel of our own: torch's, which takes many tensors at once,
moves bytes at 60 (bf16) to 80% (fp32) of the rate that a copy reaches on an H200, ours at 87 to 95%, and dividing gradients
by ``grad_scale`` costs it no write. It proves itself on one weight before the first step, or is left out.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_automodel.kernels.adamw import Update, adamw_, has_kernel

logger = logging.getLogger(__name__)

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

_LARGE = 2**22
"""Numbers of a weight from which the update's time on the device outlasts the launch of a kernel for it alone."""

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
    kernel = _AdamKernel()

    def init_group(group: dict[str, Any], *lists: list[Any]) -> Any:
        found = collect(owner(), group, *lists)
        if _alike(lists):
            for tensors in lists:
                tensors[:] = [_local(t) for t in tensors]
            if kernel.takes(group):
                kernel.update_large(owner(), group, lists)
        return found

    optimizer._init_group = init_group  # type: ignore[attr-defined]
    if type(optimizer) is torch.optim.SGD:
        optimizer.register_step_post_hook(_keep_momentum)
    return optimizer


class _AdamKernel:
    """Updates the large weights of a group and takes them out of the lists of what torch is going to update."""

    def __init__(self) -> None:
        self._proven: dict[torch.dtype, bool] = {}

    @staticmethod
    def takes(group: dict[str, Any]) -> bool:
        """Whether the update of ``group`` is that of the kernel: fused Adam(W), without what the kernel does not know."""
        decoupled = group.get("decoupled_weight_decay", False) or group.get("weight_decay") == 0
        unknown = group.get("amsgrad", True) or group.get("maximize") or isinstance(group["lr"], Tensor)
        return bool(group.get("fused") and decoupled and not unknown)

    def update_large(self, optimizer: Any, group: dict[str, Any], lists: tuple[list[Tensor], ...]) -> None:
        """``lists`` as torch's Adam collects them: weights, gradients, two moments, a maximum (empty), steps."""
        chosen = [i for i, tensors in enumerate(zip(*lists[:4], strict=True)) if _is_large(*tensors)]
        if not chosen:
            return
        weights, grads, means, squares, _, steps = lists
        skip, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        (beta1, beta2), eps = group["betas"], group["eps"]
        update = Update(group["lr"], beta1, beta2, eps, group["weight_decay"], stochastic_rounding=False, seed=0)
        for dtype in {weights[i].dtype for i in chosen} - self._proven.keys():
            self._proven[dtype] = _is_proven(
                min((weights[i] for i in chosen if weights[i].dtype == dtype), key=Tensor.numel)
            )
        chosen = [i for i in chosen if self._proven[weights[i].dtype]]
        if not chosen:
            return
        counts = [steps[i] for i in chosen]
        if skip is None:
            torch._foreach_add_(counts, 1)
        else:  # a list: one tensor for all would be read by the host
            torch._foreach_add_(counts, [1 - skip] * len(counts))
        for i in chosen:
            adamw_(weights[i], grads[i], means[i], squares[i], steps[i], skip, update, scale)
        rest = sorted(set(range(len(weights))) - set(chosen))
        for tensors in (weights, grads, means, squares, steps):
            tensors[:] = [tensors[i] for i in rest]


@torch.no_grad()
def _is_proven(weight: Tensor) -> bool:
    """Whether the kernel's update of a copy of ``weight`` is as near to float64's as torch's, for made-up gradients and moments."""
    weight = weight.flatten()[:_LARGE]
    made_up = torch.linspace(-1, 1, weight.numel(), device=weight.device)  # no random number is drawn
    parts = [part.to(weight.dtype, copy=True) for part in (weight, made_up, made_up / 4, made_up.square() / 8)]
    tried = Update(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, stochastic_rounding=False, seed=0)
    step, scale = (torch.full((), number, device=weight.device) for number in (3.0, 2.0))

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        lists = [[part.to(dtype, copy=True)] for part in parts]
        torch._fused_adamw_(  # type: ignore[call-overload]
            *lists, [], [step], lr=tried.lr, beta1=tried.beta1, beta2=tried.beta2, weight_decay=tried.weight_decay,
            eps=tried.eps, amsgrad=False, maximize=False, grad_scale=scale,
        )  # fmt: skip
        return [tensor for (tensor,) in lists]

    exact, theirs = by_torch(torch.float64), by_torch(weight.dtype)
    adamw_(parts[0], parts[1], parts[2], parts[3], step, None, tried, scale)

    def error(found: list[Tensor]) -> float:
        pairs = [(found[i].double(), exact[i]) for i in (0, 2, 3)]
        return max(float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in pairs)

    ours, bound = error(parts), max(2 * error(theirs), torch.finfo(weight.dtype).eps)
    name = str(weight.dtype)[6:]
    if ours <= bound:
        logger.info("optimizer: weights in %s of %d numbers and more are updated by a kernel each", name, _LARGE)
        return True
    logger.warning(
        "optimizer: our kernel's update of %d weights in %s is off by %.1e (at most %.0e, from torch's own); torch's is used",
        weight.numel(), name, ours, bound,
    )  # fmt: skip
    return False


def _is_large(weight: Tensor, *others: Tensor) -> bool:
    tensors = (weight, *others)
    return (
        weight.numel() >= _LARGE
        and has_kernel(weight.device.type)
        and weight.dtype in (torch.float32, torch.bfloat16)
        and all(t.is_contiguous() and t.dtype == weight.dtype for t in tensors)
    )


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
