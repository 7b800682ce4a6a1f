"""The tensor-parallel plan of any model: its own, in transformers' words, or one inferred from its structure."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.blocks import find_stacks
from nemo_automodel.components.distributed.tensor_parallel import Layer, TensorParallelPlan
from nemo_automodel.components.distributed.tp_layers import Storage
from nemo_automodel.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

_LAYERS = {
    "colwise": Layer("column"),
    "colwise_gather_output": Layer("column", whole=True),
    "colwise_rep": Layer("column", whole=True),
    "rowwise": Layer("row"),
    "rowwise_split_input": Layer("row", whole=True),
    "rowwise_rep": Layer("row", whole=True),
    "embedding_rowwise": Layer("vocabulary"),
    "packed_colwise": Layer("column", parts=(1, 1)),
    "packed_rowwise": Layer("row", parts=(1, 1)),
    "moe_tp_experts": Layer("experts"),
}
_NOTHING_TO_DO = {"replicate", "local_params", "embedding_colwise"}  # whole on each rank is right for these
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "head_dim", "num_key_value_groups")


def tp_plan_for(model: nn.Module, tp_mesh: DeviceMesh, sequence_parallel: bool = False) -> TensorParallelPlan:
    """How to cut ``model`` over the one-dimensional ``tp_mesh``.

    Raises:
        ConfigError: its heads do not divide so.
        ModelError: it brings no plan, or one that cannot be carried out.
    """
    tp_size = tp_mesh.size()
    styles = compat.own_tp_plan(model)
    if not styles:
        raise ModelError(f"distributed.tp_size={tp_size}: {type(model).__name__} brings no tensor-parallel plan")
    plan = plan_from_styles(model, styles, tp_size)
    require_heads(model, plan, tp_size)
    return plan


def plan_from_styles(model: nn.Module, styles: Mapping[str, str], tp_size: int) -> TensorParallelPlan:
    """``styles`` in transformers' words, with its patterns resolved to what ``model`` has."""
    layers: dict[str, Layer] = {}
    parameters: dict[str, Storage] = {}
    needs_region: list[str] = []
    for name, module in model.named_modules():
        style = _style_of(name, styles)
        if style == "mla_kv_a_proj":
            needs_region.append(name)
        elif style == "replicated_with_grad_allreduce":
            parameters |= {f"{name}.{key}": Storage(summed=True) for key, _ in module.named_parameters()}
        elif style in _LAYERS:
            layers[name] = _sized(_LAYERS[style], module)
        elif style is not None and style not in _NOTHING_TO_DO:
            raise ModelError(f"{type(model).__name__}: {name} has the tensor-parallel style {style!r}, unknown here")
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            own = None if name in layers and layers[name].kind != "experts" else _style_of(full, styles)
            if own is not None:
                parameters[full] = _parameter_storage(own, tuple(parameter.shape), full)
    layers = _fit_vocabulary(model, layers, tp_size)
    stacks = find_stacks(model)
    regions = find_regions(layers, {block for stack in stacks for block in stack})
    for name in needs_region:
        if not any(name.startswith(f"{region}.") for region in regions):
            raise ModelError(f"{type(model).__name__}: {name} is used beside column layers that share no input")
    return TensorParallelPlan(layers, parameters, frozenset(regions), blocks=stacks)


def find_regions(layers: Mapping[str, Layer], blocks: Iterable[str]) -> set[str]:
    """Modules (no decoder block itself) that hold column layers and one row layer, or column layers alone.

    What such a module makes of its input reaches the rest of the model through its row layer only, so that every
    gradient inside it is one rank's part, and its input can be taken in once.
    """
    blocks = set(blocks)
    members: dict[str, list[Layer]] = {}
    for name, layer in layers.items():
        while "." in name:
            name = name.rpartition(".")[0]
            members.setdefault(name, []).append(layer)
    found = {
        name
        for name, inside in members.items()
        if name not in blocks
        and not any(block.startswith(f"{name}.") for block in blocks)
        and all(layer.kind in ("column", "row") and not layer.whole for layer in inside)
        and sum(layer.kind == "row" for layer in inside) <= 1
        and any(layer.kind == "column" for layer in inside)
    }
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def require_heads(model: nn.Module, plan: TensorParallelPlan, tp_size: int) -> None:
    """Raise ConfigError where attention is cut by heads, and there is no whole number of heads for each rank."""
    if not any(_is_attention(model, name) for name, layer in plan.layers.items() if not layer.whole):
        return
    config: Any = model.config
    text = config.get_text_config()
    counts = {
        "attention heads": getattr(text, "num_attention_heads", None),
        "key-value heads": getattr(text, "num_key_value_heads", None),
    }
    numbers = {what: n for what, n in counts.items() if isinstance(n, int) and n > 0}
    if all(n % tp_size == 0 for n in numbers.values()):
        return
    fitting = [n for n in range(1, max(numbers.values()) + 1) if all(count % n == 0 for count in numbers.values())]
    has = " and ".join(f"{n} {what}" for what, n in numbers.items())
    raise ConfigError(
        f"distributed.tp_size={tp_size}: {has} of {type(model).__name__} cannot be shared among {tp_size} ranks; write "
        + (f"one of {', '.join(map(str, fitting))}" if len(fitting) > 1 else "1")
    )


def _is_attention(model: nn.Module, layer: str) -> bool:
    parent: Any = model.get_submodule(layer.rpartition(".")[0])
    return any(hasattr(parent, name) for name in _HEAD_COUNTS)


def _style_of(name: str, styles: Mapping[str, str]) -> str | None:
    return styles.get(name, styles.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)))


def _sized(layer: Layer, module: nn.Module) -> Layer:
    """``layer`` with the sizes of its parts, of which the style gives only the number."""
    if layer.parts is None:
        return layer
    width: Any = module.out_features if layer.kind == "column" else module.in_features
    return Layer(layer.kind, tuple(width // len(layer.parts) for _ in layer.parts), layer.whole)


def _parameter_storage(style: str, shape: tuple[int, ...], name: str) -> Storage:
    """A bare parameter, such as stacked expert weights ``[E, out, in]``."""
    if style not in ("colwise", "rowwise", "packed_colwise", "packed_rowwise"):
        if style in _NOTHING_TO_DO:
            return Storage()
        if style == "replicated_with_grad_allreduce":
            return Storage(summed=True)
        raise ModelError(f"{name} has the tensor-parallel style {style!r}, unknown here for a parameter")
    dim = len(shape) - 1 if style.endswith("rowwise") or len(shape) == 1 else len(shape) - 2
    parts = (shape[dim] // 2, shape[dim] // 2) if style.startswith("packed") else None
    return Storage(dim, parts)


def _fit_vocabulary(model: nn.Module, layers: dict[str, Layer], tp_size: int) -> dict[str, Layer]:
    """Embedding and head cut alike where they are one weight, and left whole where the vocabulary does not divide."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    ends = [names[module] for module in (embedding, head) if module in names]
    rows = {getattr(model.get_submodule(name), "weight").shape[0] for name in ends}  # noqa: B009
    if any(n % tp_size for n in rows):
        logger.info("%s: its vocabulary (%s) is not cut, because %d does not divide it", type(model).__name__,
                    ", ".join(map(str, rows)), tp_size)  # fmt: skip
        return {name: layer for name, layer in layers.items() if name not in ends}
    if len(ends) == 2 and embedding.weight is head.weight and any(name in layers for name in ends):
        layers = {**layers, ends[0]: Layer("vocabulary"), ends[1]: Layer("column", whole=True)}
    return layers
