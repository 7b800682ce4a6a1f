"""The values that a certificate's blocks get: those of the model that is about to be trained, a tensor at a time.

A sharded tensor is whole on the device only while it is gathered; every rank takes part, rank 0 keeps it on the host.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class Wanted:
    """One tensor of the live model: what it is called there, and which rows of it are wanted (None: all)."""

    name: str
    rows: Tensor | None = None


def wanted_of(
    small: nn.Module, live: nn.Module, layers: list[tuple[int, list[int]]], rows: Tensor
) -> dict[str, Wanted]:
    """What of ``live`` fills ``small``, by the names in ``small``; what has no counterpart is not among it.

    Args:
        small: one block of each kind, of the same class.
        live: the model, sharded or not.
        layers: of each part, how many layers ``live`` has and which of them are in ``small``.
        rows: for each token of the small vocabulary its number in the whole one.

    Where ``live`` has more of something along the first dimension (experts, positions) the first ones are taken.
    """
    tables = {id(_table(small, getter)) for getter in ("get_input_embeddings", "get_output_embeddings")}
    found: dict[str, Wanted] = {}
    seen: set[int] = set()  # tied ones have one value
    for path, module in small.named_modules():
        for leaf, tensor in _kept_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{path}.{leaf}".removeprefix(".")
            there = _live_name(name, small, live, layers)
            theirs = _find(live, there)
            if theirs is None or theirs.is_meta:
                continue
            pick = _rows(tensor.shape, theirs.shape, rows, id(module) in tables)
            if pick is not False:
                found[name] = Wanted(there, pick)
    return found


def gather(live: nn.Module, wanted: dict[str, Wanted], keep: bool) -> dict[str, Tensor]:
    """The values of ``wanted``, on the host; every rank calls it with the same, those that do not ``keep`` get none.

    Weights in four bits are unpacked; those with copies in FP8 are the ones that the copies are made of. Of an unsharded
    model on the CPU nothing is copied.
    """
    found: dict[str, Tensor] = {}
    for name, one in wanted.items():
        tensor = _find(live, one.name)
        assert tensor is not None
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            found[name] = (tensor if one.rows is None else tensor[one.rows.to(tensor.device)]).cpu()
    return found


@torch.no_grad()
def load(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set the parameters and buffers of ``model`` that are among ``values``."""
    for name, value in values.items():
        target = _find(model, name)
        assert target is not None
        target.copy_(value)


def source_of(model: Any) -> list[Any] | None:
    """What tells one checkpoint from another: its name and commit, or its files' sizes and times. None: fresh weights."""
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        return None
    source = model.__dict__.get("_automodel_source", {}).get("revision")
    files = sorted(path for path in Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return [str(name), source, getattr(model.config, "_commit_hash", None), stats]


def left_fresh(small: nn.Module, values: Collection[str]) -> list[str]:
    """The parameters of ``small`` that are not among ``values``."""
    filled = {id(_find(small, name)) for name in values}
    return [name for name, parameter in small.named_parameters() if id(parameter) not in filled]


def _kept_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters of ``module`` itself, and what else of floating point numbers a checkpoint holds of it."""
    buffers = ((k, v) for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set)
    own = [*module._parameters.items(), *buffers]
    return [(name, tensor) for name, tensor in own if tensor is not None and tensor.is_floating_point()]


def _live_name(name: str, small: nn.Module, live: nn.Module, layers: list[tuple[int, list[int]]]) -> str:
    """``name`` in the whole model: the number of a block is another one there."""
    match = _LAYER.search(name)
    if match is None:
        return name
    path = name[: match.start()]
    try:
        cut, whole = small.get_submodule(path), live.get_submodule(path)
    except AttributeError:
        return name
    if not (isinstance(cut, nn.ModuleList) and isinstance(whole, nn.ModuleList)):
        return name
    kept = next((k for total, k in layers if total == len(whole) and len(k) == len(cut)), list(range(len(cut))))
    return f"{path}.{kept[int(match[1])]}{name[match.end() - 1 :]}"


def _find(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    found = module._parameters.get(leaf)
    if found is None:  # a buffer, or a packed weight, which is unpacked when it is asked for
        found = getattr(module, leaf, None)
    return found if isinstance(found, Tensor) else None


def _rows(small: torch.Size, live: torch.Size, rows: Tensor, is_table: bool) -> Any:
    """Which rows of a tensor shaped ``live`` fill one shaped ``small``: None for all, False where none do."""
    if len(small) == 0 or small[1:] != live[1:] or live[0] < small[0]:
        return None if small == live else False
    if small[0] == len(rows) <= live[0] and (is_table or small != live) and int(rows.max()) < live[0]:
        return rows
    return None if small == live else torch.arange(small[0])


def _table(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


__all__ = ["Wanted", "gather", "left_fresh", "load", "source_of", "wanted_of"]
