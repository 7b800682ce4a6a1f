"""Which layers of a model stay in its tiny twin: some of each kind, with every layer-wise setting cut alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_COUNT = re.compile(
    r"^(n_layers?|num_layers|layers|depth|num_blocks|num_hidden_layers|(encoder|decoder|num_encoder|num_decoder)_layers"
    r"|\w+_num_hidden_layers|num_layers_per_stack|\w+_depth)$"
)
_PREFIX = re.compile(r"(first|dense|hash|max_window|start_index|num_global)")
_SUFFIX = re.compile(r"(shared_layers)")
_PERIOD = re.compile(
    r"(period|interval|every_n|pattern|frequency|_freq$|sparse_step|layer_step|layers_per_|layer_group)"
)
_INDEX = re.compile(r"(layer|idx|idxs|ids|indices|indexes|index|blocks)s?$")
_FEATURE = re.compile(r"feature_layers?$|hidden_state_index|_target_layers$|spatial_vision_layer")


def is_layer_count(name: str) -> bool:
    """Whether a field of this name says how many layers there are."""
    return bool(_COUNT.match(name))


def cut_layers(fields: Mapping[str, Any], total: int | None, wanted: int) -> dict[str, Any]:
    """New values for the layer-wise ``fields`` of one part of a config that has ``total`` layers."""
    if not total:
        return {}
    kept = choose_layers(fields, total, wanted)
    new: dict[str, Any] = {}
    for name, value in fields.items():
        cut = _cut(name, value, total, kept)
        if cut is not None:
            new[name] = cut
    return new


def choose_layers(fields: Mapping[str, Any], total: int, wanted: int) -> list[int]:
    """Indices of the layers to keep, in order: of each kind of layer the first ``wanted``, fewer of many kinds."""
    found_columns = [_column(name, value, total) for name, value in fields.items()]
    columns = [c for c in found_columns if c is not None]
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i in range(total):
        kinds.setdefault(tuple(repr(c[i]) for c in columns), []).append(i)
    periods = [v for k, v in fields.items() if _is_period(k, v) and v > 1]
    if periods:
        wanted = max(wanted, 4 // len(kinds))
    each = wanted if len(kinds) <= 3 else 1
    return sorted(i for found in kinds.values() for i in found[:each])


def _column(name: str, value: Any, total: int) -> list[Any] | None:
    """What ``value`` says of each layer, where it says something of layers one by one."""
    if _is_layer_list(value, total) and not all(isinstance(v, int) and v == i for i, v in enumerate(value)):
        return list(value)
    if _is_index_list(name, value, total):
        return [i in value for i in range(total)]
    if _is_sub_count(name, value, total):
        return [i < value if _PREFIX.search(name) else i >= total - value for i in range(total)]
    return None


def _cut(name: str, value: Any, total: int, kept: list[int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if is_layer_count(name):
            return len(kept) if value == total else max(1, min(value, len(kept))) if value else value
        if _FEATURE.search(name):
            return max(value, -len(kept)) if value < 0 else min(value, len(kept))
        if _is_sub_count(name, value, total):
            return sum(i < value if _PREFIX.search(name) else i >= total - value for i in kept)
        if _is_period(name, value):
            return min(value, 2)
        if name.endswith("offset") and "layer" in name:
            return min(value, 1)
        return None
    if _is_index_list(name, value, total):
        return type(value)(new for new, old in enumerate(kept) if old in value)
    if _FEATURE.search(name) and isinstance(value, (list, tuple)):
        return type(value)(max(v, -len(kept)) if v < 0 else min(v, len(kept)) for v in value)
    if _is_layer_list(value, total):
        return type(value)(value[i] for i in kept)
    return None


def _is_layer_list(value: Any, total: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == total and total > 1


def _is_index_list(name: str, value: Any, total: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and bool(_INDEX.search(name))
        and not _FEATURE.search(name)
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < total for v in value)
        and list(value) == sorted(set(value))
    )


def _is_sub_count(name: str, value: Any, total: int) -> bool:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= total or is_layer_count(name):
        return False
    about_layers = "layer" in name or "replace" in name
    return about_layers and bool(_PREFIX.search(name) or _SUFFIX.search(name))


def _is_period(name: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and bool(_PERIOD.search(name)) and value > 0
