"""Adapted layers that get one input (q, k and v; gate and up) share what they do with it: the narrow products with A.

The first of them to be called computes the outputs of all; the others find theirs on the input tensor itself, by which
it is certain that the input is the same, that nothing outlives it and that recomputation starts anew. A layer that gets
another input computes alone, so a group that is wrong about a model costs time, never correctness.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel.components._peft.linear import LoRALinear, kernel_takes
from nemo_automodel.kernels.lora_group import fits, lora_linears

_KEPT = "_lora_outputs"  # the attribute of an input tensor under which outputs wait


class SharedInput:
    """A group of layers, in the order in which their module calls them."""

    def __init__(self, members: Sequence[LoRALinear]) -> None:
        self.members = list(members)
        self.last: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def output(self, member: LoRALinear, x: Tensor) -> Tensor | None:
        """What ``member`` gives for ``x``; None where it has to compute it alone."""
        at = member.lora_place
        if at == 0:
            outputs = self._all_outputs(x)
            if outputs is None:
                return None
            if not torch.compiler.is_compiling():
                self._forget(x)
            first, outputs[0] = outputs[0], None
            setattr(x, _KEPT, (self, outputs))
            return first
        kept = getattr(x, _KEPT, None)
        if kept is None or kept[0] is not self:
            return None
        output: Tensor | None = kept[1][at]
        kept[1][at] = None  # once: a second call computes with what the parameters are then
        if at == len(self.members) - 1:
            setattr(x, _KEPT, None)
        return output

    def _forget(self, x: Tensor) -> None:
        """Drop what nobody fetched at the input before ``x``: such outputs keep their input, which keeps them."""
        last = self.last() if self.last is not None else None
        if last is not None and (getattr(last, _KEPT, None) or (None,))[0] is self:
            setattr(last, _KEPT, None)
        self.last = weakref.ref(x)

    def _all_outputs(self, x: Tensor) -> list[Any] | None:
        first = self.members[0]
        if isinstance(x, DTensor) or any(m.lora_dropout > 0.0 and m.training for m in self.members):
            return None
        lora_as: list[Tensor] = [m.lora_A.weight for m in self.members]
        lora_bs: list[Tensor] = [m.lora_B.weight for m in self.members]
        if any(isinstance(factor, DTensor) for factor in (*lora_as, *lora_bs)):
            return None
        if first.lora_use_triton and not getattr(first, "quantized", False):
            weights: list[Tensor] = [m.weight for m in self.members]
            biases: list[Tensor | None] = [m.bias for m in self.members]
            if all(kernel_takes(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)):
                there = [bias for bias in biases if bias is not None]
                return lora_linears(x, weights, there, lora_as, lora_bs, first.lora_scale)
        narrow = F.linear(x, torch.cat(lora_as).to(x.dtype)) * first.lora_scale
        parts = narrow.split([lora_a.shape[0] for lora_a in lora_as], dim=-1)
        return [
            member.base(x) + F.linear(part, lora_b.to(x.dtype))
            for member, part, lora_b in zip(self.members, parts, lora_bs, strict=True)
        ]


def share_inputs(model: nn.Module, groups: Mapping[type, Sequence[Sequence[str]]]) -> int:
    """Let the adapted layers of ``model`` that share an input work together; returns how many such groups there are.

    Args:
        model: with its adapters on, and whatever else exchanges the classes of its layers.
        groups: for a class of modules, which of its layers it calls with the same tensor, by name and in their order.
    """
    found = 0
    for module in model.modules():
        for names in next((groups[cls] for cls in type(module).__mro__ if cls in groups), ()):
            layers = [getattr(module, name, None) for name in names]
            members = [layer for layer in layers if isinstance(layer, LoRALinear) and _can_share(layer)]
            if _alike(members):
                found += 1
                group = SharedInput(members)
                for place, member in enumerate(members):
                    member.lora_group, member.lora_place = group, place
    return found


def unshare_inputs(model: nn.Module) -> None:
    """Let every adapted layer of ``model`` work alone again."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_group = None


def _can_share(layer: LoRALinear) -> bool:
    """Not where dropout masks or DoRA's norms are a layer's own, nor where it makes an input of its own of what it gets."""
    own_input = not getattr(layer, "tp_entered", True) or getattr(layer, "tp_split", False)
    own_product = layer.lora_use_triton and hasattr(layer, "forward_adapted")
    plain = layer._parameters["lora_magnitude_vector"] is None and layer.lora_dropout == 0.0
    return plain and not layer.lora_transposed and not own_input and not own_product


def _alike(members: Sequence[LoRALinear]) -> bool:
    if len(members) < 2 or len({id(member) for member in members}) < len(members):
        return False
    ranks = [member.lora_A._parameters["weight"].shape[0] for member in members]  # type: ignore[union-attr]
    kinds = {
        (m.lora_scale, m.lora_use_triton, getattr(m, "quantized", False), m.bias is None,
         m.lora_A._parameters["weight"].dtype, m.lora_B._parameters["weight"].dtype)  # type: ignore[union-attr]
        for m in members
    }  # fmt: skip
    return len(kinds) == 1 and fits(ranks)
