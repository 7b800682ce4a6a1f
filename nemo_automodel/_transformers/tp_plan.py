"""The tensor-parallel plan of any model: its own, in transformers' words, or one inferred from its structure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.blocks import find_stacks
from nemo_automodel._transformers.tp_infer import infer
from nemo_automodel._transformers.tp_proof import Twin
from nemo_automodel._transformers.tp_regions import find_regions, fit_ends
from nemo_automodel._transformers.tp_trace import pattern_of
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
    "moe_identity_expert": Layer("identity"),
}
_NOTHING_TO_DO = {"replicate", "local_params", "embedding_colwise"}  # whole on each rank is right for these
_WORTH = 0.1  # of the blocks' parameters; below it, tensor parallelism only costs
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "head_dim", "num_key_value_groups")


def tp_plan_for(model: nn.Module, tp_mesh: DeviceMesh, sequence_parallel: bool = False) -> TensorParallelPlan:
    """How to cut ``model`` over the one-dimensional ``tp_mesh``: by its own plan, or as its structure suggests.

    Either is proved first: a tiny copy of the model is run over the ranks of ``tp_mesh``, and its loss and every
    gradient compared with the unsharded copy's. Every rank must call it.

    Raises:
        ConfigError: the model's heads do not divide so.
        ModelError: nothing of the model can be cut, or not with ``sequence_parallel``; the message says why.
    """
    tp_size = tp_mesh.size()
    name = compat.base_class(model).__name__
    styles = compat.own_tp_plan(model)
    plan, objection = None, None
    if brings_plan(styles):
        try:
            plan = plan_from_styles(model, styles, tp_size)
            require_heads(model, plan, tp_size)
        except ModelError as error:
            objection = str(error)
    try:
        twin = Twin(model, tp_mesh)
    except ModelError as error:
        if plan is None:
            raise ModelError(f"distributed.tp_size={tp_size}: {error}, so no plan can be proved; write tp_size: 1")
        logger.warning("%s; its own tensor-parallel plan is used unproved", error)
        return plan
    if plan is not None:
        objection = twin.objection(partial(plan_from_styles, styles=styles, tp_size=tp_size), sequence_parallel)
        if objection is None:
            return _with_less_gathered(model, plan, twin, tp_size, sequence_parallel)
    if objection is not None:
        logger.warning("%s: its own tensor-parallel plan is not used, because with it %s", name, objection)
    return _inferred_plan(model, name, twin, tp_size, sequence_parallel)


def _with_less_gathered(
    model: nn.Module, plan: TensorParallelPlan, twin: Twin, tp_size: int, sequence_parallel: bool
) -> TensorParallelPlan:
    """A plan inferred instead of ``plan`` where that gathers outputs only because weights are fused."""
    gathered = {name for name, layer in plan.layers.items() if layer.kind == "column" and layer.whole and "." in name}
    gathered = {
        name for name in gathered if any(name.startswith(f"{block}.") for stack in plan.blocks for block in stack)
    }
    if not gathered:
        return plan
    found, _ = infer(twin, tp_size, sequence_parallel)
    other = found.plan(model, tp_size)
    if gathered <= other.layers.keys() and cut_share(model, other) >= cut_share(model, plan):
        require_heads(model, other, tp_size)
        return other
    return plan


def _inferred_plan(
    model: nn.Module, name: str, twin: Twin, tp_size: int, sequence_parallel: bool
) -> TensorParallelPlan:
    found, objections = infer(twin, tp_size, sequence_parallel)
    if found.pairs:
        plan = found.plan(model, tp_size)
        require_heads(model, plan, tp_size)
        _require_worth(model, plan, tp_size)
        for what, reason in objections.items():
            logger.warning("%s: %s is kept whole on each tensor-parallel rank, because cut in %d %s",
                           name, what, tp_size, reason)  # fmt: skip
        return plan
    reasons = "; ".join(f"cut at {what}, {reason}" for what, reason in objections.items())
    if sequence_parallel and infer(twin, tp_size)[0].pairs:
        raise ModelError(f"distributed.sequence_parallel=true: {name} computes something else with its sequence "
                         f"sharded ({reasons}); write false")  # fmt: skip
    raise ModelError(
        f"distributed.tp_size={tp_size}: no layers of {name} can be cut ({reasons or 'it has no column and row layers'});"
        " write tp_size: 1, and leave the sharding to FSDP (dp_size: none)"
    )


def _require_worth(model: nn.Module, plan: TensorParallelPlan, tp_size: int) -> None:
    """Raise ModelError where almost everything would stay whole, and so be computed by every rank."""
    share = cut_share(model, plan)
    if share < _WORTH:
        raise ModelError(
            f"distributed.tp_size={tp_size}: of the blocks of {compat.base_class(model).__name__}, layers with only "
            f"{share:.0%} of the parameters can be cut; write tp_size: 1, and leave the sharding to FSDP (dp_size: none)"
        )


def cut_share(model: nn.Module, plan: TensorParallelPlan) -> float:
    """The share of the decoder blocks' parameters that lies in layers which ``plan`` cuts."""
    inside = {module for stack in plan.blocks for block in stack for module in model.get_submodule(block).modules()}
    cut = {module for name in plan.layers for module in model.get_submodule(name).modules()}

    def size(modules: set[nn.Module]) -> int:
        return sum(p.numel() for p in {p for module in modules for p in module.parameters(recurse=False)})

    return size(inside & cut) / max(size(inside), 1)


def brings_plan(styles: Mapping[str, str]) -> bool:
    """Whether ``styles`` cut anything but the vocabulary."""
    return any(style in _LAYERS and "*" in name for name, style in styles.items())


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
    layers = fit_ends(model, layers, tp_size)
    stacks = find_stacks(model)
    regions = find_regions(layers, {block for stack in stacks for block in stack})
    for name in needs_region:
        if not any(name.startswith(f"{region}.") for region in regions):
            raise ModelError(f"{type(model).__name__}: {name} is used beside column layers that share no input")
    return TensorParallelPlan(layers, parameters, frozenset(regions), blocks=stacks)


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
    return styles.get(name, styles.get(pattern_of(name)))


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
