"""A model's tiny twin: its config made narrow and shallow, every structural switch kept.

Nothing here knows a model. A field is shrunk by what its name says it counts (``twin_fields``: layers, heads, widths,
experts, tokens) and by how its value relates to others of the same config: what was equal, a multiple or a product
stays so.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_codes import shrink_codes
from nemo_automodel._transformers.twin_fields import is_int
from nemo_automodel._transformers.twin_images import shrink_images
from nemo_automodel._transformers.twin_layers import (
    bound_output,
    cut_layers,
    is_layer_count,
    is_layer_map,
    is_layer_output,
    keep_layers,
)
from nemo_automodel._transformers.twin_rope import fit_rope
from nemo_automodel._transformers.twin_widths import Widths

_MOST_EXPERTS = 4
_WINDOW = 8
_POSITIONS = 4096
_BASE = 32  # channels: they are normalised in 32 groups
_GRID = (4, 6)  # of positions that are two numbers each; as long as a batch, because such models want it full


def tiny_twin(config: PretrainedConfig, *, layers: int = 2, heads: int = 4, vocab_size: int = 128) -> PretrainedConfig:
    """Shrink ``config`` to a model of the same structure that builds in seconds; ``config`` itself stays as it is.

    Args:
        config: any transformers config, with its sub-configs.
        layers: how many layers of each kind to keep (one of each where there are more than three kinds).
        heads: query heads, where the model has as many; grouped key-value heads are half of them, single ones stay.
        vocab_size: tokens of the vocabulary, special tokens moved into it.

    Returns:
        A config of the same class. Head dimensions are multiples of 8, widths too; sliding windows are 8 tokens.
    """
    parts = names.parts_of(config)
    text = names.text_part(config)
    ordered = sorted(parts, key=lambda part: part is not text)
    old = {id(part): names.fields_of(part) for part in parts}
    new = {id(part): _cut(part, old[id(part)], layers) for part in parts}
    _bound_outputs(parts, old, new)
    widths = Widths(heads, _shared(parts, old))
    for part in ordered:
        widths.choose(part, old[id(part)], new[id(part)])
    tokens = _token_table(old.values(), vocab_size)
    whole_vocabulary = getattr(text, "vocab_size", None)
    for part in ordered:
        fields, chosen = old[id(part)], new[id(part)]
        widths.fill(part, fields, chosen)
        chosen.update(_counts(fields, chosen, vocab_size, whole_vocabulary))
        chosen.update({k: _map_ints(v, tokens) for k, v in fields.items() if names.is_token(k)})
        for entry in chosen.get("per_layer_config", {}).values():
            entry.update({k: min(v, _MOST_EXPERTS) for k, v in entry.items() if is_int(v) and names.EXPERTS.search(k)})
        if isinstance(spread := fields.get("initializer_range"), float) and spread < 1e-3:
            chosen["initializer_range"] = 0.02  # else a tower's output is lost in rounding
        fit_rope(part, fields, chosen)
    shrink_images(parts, old, new)
    shrink_codes(old, new, tokens, vocab_size)
    return type(config).from_dict(_as_dict(config, new))


def _shared(parts: list[PretrainedConfig], old: dict[int, dict[str, Any]]) -> frozenset[int]:
    keys = [(old[id(part)], names.find(part, old[id(part)], *names.HIDDEN)) for part in parts]
    found = [fields[key] for fields, key in keys if key]
    return frozenset(width for width in found if found.count(width) > 1)


def one_block_each(config: PretrainedConfig, *, vocab_size: int, window: int, least: int = 1) -> PretrainedConfig:
    """``config`` with one layer of each kind, every width as it is; ``config`` itself stays as it is.

    Args:
        config: any transformers config, with its sub-configs.
        vocab_size: tokens of the vocabulary, special tokens moved into it.
        window: tokens that a sliding window has at most.
        least: layers to keep at the least, for a model that cannot be built with one.

    Returns:
        A config of the same class. Of experts there are as few as a token is given, each as wide as it is; images have
        few patches.
    """
    parts = names.parts_of(config)
    old = {id(part): names.fields_of(part) for part in parts}
    new = {id(part): _cut(part, old[id(part)], 1, least) for part in parts}
    _bound_outputs(parts, old, new)
    tokens = _token_table(old.values(), vocab_size)
    whole_vocabulary = getattr(names.text_part(config), "vocab_size", None)
    for part in parts:
        fields, chosen = old[id(part)], new[id(part)]
        counts = _counts(fields, chosen, vocab_size, whole_vocabulary)
        chosen.update({k: v for k, v in counts.items() if names.VOCABULARY.search(k)})
        chosen.update(_all_experts(fields))
        chosen.update(_outputs_side_by_side(part, fields, chosen))
        if "patch_size" not in fields:
            windows = {k: v for k, v in fields.items() if names.WINDOW.search(k) and is_int(v) and v > 0}
            chosen.update({k: min(v, window) for k, v in windows.items()})
        chosen.update({k: _map_ints(v, tokens) for k, v in fields.items() if names.is_token(k)})
        for entry in chosen.get("per_layer_config", {}).values():
            entry.update(_all_experts(entry))
    shrink_images(parts, old, new)
    return type(config).from_dict(_as_dict(config, new))


def _outputs_side_by_side(part: PretrainedConfig, fields: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Widths that are the hidden size times the number of listed layers and one more, for as many as are left."""
    key = names.find(part, fields, *names.HIDDEN)
    new: dict[str, Any] = {}
    if key is None:
        return new
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and value and len(chosen.get(name, value)) < len(value):
            wide, narrow = (fields[key] * (len(listed) + 1) for listed in (value, chosen[name]))
            new |= {k: narrow for k, v in fields.items() if v == wide and names.is_width(k)}
    return new


