"""Tensors of all ranks through torch.distributed.checkpoint (DCP), with nothing in the files that could run.

The tensors are safetensors files. DCP's index is a pickle: it is read with an unpickler that knows DCP's own few data
classes and nothing else, and entries that are not tensors, which DCP would unpickle too, are refused.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

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

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the asked-for slices out of the safetensors files into the planner's tensors."""
        per_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise CheckpointError(f"{item.dest_index.fqn} is stored as a pickle, not as a tensor; refused")
            per_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in per_file.items():
            with safe_open(Path(self.path) / name, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_read_slice(file, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_slice(file: Any, item: ReadItem) -> torch.Tensor:
    name = item.storage_index.fqn
    if not item.lengths:  # a scalar has no slices
        return file.get_tensor(name)
    spans = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(name)[tuple(slice(start, start + length) for start, length in spans)]


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
    writer = FileSystemWriter(
        directory, thread_count=threads, overwrite=True, serialization_format=SerializationFormat.SAFETENSORS
    )
    with _single_process_is_fine():
        dcp.save(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))


def load_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, each rank its shards, whatever the number of ranks that saved; every rank calls it."""
    if not tensors:
        return
    with _single_process_is_fine():
        dcp.load(dict(tensors), storage_reader=_Reader(directory), planner=DefaultLoadPlanner(flatten_state_dict=False))


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without the warning that DCP gives where there is no process group: then one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
