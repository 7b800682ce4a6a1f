"""Tensors of all ranks through torch.distributed.checkpoint (DCP), with nothing in the files that could run.

DCP plans who writes and reads which slice; the slices are in safetensors files. (Its own writer pickles each tensor, and
an error in one of its threads leaves tensors out in silence.) DCP's index is a pickle: it is read with an unpickler that
knows DCP's own few data classes and nothing else.
"""

from __future__ import annotations

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
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_automodel.errors import CheckpointError

_FILE_BYTES = 2**29
"""About how much goes into one file, and so how much host memory a save takes beside the tensors themselves."""
_INDEX = ".metadata"
_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
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


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's slices, file by file; where each went is remembered by the file's name."""
        results = []
        for number, items in enumerate(_portions(plan.items)):
            name = f"{plan.storage_data.prefix}{number}.safetensors"
            tensors = {_key(item.index): _on_cpu(planner.resolve_data(item)) for item in items}
            save_file(tensors, Path(self.path) / name)
            results += [WriteResult(i.index, tensors[_key(i.index)].nbytes, storage_data=name) for i in items]
        return _done(results)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the slices asked for out of the files into the planner's tensors."""
        per_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            per_file[self.storage_data[item.storage_index]].append(item)
        for name, items in per_file.items():
            with safe_open(Path(self.path) / Path(name).name, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_read_slice(file, item))
                    planner.commit_tensor(item, target)
        return _done(None)


def _portions(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    portion: list[WriteItem] = []
    size = 0
    for item in items:
        if item.tensor_data is None:
            raise CheckpointError(f"{item.index.fqn} is not a tensor")
        item_bytes = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if portion and size + item_bytes > _FILE_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(item)
        size += item_bytes
    if portion:
        yield portion


def _key(index: MetadataIndex) -> str:
    """One rank can hold several slices of a tensor: the name in the file tells them apart."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _on_cpu(tensor: Any) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()  # safetensors refuses views that share memory


def _read_slice(file: Any, item: ReadItem) -> torch.Tensor:
    name = _key(item.storage_index)
    if not item.lengths:  # a scalar has no slices
        return file.get_tensor(name)
    spans = zip(item.storage_offsets, item.lengths, strict=True)
    return file.get_slice(name)[tuple(slice(start, start + length) for start, length in spans)]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


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
    """Write sharded and whole tensors; every rank calls it and writes what it holds."""
    with _single_process_is_fine():
        dcp.save(dict(tensors), storage_writer=_Writer(directory), planner=DefaultSavePlanner(flatten_state_dict=False))


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
