"""Adapters as PEFT writes them, and the merged weights as the base model's own files hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nemo_automodel.components._peft.experts import lora_experts, merge_of, merged_experts, to_file
from nemo_automodel.components._peft.linear import (
    LoRALinear,
    clean_name,
    full_tensor,
    lora_layers,
    low_rank_sum,
    stored,
)
from nemo_automodel.errors import ModelError

PREFIX = "base_model.model."
_AT_ONCE = 2**24  # numbers of a weight that are summed in fp32 at a time
_EXPERT_PARTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}
_ADAPTER_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every linear layer's adapter parameter (the live ones, sharded or not) under its key in an adapter file."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model):
        for part in _ADAPTER_PARTS:
            owner = layer if "." not in part else layer.get_submodule(part.split(".")[0])
            parameter = owner._parameters[part.rsplit(".", 1)[-1]]  # as stored: an attribute may be a rank's share
            if parameter is not None:
                tensors[f"{PREFIX}{name}.{part}"] = parameter
    return tensors


def is_adapter_tensor(name: str) -> bool:
    """Whether ``name``, as in the model's state dict, is an adapter's and not the base model's."""
    return name.endswith(_ADAPTER_PARTS)


def gathered_adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """``adapter_tensors``, whole on every rank and detached. A collective where the model is sharded."""
    tensors = {key: full_tensor(tensor.detach()).contiguous() for key, tensor in adapter_tensors(model).items()}
    for weight in lora_experts(model):
        factors = to_file(*(full_tensor(factor.detach()) for factor in weight.factors))
        for part, factor in zip(("lora_A.weight", "lora_B.weight"), factors, strict=True):
            tensors[f"{PREFIX}{weight.file_name}.{part}"] = factor.contiguous()
    return tensors


def merged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """``model.state_dict()`` as the base model would have it, with every adapter added to its weight.

    Each sum is made in fp32, one weight at a time, and cast to the base's dtype; the model itself is not changed.
    Sharded weights stay sharded. A collective where the model is sharded.
    """
    _require_whole_weights(model)
    merged = {f"{name}.weight": layer for name, layer in lora_layers(model)}
    experts = {weight.full_name: weight for weight in lora_experts(model)}
    tensors: dict[str, torch.Tensor] = {}
    for raw_key, tensor in model.state_dict().items():
        key = clean_name(raw_key)
        if is_adapter_tensor(key):
            continue
        if key in experts:
            tensors[key] = merged_experts(tensor, experts[key])
        else:
            tensors[key] = merged[key].merged_weight() if key in merged else tensor
    return tensors


def weight_merges(model: nn.Module) -> dict[str, tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]]:
    """For each adapted weight of ``model``: its adapter's tensors, and the function of it and them that is the sum."""
    _require_whole_weights(model)
    merges = {f"{name}.weight": _merge_of(layer) for name, layer in lora_layers(model)}
    return merges | {weight.full_name: merge_of(weight) for weight in lora_experts(model)}


def _require_whole_weights(model: nn.Module) -> None:
    if any(layer._parameters["weight"] is None for _, layer in lora_layers(model)):
        raise ModelError(
            "the adapters cannot be merged into weights that are kept in four bits; save the adapter alone, and merge it "
            "into the whole model with automodel merge"
        )


def _merge_of(layer: LoRALinear) -> tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {"a": stored(layer.lora_A, "weight"), "b": stored(layer.lora_B, "weight")}
    magnitudes = layer._parameters["lora_magnitude_vector"]
    if magnitudes is not None:
        tensors["magnitude"] = magnitudes
    scale, transposed = layer.lora_scale, layer.lora_transposed

    @torch.no_grad()
    def combine(
        weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None = None
    ) -> torch.Tensor:
        dense = weight.t() if transposed else weight
        merged = torch.empty_like(dense)
        rows = max(1, _AT_ONCE // dense.shape[1])
        for start in range(0, len(dense), rows):
            part = slice(start, start + rows)
            norms = None if magnitude is None else magnitude[part]
            merged[part] = low_rank_sum(dense[part], a, b[part], scale, norms)
        return merged.t().contiguous() if transposed else merged

    return tensors, combine


def peft_targets(model: nn.Module) -> tuple[list[str], list[str]]:
    """(target_modules, target_parameters): the shortest lists from which PEFT adapts exactly what is adapted here.

    PEFT takes an entry as a whole name or as its end after a dot. A last part (``q_proj``) is enough where every module
    that ends so is adapted; otherwise the whole names stand. In a model of fused experts PEFT takes ``gate_proj`` and
    the like for parts of the experts, wherever they are; such a layer is named by its weight instead.
    """
    adapted: dict[str, list[str]] = {}
    others: set[str] = set()
    for raw_name, module in model.named_modules():
        name = clean_name(raw_name)
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, LoRALinear):
            adapted.setdefault(last, []).append(name)
        else:
            others.add(last)
    dora = any(layer.lora_magnitude_vector is not None for _, layer in lora_layers(model))
    taken = _EXPERT_PARTS if _has_fused_experts(model) and not dora else set()
    modules = (
        name for last, found in adapted.items() if last not in taken for name in (found if last in others else [last])
    )
    parameters = [f"{name}.weight" for last, found in adapted.items() if last in taken for name in found]
    return sorted(modules), sorted({*parameters, *_expert_targets(model)})


def _expert_targets(model: nn.Module) -> set[str]:
    """The last two parts of an adapted stacked weight's name where all that end so are adapted, else its whole name."""
    adapted = {weight.full_name for weight in lora_experts(model)}
    plain = {clean_name(name) for name, _ in model.named_parameters()} - adapted if adapted else set()
    others = {_last_two(name) for name in plain}
    return {name if _last_two(name) in others else _last_two(name) for name in adapted}


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _has_fused_experts(model: nn.Module) -> bool:
    return any(name.endswith("gate_up_proj") and p.ndim == 3 for name, p in model.named_parameters())
