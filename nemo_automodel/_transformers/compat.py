"""Every private name of transformers that this package relies on, one function each; tests run them on each version."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    core_model_loading,
    initialization,
    masking_utils,
    modeling_utils,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import moe
from transformers.models.auto import modeling_auto
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, cached_file

from nemo_automodel.components.attention import function
from nemo_automodel.components.attention.layout import BlockMask


def unsplittable_class_names(model: nn.Module) -> set[str]:
    """Class names of the blocks that must stay whole (``_no_split_modules`` of the model and its parts)."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def attention_is_pluggable(model: nn.Module) -> bool:
    """Whether every text part of ``model`` takes its attention from the registry and knows a kernel-style one.

    A model that transformers itself can only run with its eager attention may put things into the scores that a
    kernel knows nothing of, so it counts as not pluggable; so does one that hands on what ours knows nothing of.
    """
    return (
        isinstance(model, PreTrainedModel)
        and model._can_set_attn_implementation()
        and bool(model._supports_sdpa or model._supports_flash_attn)
        and not unknown_attention_arguments(model)
    )


def unknown_attention_arguments(model: nn.Module) -> set[str]:
    """What layers of ``model`` hand to the function from the registry that ``function.ARGUMENTS`` does not have.

    Such an argument may be all that says what is attended to (blocks of keys that an indexer chose, say).
    """
    classes: set[Any] = {type(module) for module in model.modules()}
    return {name for module_class in classes for name in _attention_arguments(module_class)} - function.ARGUMENTS


@functools.cache
def _attention_arguments(module_class: Any) -> frozenset[str]:
    """The keywords that the class's forward writes out where it calls ``attention_interface``, transformers' name of it."""
    source = _source_of_forward(module_class)
    if "attention_interface(" not in source:
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a text in it that stands further left
        return frozenset()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    ours = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "attention_interface")
    return frozenset(keyword.arg for call in ours for keyword in call.keywords if keyword.arg is not None)


def attention_name(model: nn.Module) -> str:
    """The attention implementation in use, as transformers names it."""
    config = getattr(model, "config", None)
    return str(getattr(config and config.get_text_config(), "_attn_implementation", None))


def calls_loss_function(model_class: Any) -> bool:
    """Whether the class's forward computes its loss by ``self.loss_function`` (nearly all do; the rest by hand)."""
    return "self.loss_function(" in _source_of_forward(model_class)


@functools.cache  # it is asked for in every forward, and reading it takes a millisecond
def _source_of_forward(module_class: Any) -> str:
    """Empty where there is none to be read."""
    try:
        return inspect.getsource(inspect.unwrap(module_class.forward))
    except (OSError, TypeError):
        return ""


def text_config(model: nn.Module) -> Any:
    """The config of the text part of ``model``; None where it has none of transformers'."""
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PretrainedConfig) else None


def window_size(model: nn.Module) -> int | None:
    """The sliding window that the config names, None where it names none or attention is cut into chunks instead."""
    text = text_config(model)
    return None if text is None or chunk_size(model) is not None else getattr(text, "sliding_window", None)


def chunk_size(model: nn.Module) -> int | None:
    """The size of the chunks that chunked attention is cut into, None where there is none."""
    text = text_config(model)
    kinds = getattr(text, "layer_types", None) or ("chunked_attention",)
    return getattr(text, "attention_chunk_size", None) if "chunked_attention" in kinds else None


def read_blocks(mask_function: Callable[..., Any]) -> BlockMask | None:
    """The blocks of a mask function that transformers made as causal or within a block, then within a window.

    It is known by the code of the functions it is made of: what another version makes otherwise is None, never a guess.
    """
    window = None
    parts = _made_of(mask_function, masking_utils.and_masks)
    if parts is not None and len(parts) == 2:
        mask_function, overlay = parts
        window = _held_by(overlay, masking_utils.sliding_window_overlay(1), "sliding_window")
        if not isinstance(window, int):
            return None
    parts = _made_of(mask_function, masking_utils.or_masks)
    if parts is None or len(parts) != 2 or parts[0] is not masking_utils.causal_mask_function:
        return None
    ids = _held_by(parts[1], _blockwise_overlay, "block_sequence_ids")
    return BlockMask(ids, window) if isinstance(ids, Tensor) and ids.ndim == 2 else None


_blockwise_overlay = masking_utils.blockwise_overlay(torch.empty(0))


def _made_of(function: Callable[..., Any], combine: Callable[..., Any]) -> tuple[Any, ...] | None:
    """What ``combine`` made ``function`` of, None where it did not make it."""
    return _held_by(function, combine(masking_utils.causal_mask_function), "mask_functions")


