"""What must not change between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
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
    "model.attn_implementation",
    "freeze.cache_features_gb",
)
_NOT_WORTH_SAYING = ("checkpoint", "loggers", "dist_env", "certificate")
_ABSENT = "absent"


def versions() -> dict[str, str]:
    """The libraries whose update can change numbers."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def compare(saved: Mapping[str, Any], live: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What keeps this run from resuming, and what merely changed; one ``key: saved -> live`` line each.

    Both are ``TrainState.fingerprint`` (``config``: the resolved recipe; ``data``: a hash of the data) with
    ``versions`` and ``schedule`` added. Where both know the hash of the data, it alone speaks for the dataset; one
    that starts with ``partial:`` covers not all of it, so that the dataset's configuration must be the same too.
    """
    forbidden: list[str] = []
    harmless: list[str] = []
    same_data = saved.get("data") is not None and saved.get("data") == live.get("data")
    free = (*_FREE, "dataset") if same_data and not str(live["data"]).startswith("partial:") else _FREE
    for key, old, new in _differences(saved.get("config") or {}, live.get("config") or {}):
        line = f"{key}: {old} -> {new}"
        if _under(key, _NOT_WORTH_SAYING):
            continue
        (forbidden if _under(key, _MUST_MATCH) and not _under(key, free) else harmless).append(line)
    if None not in (saved.get("data"), live.get("data")) and not same_data:
        forbidden.append(f"data (content, tokenizer, template and options): {saved['data']} -> {live['data']}")
    planned = _differences(saved.get("schedule") or {}, live.get("schedule") or {})
    for key, old, new in () if forbidden else planned:  # follows from what is listed already
        forbidden.append(f"schedule.{key}: {old} -> {new}")
    for key, old, new in _differences(saved.get("versions") or {}, live.get("versions") or {}):
        harmless.append(f"{key}: {old} -> {new}")
    return forbidden, harmless


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _differences(saved: Any, live: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        for key in {**saved, **live}:
            yield from _differences(
                saved.get(key, _ABSENT), live.get(key, _ABSENT), f"{path}.{key}" if path else str(key)
            )
    elif saved != live and not (_ABSENT in (saved, live) and None in (saved, live)):  # a later version knows more keys
        yield path, saved, live
