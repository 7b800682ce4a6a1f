"""Which modules of a decoder block see a part of the sequence, and which the whole, under sequence parallelism.

Between regions the residual stream and what works on each token by itself (norms, dropout) are sharded along the
sequence. A region gathers it at its input and scatters it at its row layer's output (arXiv:2205.05198); any other
module gets the whole sequence and computes the same on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nemo_automodel.components.distributed import tp_layers


@dataclass
class SequencePlan:
    """Names of modules, and of the parameters whose gradient is a sum over tokens on several ranks."""

    sharded: set[str] = field(default_factory=set)  # modules that know of the sharded sequence
    whole: set[str] = field(default_factory=set)
    blocks: dict[str, dict[str, bool]] = field(default_factory=dict)  # whether each is its stack's first, its last
    summed: set[str] = field(default_factory=set)

    def kinds(self, name: str) -> list[tuple[type[tp_layers.Sharded], dict[str, bool]]]:
        """What module ``name`` becomes besides, and its settings."""
        if name in self.blocks:
            return [(tp_layers.SequenceBlock, self.blocks[name])]
        return [(tp_layers.WholeSequence, {})] if name in self.whole else []


def plan_sequence(
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Any],
    regions: Collection[str],
    stacks: Collection[tuple[str, ...]],
) -> SequencePlan:
    """Sort every child of every block of ``stacks`` (names of blocks, in order) that has tensor-parallel layers."""
    plan = SequencePlan()
    for stack in stacks:
        if not any(_below(name, block) for name in layers for block in stack):
            continue
        plan.sharded |= set(stack)
        for block in stack:
            plan.blocks[block] = {"tp_first": block == stack[0], "tp_last": block == stack[-1]}
            for child, _ in modules[block].named_children():
                _sort(f"{block}.{child}", modules, layers, regions, plan)
            for name, _ in modules[block].named_parameters():
                full = f"{block}.{name}"
                if not any(_below(full, whole) for whole in plan.whole):
                    plan.summed.add(full)
    return plan


def _sort(
    name: str,
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Any],
    regions: Collection[str],
    plan: SequencePlan,
) -> None:
    inside = [layer for layer in layers if _below(layer, name)]
    rows = [layer for layer in inside if layers[layer].kind == "row"]
    if name in regions and rows:
        plan.sharded |= {name, *rows}
    elif name in layers and layers[name].kind in ("column", "row") and not layers[name].whole:
        plan.sharded.add(name)
    elif inside or not _by_token(modules[name]):
        plan.sharded.add(name)
        plan.whole.add(name)


def _by_token(module: nn.Module) -> bool:
    """Whether ``module`` works on each token by itself: one linear layer, or vectors alone (norms, dropout)."""
    return isinstance(module, nn.Linear) or all(parameter.ndim < 2 for parameter in module.parameters())


def _below(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
