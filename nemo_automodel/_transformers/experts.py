"""One experts function for every mixture of experts that takes it from transformers' registry: grouped products, adapters.

The tokens of a batch are sorted by expert, so that each weight ``[E, ...]`` is multiplied in one grouped product. Nothing
waits for the host: how many tokens an expert gets stays on the device. Against transformers' own grouped function, which does
the same products, backward gathers where that one scatters, and adapters are multiplied factor by factor with the same
grouping, never added to the weights.

Shape legend: T tokens, K experts a token is routed to, S = T K, H hidden size, E experts.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel.components._peft.experts import LoRAExperts, lora_experts
from nemo_automodel.errors import ModelError

logger = logging.getLogger(__name__)

NAME = "automodel"
_PROJECTIONS = {"gate_up_proj", "up_proj", "down_proj"}
_ALIGNED = 8  # numbers: a grouped product wants rows of whole 16 bytes


def choose_experts(
    model: PreTrainedModel, device: torch.device, compute_dtype: torch.dtype, asked: str | None = None
) -> None:
    """Let ``model`` run its experts by this function where it can, and say what runs them. Call it after LoRA.

    Args:
        model: any model; without experts nothing is done.
        device: where it will run.
        compute_dtype: what it will compute in.
        asked: ``model.experts_implementation``, which then stays.

    Raises:
        ModelError: what is asked for is unknown, or the model's experts do not come from transformers' registry.
    """
    modules = compat.pluggable_experts(model)
    if asked not in (None, NAME):
        _set(model, str(asked), modules)
        logger.info("experts: %s, as asked for%s", asked, _by_sums(model))
    elif not modules:
        if asked is not None:
            _set(model, NAME, modules)
        _warn_of_own(model)
    elif (reason := compat.unknown_experts_feature()) is not None:
        logger.warning("experts: transformers' %s, because %s%s", compat.experts_name(model), reason, _by_sums(model))
    else:
        compat.register_experts(NAME, experts_forward)
        _set(model, NAME, modules)
        slow = _why_no_grouped_product(compute_dtype, device)
        logger.info("experts: %s%s", _described(model, modules), f" (in a loop: {slow})" if slow else "")
    multiply_factors(model)


def multiply_factors(model: nn.Module) -> None:
    """Let adapted experts of ``model`` that run this function leave their adapters to it."""
    modules = set(compat.pluggable_experts(model))
    for weight in lora_experts(model):
        taken = weight.module in modules and _PROJECTIONS.issuperset(weight.module.lora_names)
        weight.module.lora_by_factors = runs_ours if taken else None


def _set(model: PreTrainedModel, name: str, modules: list[nn.Module]) -> None:
    if not modules:
        raise ModelError(
            f"model.experts_implementation={name}: {type(model).__name__} has no experts that take their function from "
            "transformers' registry; leave experts_implementation out"
        )
    try:
        model.set_experts_implementation(name)
    except ValueError as error:
        raise ModelError(f"model.experts_implementation={name}: {str(error).splitlines()[0]}") from error


def runs_ours(module: nn.Module) -> bool:
    """Whether a module of experts, one that takes its function from the registry, runs this one."""
    return compat.experts_name(module) == NAME


def require_factors(module: nn.Module, name: str) -> None:
    """Raise ModelError where the experts of ``module`` cannot be shared out: adapters are added to its whole weights."""
    if isinstance(module, LoRAExperts) and not (module.lora_by_factors and module.lora_by_factors(module)):
        raise ModelError(
            f"distributed.ep_size: the adapters of {name} are added to its weights in each forward, which must be whole for "
            "that; write ep_size: 1, or leave the experts out of peft"
        )


def require_no_cut(model: nn.Module) -> None:
    """Raise ModelError where experts with adapters would be cut by tensor parallelism."""
    if weight := next(iter(lora_experts(model)), None):
        raise ModelError(
            f"distributed.tp_size: {weight.full_name} has adapters, which are not cut; write tp_size: 1 (FSDP2 and "
            "ep_size share experts out), or leave the experts out of peft"
        )


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [T, H], the experts of each [T, K] and their weights [T, K] -> weighted sum of what they make of them [T, H]."""
    flat = top_k_index.reshape(-1)
    sorted_experts, order = torch.sort(flat, stable=True)
    numbers = torch.arange(module.num_experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(sorted_experts, numbers, right=True).to(torch.int32)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)

    x = _ToExperts.apply(hidden_states, order, back, top_k_index.shape[-1])
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = _project(module, first, x, ends, sorted_experts)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, "down_proj", x, ends, sorted_experts)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = _ToTokens.apply(x, order, back).unflatten(0, top_k_index.shape)
    return (x * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)


class _ToExperts(torch.autograd.Function):
    """Each token once for each of its experts, sorted by expert: [T, H] -> [S, H]; backward gathers and sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.times = times
        return x[order // times]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return grad[back].unflatten(0, (-1, ctx.times)).sum(1), None, None, None


class _ToTokens(torch.autograd.Function):
    """The reverse order: [S, H] by expert -> [S, H] by token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[back]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def _project(module: Any, name: str, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
    """``x`` [S, in], sorted by expert, times each expert's weight ``name``, plus its bias and adapter: [S, out]."""
    transposed: bool = module.is_transposed
    y = compat.grouped_linear(x, getattr(module, name), ends, transposed)
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[experts]
    if isinstance(module, LoRAExperts) and name in module.lora_names:
        adapter = module.lora_adapter(name)
        a, b = adapter.lora_A.weight.to(x.dtype), adapter.lora_B.weight.to(x.dtype)
        if gap := -a.shape[1] % _ALIGNED:
            a, b = F.pad(a, (0, 0, 0, gap)), F.pad(b, (0, gap))
        low_rank = compat.grouped_linear(x, a, ends, False) * module.lora_scale
        y = y + compat.grouped_linear(low_rank, b, ends, False)
    return y


def _described(model: nn.Module, modules: list[nn.Module]) -> str:
    weight = next(modules[0].parameters())
    with_adapters = any(True for _ in lora_experts(model))
    if others := {compat.experts_name(m) for m in modules} - {NAME}:
        return f"{', '.join(sorted(others))} in a part of the model that cannot change them{_by_sums(model)}"
    how = ", adapters by their factors" if with_adapters else ""
    return f"grouped products over {weight.shape[0]} experts{how}"


def _why_no_grouped_product(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a grouped product is a loop over the groups for weights of ``dtype`` on ``device``; None where it is one product."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype != torch.bfloat16:
        return f"weights are {str(dtype).removeprefix('torch.')}, not bfloat16"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the device's compute capability is {major}.{minor}, below 8.0"


def _by_sums(model: nn.Module) -> str:
    return "; their adapters are added to the weights in each forward" if any(True for _ in lora_experts(model)) else ""


def _warn_of_own(model: nn.Module) -> None:
    if name := next((weight.full_name for weight in lora_experts(model)), None):
        logger.warning(
            "experts: %s's own code, which is not from transformers' registry; adapters (%s, ...) are added to the "
            "weights in each forward",
            type(model).__name__,
            name,
        )


__all__ = [
    "NAME",
    "choose_experts",
    "experts_forward",
    "multiply_factors",
    "require_factors",
    "require_no_cut",
    "runs_ours",
]