def kept_blocks(config: PretrainedConfig, least: int = 1) -> list[tuple[int, list[int]]]:
    """Of each part with layers how many there are, and which of them ``one_block_each`` keeps."""
    found = []
    for part in names.parts_of(config):
        fields = names.fields_of(part)
        if key := _layer_count(part, fields):
            found.append((fields[key], keep_layers(fields, fields[key], 1, least)))
    return found


def moved_tokens(config: PretrainedConfig, vocab_size: int) -> dict[int, int]:
    """Where ``one_block_each`` puts the special tokens of ``config`` in a vocabulary of ``vocab_size``."""
    return _token_table((names.fields_of(part) for part in names.parts_of(config)), vocab_size)


def _all_experts(fields: dict[str, Any]) -> dict[str, Any]:
    """As few experts as a token is given, two at most, in one group: no rounding then decides which it is given."""
    counts = {k: v for k, v in fields.items() if is_int(v) and v > 0}
    groups = [k for k in counts if names.EXPERT_GROUPS.search(k)]
    given = [v for k, v in counts.items() if names.TOP_K.search(k) and k not in groups]
    number = min([2, *given])
    chosen: dict[str, Any] = {k: number for k in counts if names.EXPERTS.search(k) or names.TOP_K.search(k)}
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and names.EXPERTS.search(name):
            chosen[name] = type(value)(number for _ in value)
    return chosen | dict.fromkeys(groups, 1)


def _cut(part: PretrainedConfig, fields: dict[str, Any], wanted: int, least: int = 2) -> dict[str, Any]:
    key = _layer_count(part, fields)
    if key is None:
        return {k: type(v)(min(x, 1) for x in v) for k, v in fields.items() if k == "depths" and v}
    total = fields[key]
    new = cut_layers(fields, total, keep_layers(fields, total, wanted, least))
    stack = fields.get("num_layers_per_stack")
    if stack and stack != total and total % stack == 0:  # so many stacks of layers
        new[key] = total // stack * new["num_layers_per_stack"]
    return new


def _layer_count(part: PretrainedConfig, fields: dict[str, Any]) -> str | None:
    """The field that says how many layers ``part`` has; None where it has none."""
    key = names.find(part, fields, "num_hidden_layers")
    key = key or next((k for k, v in fields.items() if is_layer_count(k) and is_int(v) and v > 0), None)
    return key if key is not None and fields[key] >= 1 else None