def _held_by(function: Any, like: Callable[..., Any], name: str) -> Any:
    """The variable ``name`` that ``function`` closes over, None where its code is not that of ``like``."""
    if getattr(function, "__code__", None) is not like.__code__:
        return None
    return inspect.getclosurevars(function).nonlocals.get(name)


def model_class_for(auto_class: Any, config: PretrainedConfig) -> type | None:
    """The class that ``auto_class`` would build for ``config``, None where transformers has none."""
    mapping = auto_class._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def rotates_by_length(model: nn.Module) -> int | None:
    """From how many tokens on positions are encoded by other frequencies (longrope, dynamic NTK); None: by none ever.

    How many there are is read off the largest position of all rows, documents and tokens of a forward together.
    """
    text = text_config(model)
    whole = getattr(text, "rope_parameters", None) or {}
    for part in (whole, *(value for value in whole.values() if isinstance(value, Mapping))):  # of all layers, or a kind
        kind = str(part.get("rope_type"))
        if kind == "longrope" or "dynamic" in kind:
            return part.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", None)
    return None


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def position_counter(model: nn.Module) -> Callable[..., Any] | None:
    """The model's function from ids and image sizes to positions of several dimensions, None where it counts in one."""
    return next((m.get_rope_index for m in model.modules() if hasattr(m, "get_rope_index")), None)  # type: ignore[return-value]


def registered_types(kind: str) -> list[str]:
    """The model types that this transformers registers for ``kind``: causal, or vlm (image and text to text)."""
    names = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "vlm": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"}
    return sorted(getattr(modeling_auto, names[kind]))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are what a decoder of its own puts out, beside an encoder's input."""
    return (
        bool(getattr(model.config, "is_encoder_decoder", False))
        and hasattr(model, "get_encoder")
        and ("decoder_input_ids" in inspect.signature(type(model).forward).parameters)
    )


# --- loading: names and layouts of checkpoints, and what transformers does around its own loading -----------------


@contextmanager
def on_meta() -> Iterator[None]:
    """The context that transformers itself builds a model on the meta device in."""
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        yield


def kept_dtype(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """By a tensor's name, the dtype that the model insists on for it where it is loaded in ``dtype``; else None."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    if not plan:
        return lambda name: None
    pattern, group_names, _ = core_model_loading.build_glob_alternation(list(plan))

    def kept(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return None if match is None else plan[group_names[str(match.lastgroup)]]

    return kept


def conversions_of(model: nn.Module, key_mapping: Mapping[str, str] | None = None) -> list[Any]:
    """How the tensors of a checkpoint become those of ``model``: transformers' own renamings and conversions."""
    return get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None, None)  # type: ignore[arg-type]


