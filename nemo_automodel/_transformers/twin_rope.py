"""Rotary settings of a tiny twin: lists that have an entry for each pair of rotated dimensions, cut to fewer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.twin_fields import is_int


def fit_rope(part: PretrainedConfig, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Set the rotary dicts of one part in ``new`` to fit its new head dimension."""
    before, after = _head_dim(part, old, old), _head_dim(part, old, {**old, **new})
    if not before or not after or before == after:
        return
    for name, value in old.items():
        if isinstance(value, dict) and name.startswith("rope_"):
            new[name] = _fit(value, after / before)
        elif name == "mrope_section" and value:
            new[name] = _share(value, after / before)


def _fit(rope: dict[str, Any], ratio: float) -> dict[str, Any]:
    fitted = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            fitted[name] = _fit(value, ratio)
        elif name == "mrope_section" and value:
            fitted[name] = _share(value, ratio)
        elif name.endswith("_factor") and isinstance(value, (list, tuple)):
            fitted[name] = value[: max(1, round(len(value) * ratio))]
    return fitted


def _share(sections: Any, ratio: float) -> Any:
    """``sections`` with the sum scaled by ``ratio``, each at least 1; equal ones stay equal where that can be."""
    total = max(round(sum(sections) * ratio), sum(s > 0 for s in sections))
    shares = [max(int(s * ratio), int(s > 0)) for s in sections]
    single = [i for i, s in enumerate(sections) if sections.count(s) == 1] or [0]
    while (left := total - sum(shares)) != 0:
        fits = left > 0 or shares[single[0]] > 1
        shares[single[0] if fits else shares.index(max(shares))] += 1 if left > 0 else -1
    return type(sections)(shares)


def _head_dim(part: PretrainedConfig, old: dict[str, Any], values: dict[str, Any]) -> int | None:
    for name in ("qk_rope_head_dim", names.find(part, old, "head_dim")):
        if name and is_int(values.get(name)) and values[name] > 0:
            return values[name]
    hidden, heads = names.find(part, old, *names.HIDDEN), names.find(part, old, "num_attention_heads", "num_heads")
    return values[hidden] // values[heads] if hidden and heads else None


__all__ = ["fit_rope"]