def _bound_outputs(
    parts: list[PretrainedConfig], old: dict[int, dict[str, Any]], new: dict[int, dict[str, Any]]
) -> None:
    """Keep the layers of the vision tower whose outputs another part asks for within those that it has."""
    seeing = [new[id(p)] for p in parts if "patch_size" in old[id(p)]]
    kept = next((v for fields in seeing for k, v in fields.items() if is_layer_count(k) and is_int(v)), None)
    for part in parts:
        for name, value in old[id(part)].items():
            if kept and is_layer_output(name) and "patch_size" not in old[id(part)] and value is not None:
                new[id(part)][name] = bound_output(value, kept)
            elif kept and is_layer_map(name) and value:
                new[id(part)][name] = [[bound_output(output, kept), i % 2] for i, (output, _) in enumerate(value[-2:])]


def _counts(
    fields: dict[str, Any], chosen: dict[str, Any], vocab_size: int, whole_vocabulary: int | None
) -> dict[str, Any]:
    new: dict[str, Any] = {}
    scaled = "original_max_position_embeddings" in repr(fields)
    for name, value in fields.items():
        if isinstance(value, dict) and names.CHUNK.search(name):
            new[name] = {k: min(v, _WINDOW) if is_int(v) else v for k, v in value.items()}
        elif isinstance(value, (list, tuple)) and names.EXPERTS.search(name):
            new[name] = type(value)(min(v, _MOST_EXPERTS) for v in value)
        elif isinstance(value, (list, tuple)) and names.GRID.search(name) and len(value) == 2:
            new[name] = list(_GRID)
            new.update({k: math.prod(_GRID) for k, v in fields.items() if names.POSITIONS.search(k)})
        if not is_int(value) or value <= 0:
            continue
        if names.is_width(name) and value == _deepest(fields):
            new[name] = _deepest({**fields, **chosen, "base_channels": min(fields["base_channels"], _BASE)})
        if name in chosen or name in new:
            continue
        if names.VOCABULARY.search(name):
            new[name] = vocab_size if value == whole_vocabulary else min(value, vocab_size)
        elif names.EXPERTS.search(name):
            new[name] = min(value, _MOST_EXPERTS)
        elif names.TOP_K.search(name) or names.BLOCKS_CHOSEN.search(name):
            new[name] = min(value, 2)
        elif names.QUERIES.search(name):
            new[name] = min(value, 4)
        elif name == "base_channels":
            new[name] = min(value, _BASE)
        elif name == "topk_group":
            new[name] = 1
        elif names.CHUNK.search(name) or (names.WINDOW.search(name) and "patch_size" not in fields):
            new[name] = min(value, _WINDOW)
        elif names.POSITIONS.search(name) and not scaled:
            new[name] = min(value, _POSITIONS)
    return new


def _deepest(fields: dict[str, Any]) -> int | None:
    """Channels of the last level of an image tokenizer, which widens from level to level."""
    base, multipliers = fields.get("base_channels"), fields.get("channel_multiplier")
    return base * multipliers[-1] if is_int(base) and multipliers else None


def _token_table(parts: Any, vocab_size: int) -> dict[int, int]:
    """Where each special token of the whole config goes: small ids stay, large ones move to the end, in order."""
    found: set[int] = set()
    for fields in parts:
        for name, value in fields.items():
            if names.is_token(name):
                listed = value if isinstance(value, (list, tuple)) else [value]
                found.update(v for v in listed if is_int(v) and v >= 0)
    large = sorted(v for v in found if v >= 8)
    return {v: vocab_size - len(large) + i for i, v in enumerate(large)}


def _map_ints(value: Any, table: dict[int, int]) -> Any:
    if is_int(value):
        return table.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_ints(v, table) for v in value)
    return value


def _as_dict(config: PretrainedConfig, new: dict[int, dict[str, Any]]) -> dict[str, Any]:
    data = config.to_dict()
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            data[name] = _as_dict(value, new)
    data.update(new[id(config)])
    return data


__all__ = ["kept_blocks", "moved_tokens", "one_block_each", "tiny_twin"]
