"""The weight files of a checkpoint, looked over before anything is loaded from them.

Loaders take a missing shard, a cut-off file or a path that leaves the directory in silence or with a riddle; here
each is named. Only headers are read, so it takes milliseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_automodel._transformers.hub import fetch
from nemo_automodel.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LFS_START = b"version https://git-lfs"
_LARGEST_HEADER = 100 << 20


def check_weight_files(name: str, revision: str | None = None, **options: Any) -> list[Path]:
    """Fetch and check the safetensors files of model ``name`` (a Hub ID or a directory); returns their paths.

    Raises ModelError: no safetensors, an index that leaves the directory or names a missing file, a Git LFS pointer,
    a file cut off, a tensor that the index promises and no file has.
    """
    single = fetch(name, SINGLE, revision, **options)
    if single is not None:
        read_header(single)
        return [single]
    index = fetch(name, INDEX, revision, **options)
    if index is None:
        raise _no_safetensors(name, revision, options)
    paths: dict[str, Path] = {}
    wanted = _weight_map(index)
    for shard in sorted(set(wanted.values())):
        path = fetch(name, shard, revision, **options)
        if path is None:
            raise ModelError(f"{index}: lists {shard}, which is not there; download the missing file again")
        paths[shard] = path
    present = {tensor for path in paths.values() for tensor in read_header(path)}
    absent = sorted(set(wanted) - present)
    if absent:
        raise ModelError(f"{index}: {_some(absent)} in no weight file; the checkpoint is incomplete, download it again")
    return list(paths.values())


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> dtype, shape and offsets of a safetensors file, its size checked against them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_START))
        if start == _LFS_START:
            raise ModelError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in the repository (or `hf download`)"
            )
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ModelError(
                f"{path}: cut off or not a safetensors file ({size} bytes, its header alone says {8 + length}); "
                f"download it again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(f"{path}: not a safetensors file (its header is not JSON); download it again") from error
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != expected:
        raise ModelError(f"{path}: cut off: {size} bytes of {expected}; download it again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a weights index (no weight_map: {error}); download it again") from error
    for shard in names:
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or "\\" in shard
            or not shard.endswith(".safetensors")
        ):
            raise ModelError(
                f"{index}: names {shard!r}, but weight files must be safetensors in the same directory; do not trust "
                f"this checkpoint"
            )
    return weight_map


def _no_safetensors(name: str, revision: str | None, options: dict[str, Any]) -> ModelError:
    if any(fetch(name, pickle, revision, **options) is not None for pickle in _PICKLES[1:]) or _has_bin(
        name, revision, options
    ):
        return ModelError(
            f"model {name} has pickled weights only ({_PICKLES[0]}), which can run code when loaded; convert it where "
            f"you trust it: python -c \"import transformers as t; t.AutoModelForCausalLM.from_pretrained('{name}')"
            f".save_pretrained('converted')\", and point the recipe at that directory"
        )
    return ModelError(f"model {name} has no weights: neither {SINGLE} nor {INDEX} is there")


def _has_bin(name: str, revision: str | None, options: dict[str, Any]) -> bool:
    directory = Path(name)
    if directory.is_dir():
        return any(directory.glob("*.bin"))
    from huggingface_hub import file_exists

    try:
        return file_exists(name, _PICKLES[0], revision=revision, token=options.get("token"))
    except OSError:
        return False


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({shown}{rest})"