@dataclass
class TensorGroup:
    """Tensors of a checkpoint that become one or more of the model's together."""

    target: str  # the first of the model's tensors that it gives
    transform: Any  # transformers' WeightRenaming or WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name in the checkpoint, pattern it matched)

    @property
    def renames_only(self) -> bool:
        """Whether the tensor is taken as it is."""
        return not isinstance(self.transform, core_model_loading.WeightConverter)

    @property
    def stacks_first_dim(self) -> bool:
        """Whether each source is a slice of the target's first dimension, and stays apart from the others'."""
        transform = self.transform
        operations = [] if self.renames_only else transform.operations
        stacks = bool(operations) and type(operations[0]) is core_model_loading.MergeModulelist
        return (
            stacks
            and operations[0].dim == 0
            and len(transform.target_patterns) == 1
            and all(_leaves_first_dim(operation) for operation in operations[1:])
        )

    def convert(self, model: nn.Module, read: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The model's tensors by name; ``read`` gives those of the checkpoint, None for one to be left out."""
        transform = deepcopy(self.transform)
        for name, pattern in self.sources:
            transform.add_tensor(self.target, name, pattern, lambda name=name: read(name))
        converted = transform.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _leaves_first_dim(operation: Any) -> bool:
    if type(operation) is core_model_loading.Transpose:
        return bool(min(operation.dim0, operation.dim1) > 0)
    return type(operation) is core_model_loading.Concatenate and operation.dim > 0


def group_tensors(
    model: nn.Module, conversions: list[Any], names: Iterable[str], expected: Mapping[str, Tensor]
) -> tuple[list[TensorGroup], set[str]]:
    """The checkpoint's tensors ``names`` by what they become, and those that ``expected`` (the model's) has no place for."""
    renamings = [c for c in conversions if isinstance(c, core_model_loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, core_model_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    rename, prefix = core_model_loading.rename_source_key, model.base_model_prefix
    groups: dict[str, TensorGroup] = {}
    unexpected: set[str] = set()
    for name in sorted(names, key=core_model_loading.dot_natural_key):
        target, pattern = rename(name, renamings, converters, prefix, expected)  # type: ignore[arg-type]
        if target not in expected and name in expected:
            target, pattern = rename(name, [], [], prefix, expected)  # type: ignore[arg-type]
        if target not in expected:
            first = by_pattern[pattern].target_patterns if pattern is not None else [""]
            unexpected |= {target.replace(first[0], other) if first[0] else target for other in first}
            continue
        if target not in groups:
            made = by_pattern[pattern] if pattern is not None else core_model_loading.WeightRenaming(name, target)
            groups[target] = TensorGroup(target, made)
        groups[target].sources.append((name, pattern if pattern is not None else name))
    return list(groups.values()), unexpected


def remember_conversions(model: nn.Module, conversions: list[Any]) -> None:
    """Keep those that were used, for saving under the names that the checkpoint had."""
    model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]  # type: ignore[assignment]


def really_missing(model: nn.Module, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """``missing`` and ``unexpected`` without what the model's class says does not matter."""
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]
    return info.missing_keys, info.unexpected_keys


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name -> the name of the tensor it is tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def skipping_initialized(done: list[Any]) -> Iterator[None]:
    """Functions of ``torch.nn.init`` leave alone what is marked inside; ``done`` (may grow) is unmarked afterwards."""
    with initialization.guard_torch_init_functions():
        yield
    for tensor in done:
        tensor.__dict__.pop("_is_hf_initialized", None)


def mark_initialized(tensor: Tensor) -> None:
    """Have ``skipping_initialized`` leave ``tensor`` alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def initialize_one(module: nn.Module, owner: PreTrainedModel) -> None:
    """Set the values of ``module`` alone as ``owner``, the model it is part of, does."""
    owner._init_weights(module)


def initialize_below(module: nn.Module, owner: PreTrainedModel, only_with_buffers: bool = False) -> None:
    """``initialize_one`` for all modules of ``module``, the inner ones first; models within by their own rules.

    With ``only_with_buffers`` those that hold no buffer at any depth are left alone: sharded weights may not take it.
    """
    if only_with_buffers and next(module.buffers(), None) is None:
        return
    for child in module.children():
        initialize_below(child, child if isinstance(child, PreTrainedModel) else owner, only_with_buffers)
    owner._init_weights(module)


def initialize_where_unset(model: PreTrainedModel, tensors: Iterable[Tensor]) -> None:
    """Run the model's own initialisation for all but ``tensors``: for buffers that no checkpoint holds."""
    done = list({id(tensor): tensor for tensor in tensors}.values())
    for tensor in done:
        mark_initialized(tensor)
    with torch.no_grad(), skipping_initialized(done):
        initialize_below(model, model, only_with_buffers=True)


def load_generation_config(model: Any, name: str, **source: Any) -> None:
    """What ``from_pretrained`` does about ``generation_config.json``."""
    if not model.can_generate() or not hasattr(model, "adjust_generation_fn"):
        return
    options = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": False, "token": None}
    model.adjust_generation_fn(None, True, None, name, **{**options, "subfolder": "", **source})


# --- saving: the reverse ------------------------------------------------------------------------------------------


@dataclass
class ExportGroup:
    """Tensors of a model that become one or more of a checkpoint's together; ``outputs`` are on the meta device."""

    inputs: list[str]
    outputs: dict[str, Tensor]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def export_groups(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[ExportGroup]:
    """What ``save_pretrained`` would write of ``tensors`` (the model's, on the meta device; tied ones the same object).

    Tied weights but for the one that is kept, and what the class does not save, are left out.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    stand_ins: dict[int, Tensor] = {}
    kept: Any = {n: stand_ins.setdefault(id(t), torch.empty(1)) for n, t in tensors.items() if n not in ignored}
    kept = modeling_utils.remove_tied_weights_from_state_dict(kept, model)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, core_model_loading.PrefixChange)]
    model._weight_conversions = conversions  # type: ignore[assignment]
    reverse = [c.reverse_transform() for c in conversions[::-1]]
    converters = [c for c in reverse if isinstance(c, core_model_loading.WeightConverter)]
    grouped: dict[Any, list[str]] = {}
    for name in sorted(kept, key=core_model_loading.dot_natural_key) if conversions else kept:
        grouped.setdefault(_reverse_group(name, converters), []).append(name)
    groups = []
    for names in grouped.values():
        outputs = _reverted(model, {name: tensors[name] for name in names})
        groups.append(ExportGroup(names, outputs, lambda given: _reverted(model, given)))
    return groups


def _reverse_group(name: str, converters: list[Any]) -> Any:
    for number, converter in enumerate(converters):
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return number, renamed
    return name


def forget_quantization(model: PreTrainedModel) -> None:
    """Let ``model``, which loading dequantised, be saved under the names of plain weights.

    transformers 5.17 keeps the conversions that joined codes with scales, and would turn them round for saving.
    """
    vars(model).pop("_weight_conversions", None)


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not model._weight_conversions:
        return tensors
    return core_model_loading.revert_weight_conversion(model, tensors)


# --- mixtures of experts ------------------------------------------------------------------------------------------

_EXPERTS_FEATURES = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}


def pluggable_experts(model: nn.Module) -> list[nn.Module]:
    """The modules of stacked experts in ``model`` that take their function from transformers' registry."""
    marks = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
    return [module for module in model.modules() if all(hasattr(module, mark) for mark in marks)]


def unknown_experts_feature() -> str | None:
    """Why a function of ours may not replace transformers' experts functions: what their modules say that we do not know."""
    known = {"experts_class", "experts_interface", *_EXPERTS_FEATURES}
    unknown = sorted(set(inspect.signature(moe.use_experts_implementation).parameters) - known)
    return f"this transformers' experts have {', '.join(unknown)}, which ours does not know" if unknown else None


def experts_name(module: nn.Module) -> str:
    """The experts implementation in use by a model or a module of experts, as transformers names it."""
    config = getattr(module, "config", None)
    return str(getattr(config, "_experts_implementation", None))


def register_experts(name: str, function: Callable[..., Tensor]) -> None:
    """Make an experts function known to transformers (any number of times)."""
    moe.ALL_EXPERTS_FUNCTIONS.register(name, function)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """Rows of ``x`` [S, in] times the weight of their group, ``weight`` [E, out, in] or, ``transposed``, [E, in, out].

    Group e ends before row ``ends[e]``. One grouped product where torch has one for the dtype and device, else a loop.
    """
    return moe._grouped_linear(x, weight, ends, is_transposed=transposed)


def own_ep_plan(model: nn.Module) -> dict[str, str]:
    """The expert-parallel styles that the model brings: module or parameter name, layers as ``*`` -> style."""
    return dict(getattr(model, "_ep_plan", None) or {})


def own_tp_plan(model: nn.Module) -> dict[str, str]:
    """The tensor-parallel styles that the model brings: module or parameter name, layers as ``*`` -> style."""
    return dict(getattr(model, "_tp_plan", None) or {})


def base_class(model: nn.Module) -> type:
    """The transformers class of ``model``, without the mixin put before it."""
    return getattr(type(model), "automodel_base", type(model))


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument ``name`` of its own."""
    return name in inspect.signature(type(model).forward).parameters


# --- processors of images and text --------------------------------------------------------------------------------


def json_file_of(name: str, file: str, **source: Any) -> dict[str, Any]:
    """What ``file`` of the checkpoint ``name`` says; nothing where it has none."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **source)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def registered_processor(model_type: str) -> tuple[Any, dict[str, str | None]]:
    """The processor class registered for a type, None without one, and its image processors' names by back end."""
    from transformers.models.auto import image_processing_auto, processing_auto

    name = processing_auto.PROCESSOR_MAPPING_NAMES.get(model_type)
    by_backend: Any = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if isinstance(by_backend, (tuple, list)):  # before back ends had names: the slow one, which is PIL's, comes first
        by_backend = dict(zip(("pil", "torchvision"), by_backend, strict=False))
    return name and processing_auto.processor_class_from_name(name), by_backend or {}


def required_packages(cls: Any) -> tuple[str, ...]:
    """The packages that a class of transformers names as needed, whether they are here or not."""
    found = getattr(cls, "__backends", None) or getattr(cls, "_backends", None) or ()
    return tuple(str(getattr(backend, "value", backend)) for backend in found)


def processor_class(name: str, config: PretrainedConfig | None, **source: Any) -> Any:
    """The processor class of the checkpoint ``name``, whether or not it can be built here; None where it has none."""
    from transformers.models.auto import processing_auto

    for file in (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME):
        if written := json_file_of(name, file, **source).get("processor_class"):
            return processing_auto.processor_class_from_name(written)
    mapping: Any = processing_auto.PROCESSOR_MAPPING
    return mapping.get(type(config), None)
