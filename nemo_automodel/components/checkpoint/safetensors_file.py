"""A safetensors file written tensor by tensor, so that none but the one being written takes memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SafetensorsFile:
    """Writes ``path``, whose tensors are known by name, dtype and shape, in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        # the widest first, so that each tensor starts at a multiple of its item size
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            size = prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name], end = end, end + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(tensors)
        self._path = path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` (on the CPU, of the dtype and shape announced) into its place."""
        view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        at, done = self._start + self._offsets[name], 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done : done + 2**30], at + done)
        self._missing.discard(name)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise RuntimeError(
                f"{self._path}: {len(self._missing)} tensors were not written ({min(self._missing)}, ...)"
            )
