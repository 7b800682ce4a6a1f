"""What of ours a run puts in place of plain transformers: the optimisations that a certificate proves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat, experts
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.head import give_up_fusing, keeps_logits
from nemo_automodel._transformers.packing import PASSES_DOCUMENTS
from nemo_automodel._transformers.window_trial import PASSES_WINDOW
from nemo_automodel.components._peft.experts import adapt_experts, lora_experts
from nemo_automodel.components._peft.linear import LoRALinear, adapt, clean_name, lora_layers, stored
from nemo_automodel.components._peft.match import is_transposed_linear, stacked_weights
from nemo_automodel.components.attention import function
from nemo_automodel.components.distributed.activation_checkpointing import keep_activations
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.quantization.fp8 import Fp8Config, Fp8DynamicLinear, fp8_layers
from nemo_automodel.kernels.lora import runs_on

ATTENTION = "attention"
EXPERTS = "experts"
PACKING = "packing"
LOSS = "fused loss"
LORA = "LoRA"
KERNEL = "LoRA kernel"
CHECKPOINTING = "activation checkpointing"
FP8 = "FP8"

NEEDS = {PACKING: {ATTENTION}, KERNEL: {LORA}, FP8: {LORA}}
"""What an optimisation is tried together with: it does nothing, or nothing right, alone."""
SWITCHES = (ATTENTION, EXPERTS, LOSS, KERNEL, CHECKPOINTING)
"""Those that a model can go on without, once it is built."""


@dataclass(frozen=True)
class Adapters:
    """The LoRA layers of a model, described so that they can be put on a copy with fewer layers."""

    names: frozenset[str]  # of the adapted layers, numbers as *
    stacked: frozenset[str]  # of the adapted expert weights
    dim: int
    scale: float
    dora: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Adapters | None:
        """Those of ``model``, None where it has none."""
        layers, weights = list(lora_layers(model)), list(lora_experts(model))
        stacked = frozenset(_generic(weight.full_name) for weight in weights)
        names = frozenset(_generic(name) for name, _ in layers)
        if layers:
            first = layers[0][1]
            factor = stored(first.lora_A, "weight")
            dora = first._parameters["lora_magnitude_vector"] is not None
            return cls(names, stacked, factor.shape[0], first.lora_scale, dora, factor.dtype)
        if weights:
            factor = weights[0].factors[0]
            return cls(names, stacked, factor.shape[1], weights[0].module.lora_scale, False, factor.dtype)
        return None

    def targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The linear layers of ``model``, without adapters yet, that get one."""
        named = [(name, module) for name, module in model.named_modules() if _generic(name) in self.names]
        return [(name, m) for name, m in named if isinstance(m, nn.Linear) or is_transposed_linear(m)]

    def experts(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The stacked expert weights of ``model``, without adapters yet, that get one."""
        return {n: weight for n, weight in stacked_weights(model).items() if _generic(n) in self.stacked}

    def put_on(self, model: nn.Module, kernel: bool) -> None:
        """Freeze ``model`` and adapt it; the adapters' values are not set."""
        model.requires_grad_(False)
        for _, module in self.targets(model):
            adapt(module, self.dim, self.scale, 0.0, "pre", self.dora, "gaussian", self.dtype, kernel)
        adapt_experts(model, list(self.experts(model)), self.dim, self.scale, "gaussian", self.dtype)


@dataclass(frozen=True)
class Stack:
    """What a run uses. ``found`` is what trials found out about its model, under the names they keep it by."""

    optimisations: tuple[str, ...]
    loss_fn: Any
    checkpointing: str
    adapters: Adapters | None
    fp8: Fp8Config | None
    found: dict[str, Any] = field(default_factory=dict)

    def without(self, names: Iterable[str]) -> tuple[str, ...]:
        """Its optimisations but those called ``names``."""
        return tuple(name for name in self.optimisations if name not in names)


def stack_of(model: nn.Module, loss_fn: Any, *, packed: bool, checkpointing: str, device: torch.device) -> Stack:
    """The stack of a model that is ready to train.

    Args:
        model: as ``from_pretrained`` returned it, sharded or not.
        loss_fn: the recipe's loss.
        packed: whether its batches are packed.
        checkpointing: ``distributed.activation_checkpointing``.
        device: where it runs.
    """
    adapters = Adapters.of(model)
    kernel = any(layer.lora_use_triton for _, layer in lora_layers(model)) and runs_on(device.type)
    fp8 = _fp8_of(model)
    used = {
        ATTENTION: compat.attention_name(model) == function.NAME,
        EXPERTS: any(map(experts.runs_ours, compat.pluggable_experts(model))),
        PACKING: packed,
        LOSS: isinstance(loss_fn, FusedLinearCrossEntropy) and not keeps_logits(model),
        LORA: adapters is not None,
        KERNEL: kernel,
        CHECKPOINTING: checkpointing != "off",
        FP8: fp8 is not None,
    }
    found = {name: model.__dict__[name] for name in (PASSES_WINDOW, PASSES_DOCUMENTS) if name in model.__dict__}
    optimisations = tuple(name for name, on in used.items() if on)
    return Stack(optimisations, loss_fn, checkpointing, adapters, fp8, found)


def switch_off(model: Any, name: str, attention: str) -> str:
    """Let ``model`` go on without the optimisation ``name``, one of ``SWITCHES``; returns what it goes on with.

    ``attention`` is what transformers calls the attention that replaces ours.
    """
    if name == ATTENTION:
        model.set_attn_implementation(attention)
        return f"transformers' own attention ({attention})"
    if name == EXPERTS:
        model.set_experts_implementation("grouped_mm")
        return "transformers' own experts (grouped_mm)"
    if name == LOSS:
        give_up_fusing(model)
        return "a loss over whole logits"
    if name == CHECKPOINTING:
        keep_activations(find_blocks(model))
        return "every activation kept, in more memory"
    for _, layer in lora_layers(model):
        layer.lora_use_triton = False
    return "adapters in plain PyTorch"


def plain_class(model: nn.Module) -> type[PreTrainedModel] | None:
    """The transformers class of ``model``, what others put before it left out; None for a model of no such class."""
    for cls in compat.base_class(model).__mro__:
        if not issubclass(cls, (FSDPModule, LoRALinear)):
            return cls if issubclass(cls, PreTrainedModel) else None
    return None


def _fp8_of(model: nn.Module) -> Fp8Config | None:
    layers = list(fp8_layers(model))
    if not layers:
        return None
    trained = {layer.fp8_grad_weight for layer in layers if isinstance(layer, Fp8DynamicLinear)}
    smallest = min(min(layer.weight.shape) for layer in layers)
    return Fp8Config(min_features=smallest, grad_weight="float8" if "float8" in trained else "bfloat16")


def _generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", clean_name(name))


__all__ = ["Adapters", "Stack", "plain_class", "stack_of", "switch_off"]
