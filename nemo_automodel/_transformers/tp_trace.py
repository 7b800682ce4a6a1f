"""Which linear layers of a decoder block feed which: found by following the tensors of one forward."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nemo_automodel._transformers.blocks import find_stacks


@dataclass(frozen=True)
class Chain:
    """A linear layer, and those whose outputs reach nothing but its input. Names are patterns: ``h.*.mlp.fc1``."""

    row: str
    columns: tuple[str, ...]


def pattern_of(name: str) -> str:
    """``name`` with its numbers as ``*``: the same layer of every block."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an ``nn.Linear`` or transformers' ``Conv1D``, which keeps its weight ``[in, out]``."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``."""
    weight = getattr(module, "weight", None)
    return getattr(module, "nf", None) is not None and isinstance(weight, Tensor) and weight.ndim == 2


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer."""
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (rows, columns) if is_transposed(module) else (columns, rows)


@torch.no_grad()
def find_chains(model: nn.Module, inputs: Mapping[str, Any]) -> list[Chain]:
    """The chains of ``model``'s blocks, those of most columns first; every layer is in one of them at most."""
    blocks = [block for stack in find_stacks(model) for block in stack]
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and any(name.startswith(f"{block}.") for block in blocks)
    }
    feeds, eats = _flow(model, linears, inputs)
    found: dict[str, set[str]] = defaultdict(set)
    other: set[str] = set()  # patterns of which not every layer says the same
    for row, sources in eats.items():
        if row not in linears:  # the output head
            continue
        columns = {name for name in sources if feeds[name] == {row}}
        patterns = {pattern_of(name) for name in columns}
        if pattern_of(row) in found and found[pattern_of(row)] != patterns:
            other.add(pattern_of(row))
        found[pattern_of(row)] |= patterns
    sizes = {pattern_of(name): sum(p.numel() for p in module.parameters()) for name, module in linears.items()}
    chains = [Chain(row, tuple(sorted(columns))) for row, columns in found.items() if columns and row not in other]
    chains.sort(key=lambda chain: (-len(chain.columns), -sum(sizes[name] for name in chain.columns)))
    taken: set[str] = set()
    kept = []
    for chain in chains:
        members = {chain.row, *chain.columns}
        if not members & taken:
            taken |= members
            kept.append(chain)
    return kept


def _flow(
    model: nn.Module, linears: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(what each layer's output reaches before another linear layer, what reaches each layer's input)."""
    feeds: dict[str, set[str]] = defaultdict(set)
    eats: dict[str, set[str]] = defaultdict(set)
    handles = []

    def arrives(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for source in _carried(args):
                feeds[source].add(name)
                eats[name].add(source)

        return hook

    def leaves(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            _mark(output, frozenset({name}))

        return hook

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    watched = {**linears, **({} if head is None else {"": head})}
    for name, module in watched.items():
        handles.append(module.register_forward_pre_hook(arrives(name)))
        handles.append(module.register_forward_hook(leaves(name)))
    try:
        with _Carry():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return feeds, eats


class _Carry(TorchDispatchMode):
    """Every result carries what its floating operands carried."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        _mark(output, _carried((args, kwargs)))
        return output


def _carried(tree: Any) -> frozenset[str]:
    names: frozenset[str] = frozenset()
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            names |= leaf.__dict__.get("automodel_sources", frozenset())
    return names


def _mark(tree: Any, names: frozenset[str]) -> None:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            leaf.automodel_sources = names  # type: ignore[attr-defined]
