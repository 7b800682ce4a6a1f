"""Tensors of all ranks through torch.distributed.checkpoint (DCP), with nothing in the files that could run.

DCP plans who writes and reads which slice; the slices are in safetensors files and the index of them in JSON. (DCP's own
writer pickles both, and an error in one of its threads leaves tensors out in silence.)
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_automodel.errors import CheckpointError

_FILE_BYTES = 2**29
"""About how much goes into one file, and so how much host memory a save takes beside the tensors themselves."""
_INDEX = "index.json"


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

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on one rank: of every tensor its dtype, its size and where its slices are."""
        files = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{name} is not a tensor")
            slices = [
                {"offsets": list(c.offsets), "sizes": list(c.sizes), "file": files.get(MetadataIndex(name, c.offsets))}
                for c in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "size": list(entry.size), "slices": slices}
        (Path(self.path) / _INDEX).write_text(json.dumps(tensors))


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
    """The index of ``directory``, as DCP wants it.

    Raises:
        CheckpointError: It is missing, or is not the description of tensors that is written here.
    """
    path = directory / _INDEX
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    try:
        for name, entry in json.loads(path.read_text()).items():
            slices = [ChunkStorageMetadata(torch.Size(s["offsets"]), torch.Size(s["sizes"])) for s in entry["slices"]]
            properties = TensorProperties(dtype=_dtype(entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), slices)
            files |= {MetadataIndex(name, s["offsets"]): s["file"] for s in entry["slices"]}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable index of tensors ({error})") from error
    return Metadata(tensors, storage_data=files)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return dtype


def stored_tensors(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name -> (dtype, global shape) of every tensor in ``directory``."""
    entries = read_index(directory).state_dict_metadata.items()
    return {name: (e.properties.dtype, e.size) for name, e in entries if isinstance(e, TensorStorageMetadata)}


def save_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], group: Any = None) -> None:
    """Write sharded and whole tensors; every rank calls it and writes what it holds. ``group``: what ranks agree through."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with _single_process_is_fine():
        dcp.save(dict(tensors), storage_writer=_Writer(directory), planner=planner, process_group=group)


def load_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, each rank its shards, whatever the number of ranks that saved; every rank calls it."""
    if not tensors:
        return
    with _single_process_is_fine():
        dcp.load(dict(tensors), storage_reader=_Reader(directory), planner=DefaultLoadPlanner(flatten_state_dict=False))


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Without the warning that DCP gives where there is no process group: then one process is what is meant."""
    if dist.is_available() and dist.is_initialized():
        yield  # and warnings, which are the whole process's, stay as they are while another thread trains
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
