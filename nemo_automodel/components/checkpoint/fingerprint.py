"""What must not change between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

_MUST_MATCH = (
    "model", "tokenizer", "processor", "freeze", "peft", "dataset", "packed_sequence", "optimizer", "lr_scheduler", "rng.seed",
    "dataloader._target_", "dataloader.shuffle", "dataloader.drop_last",
    "step_scheduler.global_batch_size", "step_scheduler.num_epochs", "step_scheduler.max_steps",
)  # fmt: skip
_FREE = (
    "peft.use_triton",
    "optimizer.fused",
    "optimizer.foreach",
    "optimizer.capturable",
    "optimizer.offload",
    "model.attn_implementation",
    "freeze.cache_features_gb",
)
_PLAN = ("step_scheduler.num_epochs", "step_scheduler.max_steps", "lr_scheduler")
"""How long the run is and how its learning rate goes: what ``checkpoint.extend`` lets change."""
_NOT_WORTH_SAYING = ("checkpoint", "loggers", "dist_env", "certificate")
_ABSENT = "absent"
_OF_VALUE = re.compile(r"(.*\$\{.*) \(value #([0-9a-f]{12})\)", re.DOTALL)


def versions() -> dict[str, str]:
    """The libraries whose update can change numbers."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def as_saved(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """As it reads after a round trip through JSON, so that tuples and lists compare equal.

    Text that refers to the environment, ``${VAR}``, gets a hash of what it stood for (its ``digest``, if it has one).
    """
    content: dict[str, Any] = json.loads(json.dumps(_with_digests(fingerprint), default=str))
    return content


def _with_digests(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_digests(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_digests(item) for item in value]
    digest = getattr(value, "digest", None) if isinstance(value, str) else None
    return value if digest is None else f"{value} (value #{digest})"


@dataclass
class Changes:
    """What differs between a checkpoint's run and this one, a ``key: saved -> live`` line each.

    Attributes:
        forbidden: What keeps this run from resuming.
        plan: What does so too, unless the run is to be extended.
        harmless: What merely changed.
    """

    forbidden: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)


def compare(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Changes:
    """What has changed between the fingerprint of a checkpoint and this run's.

    Both are ``TrainState.fingerprint`` (``config``: the resolved recipe; ``data``: a hash of the data) with
    ``versions`` and ``schedule`` added. Where both know the hash of the data, it alone speaks for the dataset; one
    that starts with ``partial:`` covers not all of it, so that the dataset's configuration must be the same too.
    """
    found = Changes()
    same_data = saved.get("data") is not None and saved.get("data") == live.get("data")
    free = (*_FREE, "dataset") if same_data and not str(live["data"]).startswith("partial:") else _FREE
    for key, old, new in _differences(saved.get("config") or {}, live.get("config") or {}):
        if _under(key, _NOT_WORTH_SAYING):
            continue
        counts = _under(key, _MUST_MATCH) and not _under(key, free)
        into = found.harmless if not counts else found.plan if _under(key, _PLAN) else found.forbidden
        into.append(f"{key}: {old} -> {new}")
    if None not in (saved.get("data"), live.get("data")) and not same_data:
        found.forbidden.append(f"data (content, tokenizer, template and options): {saved['data']} -> {live['data']}")
    follows = bool(found.forbidden or found.plan)  # from what is listed already
    for key, old, new in () if follows else _differences(saved.get("schedule") or {}, live.get("schedule") or {}):
        found.forbidden.append(f"schedule.{key}: {old} -> {new}")
    for key, old, new in _differences(saved.get("versions") or {}, live.get("versions") or {}):
        found.harmless.append(f"{key}: {old} -> {new}")
    return found


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _differences(saved: Any, live: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        for key in {**saved, **live}:
            yield from _differences(
                saved.get(key, _ABSENT), live.get(key, _ABSENT), f"{path}.{key}" if path else str(key)
            )
    elif isinstance(saved, list) and isinstance(live, list) and len(saved) == len(live):
        if any(next(_differences(old, new), None) for old, new in zip(saved, live, strict=True)):
            yield path, saved, live
    elif not _same(saved, live) and not (
        _ABSENT in (saved, live) and None in (saved, live)
    ):  # a later version knows more keys
        yield path, saved, live


def _same(saved: Any, live: Any) -> bool:
    """Whether they are equal; by the values behind ``${VAR}`` where both are known, else as written."""
    if not isinstance(saved, str) or not isinstance(live, str):
        return bool(saved == live)
    old, new = _OF_VALUE.fullmatch(saved), _OF_VALUE.fullmatch(live)
    if old and new:
        return old[2] == new[2]
    return (old[1] if old else saved) == (new[1] if new else live)
