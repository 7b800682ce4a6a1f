"""Tensors of all ranks through torch.distributed.checkpoint (DCP), with nothing in the files that could run.

DCP's index is a pickle. It is read with an unpickler that knows DCP's own few data classes and nothing else, and
entries that are not tensors, which DCP would unpickle too, are refused.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nemo_automodel.errors import CheckpointError

_INDEX = ".metadata"
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise CheckpointError(
            f"{_INDEX} names {module}.{name}: not the index of tensors that this program writes; refused"
        )


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _TensorPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn} is stored as a pickle, not as a tensor; refused")


def read_index(directory: Path) -> Metadata:
    """DCP's index of ``directory``.

    Raises:
        CheckpointError: It holds anything but the description of tensors.
    """
    with (directory / _INDEX).open("rb") as file:
        try:
            metadata = _DataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory / _INDEX}: not a readable index ({error})") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{directory / _INDEX}: not the index of a checkpoint")
    return metadata


def stored_tensors(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name -> (dtype, global shape) of every tensor in ``directory``."""
    entries = read_index(directory).state_dict_metadata.items()
    return {name: (e.properties.dtype, e.size) for name, e in entries if isinstance(e, TensorStorageMetadata)}


def save_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write sharded and whole tensors; every rank calls it and writes what it holds. Files are fsynced."""
    threads = min(8, os.cpu_count() or 1)
    writer = FileSystemWriter(directory, thread_count=threads, overwrite=True)
    with _single_process_is_fine():
        dcp.save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))


def load_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, each rank its shards, whatever the number of ranks that saved; every rank calls it."""
    if not tensors:
        return
    with _single_process_is_fine():
        dcp.load(dict(tensors), storage_reader=_Reader(directory), planner=_TensorPlanner(flatten_state_dict=False))


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without the warning that DCP gives where there is no process group: then one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
