"""Parts of tensors out of safetensors files, read from the disk and not mapped: only what is asked for takes memory.

For a GPU several threads read a piece, into pinned memory that is used again for the next: one thread that copies from the
page cache into fresh pages is far slower than a disk of today.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from nemo_automodel._transformers.weight_files import read_header
from nemo_automodel.components.checkpoint.shards import Intervals, count, take
from nemo_automodel.errors import ModelError

PIECE_BYTES = 32 << 20
"""How much is read at a time."""

_PART_BYTES = 4 << 20
"""What one thread of several reads of it."""

_THREADS = 4

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``offset`` is the byte of the file at which it starts."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def stored_tensors(paths: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of the safetensors files ``paths`` by name; raises ModelError for a kind that torch does not have."""
    found: dict[str, Stored] = {}
    for path in paths:
        entries = read_header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in entries.items():
            if entry["dtype"] not in _DTYPES:
                raise ModelError(
                    f"{path}: tensor {name} holds numbers of type {entry['dtype']}, which torch cannot read"
                )
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if prod(shape) * dtype.itemsize != entry["data_offsets"][1] - entry["data_offsets"][0]:
                raise ModelError(f"{path}: tensor {name} has not the bytes of its shape; download it again")
            found[name] = Stored(path, dtype, shape, start + entry["data_offsets"][0])
    return found


def pieces(stored: Stored, region: Sequence[Intervals], pinned: bool = False) -> Iterator[tuple[int, Tensor]]:
    """The part ``region`` (intervals along each dimension) of ``stored``, as (its first row, rows) of limited size.

    Rows count from the start of the part. Tensors are on the CPU, in ``pinned`` memory where that is asked for.
    """
    if not stored.shape:
        yield 0, _read(stored, 0, 1).reshape(())
        return
    row_bytes = prod(stored.shape[1:]) * stored.dtype.itemsize
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    done = 0
    for start, stop in region[0] if count(region[0]) and row_bytes else ():
        for first in range(start, stop, step):
            rows = min(step, stop - first)
            piece = _read(stored, first, rows, pinned)
            for dim, intervals in enumerate(region[1:], start=1):
                piece = take(piece, dim, intervals)
            yield done, piece
            done += rows


def whole(stored: Stored) -> Tensor:
    """All of ``stored``, on the CPU."""
    return _read(stored, 0, stored.shape[0] if stored.shape else 1).reshape(stored.shape)


def same(first: Stored, second: Stored) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    region = [((0, size),) for size in first.shape]
    both = zip(pieces(first, region), pieces(second, region), strict=True)
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for (_, a), (_, b) in both
    )


def _read(stored: Stored, first_row: int, rows: int, pinned: bool = False) -> Tensor:
    inner = stored.shape[1:]
    row_bytes = prod(inner) * stored.dtype.itemsize
    buffer = torch.empty(rows * row_bytes, dtype=torch.uint8, pin_memory=pinned)
    view, offset = memoryview(buffer.numpy().data), stored.offset + first_row * row_bytes
    starts = range(0, len(view), _PART_BYTES)
    descriptor = os.open(stored.path, os.O_RDONLY)
    try:
        parts = [(view[start : start + _PART_BYTES], offset + start) for start in starts]
        with ThreadPoolExecutor(_THREADS) as pool:  # of its own: threads that were kept would not live on in a fork
            run = pool.map if pinned and len(parts) > 1 else map
            complete = all(list(run(lambda part: _fill(descriptor, *part), parts)))
    finally:
        os.close(descriptor)
    if not complete:
        raise ModelError(f"{stored.path}: cut off while it was read; download it again")
    return buffer.view(stored.dtype).reshape(rows, *inner)


def _fill(descriptor: int, view: memoryview, offset: int) -> bool:
    """Read ``view`` full from ``offset`` on; False where the file ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if not got:
            return False
        done += got
    return True
