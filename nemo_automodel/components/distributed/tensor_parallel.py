"""Tensor and sequence parallelism of one model: a plan, carried out in place.

A plan says which layers are columns and rows; this file says what that means for every parameter of the model, stores
each as a DTensor and exchanges the modules' classes (``tp_layers``). It knows no model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from nemo_automodel.components.distributed import tp_layers
from nemo_automodel.components.distributed.sequence_parallel import SequencePlan, plan_sequence
from nemo_automodel.components.distributed.tp_collectives import Ranks
from nemo_automodel.components.distributed.tp_layers import Sequence, Storage, become
from nemo_automodel.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Layer:
    """One layer's part in a plan.

    Args:
        kind: ``column``, ``row``, ``vocabulary`` (an embedding), ``experts`` (stacked weights) or ``identity`` (an
            expert that returns its input).
        parts: sizes of what a column layer fuses along its output (a row layer along its input); None = one thing.
        whole: a column layer's output is gathered; a row layer's input is split.
    """

    kind: str
    parts: tuple[int, ...] | None = None
    whole: bool = False


@dataclass(frozen=True)
class TensorParallelPlan:
    """How a model is cut; every name is a full one (``model.layers.0.mlp.up_proj``)."""

    layers: Mapping[str, Layer]
    parameters: Mapping[str, Storage] = field(default_factory=dict)  # those of modules that are no linear layer
    regions: frozenset[str] = frozenset()  # modules that take their input in once for all their column layers
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # integers to divide: `num_heads`, `config.x`
    blocks: tuple[tuple[str, ...], ...] = ()  # decoder blocks, one tuple for each stack


def tensor_parallelize(
    model: nn.Module, plan: TensorParallelPlan, tp_mesh: DeviceMesh, sequence_parallel: bool = False
) -> nn.Module:
    """Shard ``model`` in place over the one-dimensional ``tp_mesh``, every rank holding the same whole model (or meta).

    Call it after LoRA and before compilation and ``fully_shard``. Every parameter becomes a DTensor on ``tp_mesh``:
    sharded, or replicated with the same gradient on each rank. Dropout draws from each rank's generator, which must
    be in the same state on all of them. ``sequence_parallel`` also shards the sequence between the regions.

    Raises:
        ConfigError: a size does not divide by the number of ranks.
        ModelError: the plan contradicts itself.
    """
    ranks = Ranks.of(tp_mesh)
    modules = dict(model.named_modules())
    storage = _storage(modules, plan)
    sequence = Sequence(ranks)
    along = plan_sequence(modules, plan.layers, plan.regions, plan.blocks) if sequence_parallel else SequencePlan()
    for name in along.summed:
        if storage[name].dim is None:
            storage[name] = replace(storage[name], summed=True)
    _store(modules, storage, tp_mesh, ranks)
    for name, module in modules.items():
        own = {key: storage[_join(name, key)] for key, value in module._parameters.items() if value is not None}
        for kind, settings in _kinds(name, module, plan, ranks, own):
            become(module, kind, ranks, own, **settings)
        for kind, settings in along.kinds(name):
            become(module, kind, ranks, own, **settings)
        if name in along.sharded:
            module.__dict__["tp_sequence"] = sequence
        _divide(module, plan.divided.get(name, ()), ranks.size)
    return model


def _divide(module: nn.Module, attributes: tuple[str, ...], ranks: int) -> None:
    if any(attribute.startswith("config.") for attribute in attributes):
        module.config = copy.copy(module.config)  # the others' config keeps its numbers
    for attribute in attributes:
        owner: Any = module.config if attribute.startswith("config.") else module
        name = attribute.removeprefix("config.")
        setattr(owner, name, getattr(owner, name) // ranks)


def _kinds(
    name: str, module: nn.Module, plan: TensorParallelPlan, ranks: Ranks, own: Mapping[str, Storage]
) -> list[tuple[type[tp_layers.Sharded], dict[str, Any]]]:
    """What ``module`` becomes under tensor parallelism, innermost first."""
    found: list[tuple[type[tp_layers.Sharded], dict[str, Any]]] = []
    layer = plan.layers.get(name)
    if layer is None:
        if own:
            found.append((tp_layers.Sharded, {}))
    elif layer.kind == "column":
        entered = bool(plan.regions & _prefixes(name))
        found.append((tp_layers.Column, {"tp_gather": layer.whole, "tp_entered": entered}))
        if not isinstance(module, nn.Linear):  # Conv1D shapes its output by this number
            module.nf = module.nf // ranks.size  # type: ignore[operator,assignment]
    elif layer.kind == "row":
        found.append((tp_layers.Row, {"tp_split": layer.whole}))
    elif layer.kind == "vocabulary":
        rows = module._parameters["weight"].shape[0] // ranks.size  # type: ignore[union-attr]
        found.append((tp_layers.VocabularyEmbedding, {"tp_first": rows * ranks.rank, "tp_rows": rows}))
        padding = getattr(module, "padding_idx", None)
        if padding is not None:  # its row gets no gradient; where it is another rank's, no row here is it
            local = padding % (rows * ranks.size) - rows * ranks.rank
            module.padding_idx = local if 0 <= local < rows else None  # type: ignore[assignment]
    elif layer.kind == "experts":
        found.append((tp_layers.Experts, {}))
    elif layer.kind == "identity":
        found.append((tp_layers.IdentityExpert, {}))
    else:
        raise ModelError(f"tensor parallelism: {name}: unknown kind of layer {layer.kind!r}")
    if name in plan.regions:
        found.append((tp_layers.Region, {}))
    return found


def _storage(modules: Mapping[str, nn.Module], plan: TensorParallelPlan) -> dict[str, Storage]:
    """How each parameter lies among the ranks, by its full name."""
    storage: dict[str, Storage] = {}
    outer = plan.regions | {name for name, layer in plan.layers.items() if layer.kind == "experts"}
    for name, module in modules.items():
        partial = bool(outer & _prefixes(name))
        for key in module._parameters:
            storage[_join(name, key)] = Storage(summed=partial)
    for name, layer in plan.layers.items():
        storage |= _layer_storage(name, modules[name], layer)
    for name, own in plan.parameters.items():
        storage[name] = own
    return storage | _of_shared_vectors(modules, storage)


def _of_shared_vectors(modules: Mapping[str, nn.Module], storage: Mapping[str, Storage]) -> dict[str, Storage]:
    """A vector that a cut layer shares with a module that only names it (a head's bias) is cut for both."""
    names: dict[nn.Parameter, list[str]] = {}
    for module_name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 1:
                names.setdefault(parameter, []).append(_join(module_name, key))
    shared: dict[str, Storage] = {}
    for group in names.values():
        cut = next((storage[name] for name in group if storage[name].dim is not None), None)
        if cut is not None and len(group) > 1:
            shared |= dict.fromkeys(group, cut)
    return shared


def _layer_storage(name: str, module: nn.Module, layer: Layer) -> dict[str, Storage]:
    """A column layer's outputs, a row layer's inputs and an embedding's rows are cut; so are the adapter's."""
    if layer.kind in ("experts", "identity"):
        return {}
    transposed = getattr(module, "nf", None) is not None  # transformers' Conv1D keeps [in, out]
    cut = Storage(0, layer.parts)
    if layer.kind == "row":
        own = {
            "weight": Storage(0 if transposed else 1, layer.parts),
            "bias": Storage(),
            "lora_A.weight": Storage(1, layer.parts),
            "lora_B.weight": Storage(summed=True),
            "lora_magnitude_vector": Storage(summed=True),
        }
    else:
        own = {
            "weight": Storage(1 if transposed else 0, layer.parts),
            "bias": cut,
            "lora_A.weight": Storage(summed=True),
            "lora_B.weight": cut,
            "lora_magnitude_vector": cut,
        }
    return {_join(name, key): value for key, value in own.items()}


def _store(modules: Mapping[str, nn.Module], storage: Mapping[str, Storage], tp_mesh: DeviceMesh, ranks: Ranks) -> None:
    """Every parameter as a DTensor; one that several modules share stays one."""
    done: dict[nn.Parameter, tuple[nn.Parameter, Storage, str]] = {}
    for module_name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = _join(module_name, key)
            if parameter not in done:
                done[parameter] = (_distribute(parameter, storage[name], tp_mesh, ranks, name), storage[name], name)
            shared, where, first = done[parameter]
            if (where.dim, where.parts) != (storage[name].dim, storage[name].parts):
                raise ModelError(
                    f"tensor parallelism: {first} and {name} are one weight, but are to be cut differently"
                )
            module._parameters[key] = shared


def _distribute(parameter: nn.Parameter, where: Storage, tp_mesh: DeviceMesh, ranks: Ranks, name: str) -> nn.Parameter:
    with torch.no_grad():
        local = parameter.detach()
        if where.dim is None:
            placement: Any = Replicate()
        else:
            for size in where.parts or (parameter.shape[where.dim],):
                if size % ranks.size:
                    raise ConfigError(
                        f"distributed.tp_size={ranks.size}: {name} of shape {list(parameter.shape)} has {size} to cut, "
                        f"which {ranks.size} does not divide; write a divisor of {size}"
                    )
            if where.parts is not None and sum(where.parts) != parameter.shape[where.dim]:
                raise ModelError(f"tensor parallelism: {name} is {parameter.shape[where.dim]} wide, not {where.parts}")
            part = parameter.shape[where.dim] // ranks.size
            local = local.narrow(where.dim, part * ranks.rank, part).clone(memory_format=torch.contiguous_format)
            placement = Shard(where.dim)
        sharded = DTensor.from_local(local, tp_mesh, [placement], run_check=False)
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _prefixes(name: str) -> set[str]:
    """``name`` and the names of all modules around it."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
