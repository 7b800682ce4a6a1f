"""Python state as JSON, with its tensors aside: exact, and nothing that runs when it is read."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np
import torch

from nemo_automodel.errors import CheckpointError

_KIND = "__kind__"
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "deque": deque}


def encode(value: Any, tensors: dict[str, torch.Tensor], key: str) -> Any:
    """``value`` as JSON-able data; its tensors go into ``tensors`` under names that start with ``key``.

    Floats survive to the last bit (JSON text of a float64 is exact), and so do tuples, sets, counters, NumPy arrays
    and dictionaries with keys that are not strings.

    Raises:
        CheckpointError: Something else is inside (a function, an object); the message names where.
    """
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {_KIND: "ndarray", "value": encode(torch.from_numpy(np.ascontiguousarray(value)), tensors, key)}
    if isinstance(value, torch.Tensor):
        tensors[key] = value.detach()
        return {_KIND: "tensor", "value": key}
    if isinstance(value, list):
        return [encode(item, tensors, f"{key}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return _encode_dict(value, tensors, key)
    for kind, class_ in _SEQUENCES.items():
        if isinstance(value, class_):
            return {_KIND: kind, "value": encode(list(value), tensors, key)}
    raise CheckpointError(
        f"state {key!r} is a {type(value).__name__}, which cannot be saved without pickle; "
        "return numbers, strings, lists, dictionaries and tensors from state_dict()"
    )


def _encode_dict(value: dict[Any, Any], tensors: dict[str, torch.Tensor], key: str) -> Any:
    counter = isinstance(value, Counter)
    if not counter and all(isinstance(name, str) for name in value) and _KIND not in value:
        return {name: encode(item, tensors, f"{key}.{name}") for name, item in value.items()}
    pairs = [
        [encode(name, tensors, f"{key}.keys"), encode(item, tensors, f"{key}.{name}")] for name, item in value.items()
    ]
    return {_KIND: "counter" if counter else "dict", "value": pairs}


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What ``encode`` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {name: decode(item, tensors) for name, item in value.items()}
    kind, content = value[_KIND], value["value"]
    if kind == "tensor":
        return tensors[content]
    if kind == "ndarray":
        return decode(content, tensors).numpy()
    if kind in ("dict", "counter"):
        pairs = {decode(name, tensors): decode(item, tensors) for name, item in content}
        return Counter(pairs) if kind == "counter" else pairs
    return _SEQUENCES[kind](decode(content, tensors))
