"""Certificates that were made before: one small file for each combination of model, versions and recipe."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn

import nemo_automodel
from nemo_automodel._transformers.stack import Stack

logger = logging.getLogger(__name__)

_FORMAT = 2


def default_directory() -> Path:
    """Beside the Hub's cache: ``$HF_HOME/nemo_automodel/certificates``."""
    return Path(constants.HF_HOME) / "nemo_automodel" / "certificates"


def key_of(
    cls: type,
    config: Any,
    stack: Stack,
    device: torch.device,
    dtype: torch.dtype,
    buffers: dict[str, Tensor],
    tried: dict[str, Any],
) -> str:
    """A hash of everything that a certificate depends on: two runs with the same one share it.

    ``tried`` is what it is tried on: which documents, and the weights of which checkpoint.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "name_or_path")}
    parts = {
        "format": _FORMAT,
        "class": [f"{cls.__module__}.{cls.__qualname__}", _file_hash(_file_of(cls))],
        "config": fields,
        "stack": _described(stack),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "dtype": str(dtype),
        "buffers": {name: _tensor_hash(buffer) for name, buffer in buffers.items()},
        "tried": tried,
        "versions": versions(),
        "interpreted": os.environ.get("TRITON_INTERPRET", "0"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """What a certificate was made with; ``source`` is a hash of this package's code."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "none"
    return {**found, "source": _source()}


def load(directory: Path, key: str) -> dict[str, Any] | None:
    """The record stored under ``key``; None where there is none, or none that can be read."""
    try:
        record = json.loads((directory / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def store(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path`` in one piece; where that cannot be done, it is said and training goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.info("certificate: not written to %s (%s)", path, error)


def free_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the model computes itself and no checkpoint holds (rotary frequencies, ...), outside of its layers."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if any(part.isdecimal() for part in path.split(".")):
            continue
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                found[f"{path}.{name}".removeprefix(".")] = buffer
    return found


def _described(stack: Stack) -> Any:
    adapters = stack.adapters and {
        **vars(stack.adapters), "names": sorted(stack.adapters.names), "stacked": sorted(stack.adapters.stacked)
    }  # fmt: skip
    loss = type(stack.loss_fn)
    described: dict[str, Any] = {**vars(stack), "adapters": adapters}
    described["loss_fn"] = [f"{loss.__module__}.{loss.__qualname__}", _file_hash(_file_of(loss))]
    described["loss_fn"].append(repr(sorted(getattr(stack.loss_fn, "__dict__", {}).items(), key=str)))
    return described


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except TypeError:
        return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _file_hash(path: str | None) -> str:
    try:
        return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def _tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


@cache
def _source() -> str:
    digest = hashlib.sha256()
    root = Path(nemo_automodel.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


__all__ = ["default_directory", "free_buffers", "key_of", "load", "store", "versions"]
