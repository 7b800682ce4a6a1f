"""Widths and heads of a tiny twin: chosen once for each width of the original, so that what fitted fits again."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_fields import is_int

_SPARE = (64, 32, 96, 48, 128, 160, 192, 224, 256)


class Widths:
    """The twin's width for each hidden size met in the original, over all its parts."""

    def __init__(self, heads: int, shared: frozenset[int] = frozenset()) -> None:
        self.heads = heads
        self.shared = shared  # hidden sizes of several parts, one of which may count its heads by 64 dimensions each
        self.known: dict[int, int] = {}

    def choose(self, part: PretrainedConfig, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Set heads, head dimensions and the hidden size of one part."""
        queries = names.find(part, old, "num_attention_heads", "num_heads", "encoder_attention_heads")
        for name, value in old.items():
            if (narrow := self._heads(name, value, old.get(queries) if queries else None, new)) is not None:
                new[name] = narrow
        dims = {k: v for k, v in old.items() if is_int(v) and v > 0 and names.HEAD_DIM.search(k)}
        overridden = {f"{k}@{v}": v for d in _overrides(old).values() for k, v in d.items() if names.HEAD_DIM.search(k)}
        shrunk = _shrink_dims({**dims, **overridden}, old)
        new.update({k: shrunk[k] for k in dims})
        self._hidden(part, old, new, queries)
        for entry in _overrides(new).values():
            entry.update({k: self._override_dim(k, v, old, new, shrunk) for k, v in entry.items()})

    def fill(self, part: PretrainedConfig, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Set the other widths of one part, in proportion to its hidden size or to what else they equal."""
        hidden_key = names.find(part, old, *names.HIDDEN)
        hidden = old[hidden_key] if hidden_key else None
        products = self._products(old, new, hidden)
        for name, value in old.items():
            if not names.is_width(name) or (name in new and not isinstance(value, (list, tuple))):
                continue
            if is_int(value) and value >= 16:
                new[name] = products.get(value) or self._width(value, hidden)
            elif isinstance(value, (list, tuple)) and value and all(is_int(x) and x >= 16 for x in value):
                new[name] = self._width_list(name, value, new, hidden)

        for entry in _overrides(new).values():
            wide = {k: v for k, v in entry.items() if is_int(v) and v >= 16 and names.is_width(k) and k in new}
            wide = {k: v for k, v in wide.items() if not names.HEAD_DIM.search(k)}
            entry.update({k: new[k] if v == old[k] else self._width(v, hidden) for k, v in wide.items()})

    def _heads(self, name: str, value: Any, queries: int | None, new: dict[str, Any]) -> Any:
        if isinstance(value, (list, tuple)) and value and names.HEADS.search(name) and all(is_int(v) for v in value):
            if name in new:  # one number for each layer, cut already
                return type(value)(self._query_heads(v) for v in new[name])
            return type(value)(v // math.gcd(*value) for v in value)
        if not is_int(value) or value < 1:
            return None
        if names.GROUPS.search(name):
            return 1 if value == 1 else 2
        if names.KEY_VALUE_HEADS.search(name):
            if value in (1, queries):
                return 1 if value == 1 else self._query_heads(value)
            return max(self._query_heads(queries or value) // 2, 1)
        return self._query_heads(value) if names.HEADS.search(name) else None

    def _query_heads(self, value: int) -> int:
        return self.heads if value >= self.heads else 1 << (value.bit_length() - 1)

    def _hidden(self, part: PretrainedConfig, old: dict[str, Any], new: dict[str, Any], queries: str | None) -> None:
        key = names.find(part, old, *names.HIDDEN)
        if key is None or old[key] < 8:
            return
        hidden = old[key]
        dim = names.find(part, old, "head_dim", "attention_head_size")
        if hidden not in self.known:
            self.known[hidden] = self._new_width(hidden, queries and dim and old[queries] * old[dim], new, queries, dim)
        narrow = new[key] = self.known[hidden]
        dims = [k for k in old if k in new and names.HEAD_DIM.search(k)]
        latent = any(k.startswith("qk_") for k in dims)  # parts of a head, which add up: as they are
        if queries:
            for k in dims:
                times, rest = divmod(old[queries] * old[k], hidden)
                if (
                    not rest
                    and (k == dim or (times > 1 and not latent))
                    and times <= 4
                    and narrow * times % new[queries] == 0
                ):
                    new[k] = narrow * times // new[queries]
        self._inner_heads(old, new, hidden, narrow, dims, queries)

    def _new_width(self, hidden: int, whole: Any, new: dict[str, Any], queries: str | None, dim: str | None) -> int:
        for other, narrow in self.known.items():
            if hidden == 2 * other or other == 2 * hidden:
                return narrow * hidden // other
        if whole and queries and dim:
            product = new[queries] * new[dim]
            return product if whole == hidden else product // 2 if whole > hidden else product * 2
        return next(w for w in _SPARE if w not in self.known.values() and (w >= 64 or hidden not in self.shared))

    def _inner_heads(
        self, old: dict[str, Any], new: dict[str, Any], hidden: int, narrow: int, dims: list[str], queries: str | None
    ) -> None:
        """Heads of other mixers (state space, linear attention): as many as fill the width that they filled."""
        for name, value in old.items():
            if name == queries or not is_int(new.get(name)) or not names.HEADS.search(name) or "key_value" in name:
                continue
            for dim in dims:
                times, rest = divmod(value * old[dim], hidden)
                if not rest and 1 <= times <= 4 and times * narrow % new[dim] == 0 and times * narrow // new[dim] <= 32:
                    new[name] = times * narrow // new[dim]
                    break

    def _products(self, old: dict[str, Any], new: dict[str, Any], hidden: Any) -> dict[int, int]:
        """Widths that are heads times a head dimension, or several outputs of the hidden size."""
        heads = [k for k in old if is_int(old[k]) and is_int(new.get(k)) and names.HEADS.search(k) and old[k] > 1]
        dims = [k for k in old if is_int(old[k]) and is_int(new.get(k)) and names.HEAD_DIM.search(k)]
        found = {old[h] * old[d]: new[h] * new[d] for h in heads for d in dims}
        for name, value in old.items():
            if isinstance(value, (list, tuple)) and value and name in new and hidden in self.known:
                found[hidden * (len(value) + 1)] = self.known[hidden] * (len(new[name]) + 1)  # outputs side by side
        return {v: w for v, w in found.items() if v not in self.known}

    def _width(self, value: int, hidden: int | None) -> int:
        if value in self.known:
            return self.known[value]
        if hidden in self.known:
            narrow = self.known[hidden]
        elif self.known:
            hidden, narrow = next(iter(self.known.items()))
        else:
            hidden, narrow = 1024, 64
        for width, chosen in {hidden: narrow, **self.known}.items():
            times, rest = divmod(value, width)
            if not rest and times <= 16:
                return times * chosen
        return min(4 * narrow, max(8, round(value * narrow / hidden / 8) * 8))

    def _width_list(self, name: str, value: Any, new: dict[str, Any], hidden: int | None) -> Any:
        if name in new:  # one for each layer, cut already
            return type(value)(self._width(v, hidden) for v in new[name])
        unit = math.gcd(*value)
        fits = max(value) // unit <= 16 and not any(v in self.known for v in value)
        return type(value)(v // unit * 8 if fits else self._width(v, hidden) for v in value)

    def _override_dim(
        self, name: str, value: Any, old: dict[str, Any], new: dict[str, Any], shrunk: dict[str, int]
    ) -> Any:
        """What one layer has instead of ``old[name]``: heads and head dimensions; widths follow in ``fill``."""
        if not is_int(value) or name not in new or not is_int(old.get(name)):
            return value
        if names.HEAD_DIM.search(name):
            return (
                next((w for k, w in shrunk.items() if k == f"{name}@{value}"), value)
                if value != old[name]
                else new[name]
            )
        if names.HEADS.search(name) or names.KEY_VALUE_HEADS.search(name):
            return new[name] if value == old[name] else 2 * new[name] if value > old[name] else max(new[name] // 2, 1)
        return value


def _overrides(fields: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    return fields.get("per_layer_config") or {}


def _shrink_dims(dims: dict[str, int], old: dict[str, Any]) -> dict[str, int]:
    """Head dimensions in proportion, so that their sums and halves stay; multiples of 8."""
    if not dims:
        return {}
    unit, largest = math.gcd(*dims.values()), max(dims.values())
    if largest // unit > 8:
        return {k: max(8, round(v / largest * 8) * 8) for k, v in dims.items()}
    step = 16 if largest == unit else 8
    if sections := _sections(old):
        while step * (min(dims.values()) // unit) * _rotary_part(old, dims) < 2 * len(sections):
            step *= 2
    return {k: v // unit * step for k, v in dims.items()}


def _sections(old: dict[str, Any]) -> list[int]:
    rope = old.get("rope_parameters") or {}
    return rope.get("mrope_section") or [] if isinstance(rope, dict) else []


def _rotary_part(old: dict[str, Any], dims: dict[str, int]) -> float:
    rope = old.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor") or old.get("partial_rotary_factor") or 1.0


__all__ = ["Widths"]
