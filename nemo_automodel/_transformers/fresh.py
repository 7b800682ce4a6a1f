"""Fresh weights for a sharded model: the same on every rank and for every number of ranks, one block whole at a time.

Every rank draws every value, in one order and from one seed, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat, meta
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.loading import first_ranks_seed
from nemo_automodel.components._peft.linear import LoRAWeight
from nemo_automodel.components.checkpoint.shards import keep
from nemo_automodel.components.quantization.nf4 import Nf4Linear


class FreshWeights:
    """Draws the weights of a model by its own initialisation once it is sharded."""

    def fill(self, model: PreTrainedModel, device: torch.device, offload: bool = False) -> None:
        """Give ``model`` memory on ``device`` (weights on the CPU under ``offload``) and set all; every rank calls it."""
        meta.materialize(model, device, torch.device("cpu") if offload else device)
        meta.set_buffers(model, device)
        done: list[nn.Parameter] = []
        with first_ranks_seed(device), torch.no_grad(), compat.skipping_initialized(done):
            for unit, initialize in _units(model):
                with _whole(unit, device, done):
                    initialize()

    def reason_against(self, model: PreTrainedModel) -> str | None:
        """Why ``model`` (on the meta device, unsharded) cannot have its weights drawn block by block, or None."""
        versions = {name: parameter._version for name, parameter in model.named_parameters()}
        with torch.no_grad(), compat.skipping_initialized([]):
            for unit, initialize in _units(model):
                own = {id(parameter) for module in unit for parameter in module.parameters(recurse=False)}
                before = {name: p._version for name, p in model.named_parameters() if id(p) not in own}
                initialize()
                for name, parameter in model.named_parameters():
                    if name in before and parameter._version != before[name]:
                        return f"its initialisation of one layer reaches into another ({name})"
        left = [name for name, parameter in model.named_parameters() if parameter._version == versions[name]]
        return f"its initialisation leaves {left[0]} as its constructor made it" if left else None


def _units(model: PreTrainedModel) -> Iterator[tuple[list[nn.Module], Callable[[], None]]]:
    """The modules that are initialised together, with the call that does it, in transformers' order (depth first)."""
    blocks = {id(block) for block in find_blocks(model)}

    def holds_blocks(module: nn.Module) -> bool:
        return any(id(inner) in blocks for inner in module.modules()) and id(module) not in blocks

    def visit(module: nn.Module, owner: PreTrainedModel) -> Iterator[Any]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        if not holds_blocks(module):
            yield list(module.modules()), lambda: compat.initialize_below(module, owner)
            return
        for child in module.children():
            yield from visit(child, owner)
        yield [module], lambda: compat.initialize_one(module, owner)

    yield from visit(model, model)


@contextmanager
def _whole(unit: list[nn.Module], device: torch.device, done: list[nn.Parameter]) -> Iterator[None]:
    """The parameters of ``unit`` whole inside, with memory of their own; what they then hold is kept, and noted as done."""
    live: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    packed = [module for module in unit if isinstance(module, Nf4Linear)]
    for layer in packed:
        empty = torch.empty_like(layer.placeholder(), device=device)
        layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    made: dict[int, nn.Parameter] = {}
    already = {id(parameter) for parameter in done}
    for module in unit:
        for name, parameter in () if isinstance(module, LoRAWeight) else module._parameters.items():
            if parameter is None or id(parameter) in already or (module in packed and name == "weight"):
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            live.append((module, name, parameter, made[id(parameter)]))
    for module, name, _, whole in live:
        module._parameters[name] = whole
    try:
        yield
    finally:
        for module, name, parameter, _ in live:
            module._parameters[name] = parameter
    for layer in packed:
        layer.quantize(layer.weight)
    for _, _, parameter, whole in live:
        if id(parameter) not in already:
            already.add(id(parameter))
            keep(parameter, whole)
            compat.mark_initialized(parameter)
            done.append(parameter)
