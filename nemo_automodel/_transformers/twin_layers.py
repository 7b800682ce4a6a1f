"""Which layers of a model stay in its tiny twin: some of each kind, with every layer-wise setting cut alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_COUNT = re.compile(
    r"^(n_layers?|num_layers|layers|depth|num_blocks|((conf|encoder|decoder)_)?num_hidden_layers"
    r"|(num_)?(encoder|decoder)_layers|num_layers_per_stack|resampler_depth)$"
)
_PREFIX = re.compile(r"first|dense|hash|max_window|start_index")
_SUFFIX = re.compile(r"shared_layers")
_PERIOD = re.compile(r"period|interval|every_n|pattern|frequency|_freq$|sparse_step|layer_step|layers_per_|layer_group")
_INDEX = re.compile(r"(layer|idx|id|index|indice|indexe|block)s?$")
_OUTPUT = re.compile(r"feature_layers?$|_target_layers$|vision_layer$")


def is_layer_count(name: str) -> bool:
    """Whether a field of this name says how many layers there are."""
    return bool(_COUNT.match(name))


def is_layer_output(name: str) -> bool:
    """Whether a field of this name says which layers' outputs are used."""
    return bool(_OUTPUT.search(name))


def is_layer_map(name: str) -> bool:
    """Whether a field of this name lists outputs of a tower, each with the decoder's layer that it is added to."""
    return name.endswith("stack_layer_map")


def bound_output(layer: Any, kept: int) -> Any:
    """A layer's output (or several), counted from the end where negative, moved within a model of ``kept`` layers.

    Two that were different stay so as far as there are layers.
    """
    if not isinstance(layer, (list, tuple)):
        return max(layer, -kept) if layer < 0 else min(layer, kept)
    bounded = [bound_output(v, kept) for v in layer]
    if len(set(bounded)) < len(set(layer)) and all(v >= 0 for v in layer):
        order = sorted(set(layer), reverse=True)
        bounded = [max(kept - 1 - order.index(v), 0) for v in layer]
    return type(layer)(bounded)


def keep_layers(fields: Mapping[str, Any], total: int, wanted: int, least: int = 2) -> list[int]:
    """Indices of the layers to keep, in order: of each kind of layer the first ``wanted``, fewer of many kinds.

    At least ``least`` of them are kept.

    Two layers are of one kind where every layer-wise field says the same of them. A pattern that repeats (a list of
    kinds shorter than the model, a period) is kept whole.
    """
    columns = [column for name, value in fields.items() if (column := _column(name, value, total)) is not None]
    kinds: dict[str, list[int]] = {}
    for i in range(total):
        kinds.setdefault(repr([column[i] for column in columns]), []).append(i)
    cycles = [len(v) for k, v in fields.items() if _is_cycle(k, v, total)]
    if cycles:
        return list(range(min(total, max(wanted, *cycles))))
    if any(_is_period(name, value) and value > 1 for name, value in fields.items()):
        wanted = max(wanted, 4 // len(kinds))
    each = wanted if len(kinds) <= 3 else 1
    kept = sorted(i for found in kinds.values() for i in found[:each])
    return kept if len(kept) >= least else list(range(min(total, least)))


def cut_layers(fields: Mapping[str, Any], total: int, kept: list[int]) -> dict[str, Any]:
    """New values for those of ``fields`` that speak of layers, in a part of ``total`` layers that keeps ``kept``."""
    new = {name: _cut(name, value, total, kept) for name, value in fields.items()}
    return {name: value for name, value in new.items() if value is not None}


def _column(name: str, value: Any, total: int) -> list[Any] | None:
    """What ``value`` says of each layer, where it says something of layers one by one."""
    if _is_index_list(name, value, total):
        return None if _OUTPUT.search(name) else [i in value for i in range(total)]
    if _is_layer_list(value, total):
        return list(value)
    if isinstance(value, Mapping) and name == "per_layer_config":
        return [value.get(i) for i in range(total)]
    if _is_sub_count(name, value, total):
        return [i < value if _PREFIX.search(name) else i >= total - value for i in range(total)]
    return None


def _cut(name: str, value: Any, total: int, kept: list[int]) -> Any:
    if _is_int(value):
        return _cut_number(name, value, total, kept)
    if is_layer_output(name) and isinstance(value, (list, tuple)):
        return bound_output(value, len(kept))
    if _is_index_list(name, value, total):
        return type(value)(new for new, old in enumerate(kept) if old in value)
    if _is_layer_list(value, total):
        return type(value)(value[i] for i in kept)
    if isinstance(value, Mapping) and name == "per_layer_config":
        return {new: dict(value[old]) for new, old in enumerate(kept) if old in value}
    return None


def _cut_number(name: str, value: int, total: int, kept: list[int]) -> int | None:
    if is_layer_count(name):
        return len(kept) if value == total else min(value, len(kept))
    if is_layer_output(name):
        return bound_output(value, len(kept))
    if _is_sub_count(name, value, total):
        return sum(i < value if _PREFIX.search(name) else i >= total - value for i in kept)
    if _is_period(name, value):
        return min(value, 2)
    if name.endswith("_offset") and "layer" in name:
        return min(value, 1)
    return None


def _is_layer_list(value: Any, total: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == total and total > 1


def _is_cycle(name: str, value: Any, total: int) -> bool:
    return isinstance(value, (list, tuple)) and 1 < len(value) < total and bool(re.search(r"block_types?$", name))


def _is_index_list(name: str, value: Any, total: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and bool(_INDEX.search(name))
        and all(_is_int(v) and 0 <= v < total for v in value)
        and list(value) == sorted(set(value))
    )


def _is_sub_count(name: str, value: Any, total: int) -> bool:
    if not _is_int(value) or not 0 < value <= total or is_layer_count(name):
        return False
    about_layers = "layer" in name or "replace" in name
    return about_layers and bool(_PREFIX.search(name) or _SUFFIX.search(name))


def _is_period(name: str, value: Any) -> bool:
    return _is_int(value) and bool(_PERIOD.search(name)) and value > 0


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["bound_output", "cut_layers", "is_layer_count", "is_layer_map", "is_layer_output", "keep_layers"]
