"""What of a live model goes into a Hugging Face directory, planned without moving a byte of it.

A plan knows this rank's part of each tensor and how whole tensors become those of the files; ``stream.py`` carries it
out. The parts are the live tensors, or copies on the host (``on_host``), which training does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nemo_automodel.components.checkpoint.shards import Intervals, held, live_tensors, local_of, plain_name

FILE_BYTES = 4 * 10**9
"""About how large a file of weights gets; each is written by one rank."""


@dataclass
class Part:
    """What this rank holds of a tensor, and where in the whole that lies."""

    local: Tensor
    region: tuple[Intervals, ...]
    shape: torch.Size
    dtype: torch.dtype  # that it is sent in
    constant: bool  # training does not change it

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> Part:
        """This rank's part of ``tensor``, to be sent in ``dtype`` (default: its own)."""
        constant = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        return cls(local_of(tensor), held(tensor), tensor.shape, dtype or tensor.dtype, constant)

    def sent(self) -> Tensor:
        """The part as it is sent, on the CPU."""
        return self.local.to(self.dtype).cpu().contiguous()


@dataclass
class Group:
    """Tensors that become one or more of the files' together."""

    parts: dict[str, Part]
    outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # whole tensors on the CPU -> those of the files

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.outputs.values())


@dataclass
class Merge:
    """A weight that is saved with an adapter in it: ``combine(weight, *whole values of tensors)``."""

    tensors: dict[str, Tensor]
    combine: Callable[..., Tensor]


@dataclass
class Export:
    """Everything that the files will hold."""

    files: dict[str, list[Group]] = field(default_factory=dict)
    tied: bool = True  # whether the weights that the model ties are still one
    num_parameters: int = 0

    def on_host(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Have ``copy`` make a host copy of every part that training changes."""
        for groups in self.files.values():
            for group in groups:
                for part in group.parts.values():
                    part.local = part.local if part.constant else copy(part.local)


def plan_export(
    model: Any, dtype: torch.dtype | None, merges: Mapping[str, Merge] | None = None, file_bytes: int = FILE_BYTES
) -> Export:
    """Plan a Hugging Face checkpoint of ``model``, which has our mixin (``export_groups``).

    Args:
        model: The live model, sharded or not; it is not changed.
        dtype: Floating-point parameters are cast to it; None keeps theirs. Buffers, and what the model itself insists
            on keeping in float32, are not cast.
        merges: By name, the weights that are saved with an adapter in them.
        file_bytes: About how large a file gets.
    """
    merges = merges or {}
    adapters = {id(t) for merge in merges.values() for t in merge.tensors.values()}
    live = {name: tensor for name, tensor in live_tensors(model).items() if id(tensor) not in adapters}
    cast = _casts(model, live, dtype)
    meta: dict[Any, Tensor] = {}
    stand_ins = {
        name: meta.setdefault(
            (id(tensor), name if name in merges else ""), torch.empty(tensor.shape, dtype=cast[name], device="meta")
        )
        for name, tensor in live.items()
    }
    export = Export(num_parameters=sum(p.numel() for p in dict.fromkeys(live.values()) if isinstance(p, nn.Parameter)))
    export.tied = len(meta) == len({id(tensor) for tensor in live.values()})
    export_groups = model.export_groups  # not a method of the class that the model is inside
    with as_transformers_class(model):
        groups = [_group(found, live, cast, merges) for found in export_groups(stand_ins)]
    export.files = _files(groups, file_bytes)
    return export


def _files(groups: list[Group], file_bytes: int) -> dict[str, list[Group]]:
    contents: list[list[Group]] = [[]]
    size = 0
    for group in groups:
        if size and size + group.nbytes > file_bytes:
            contents.append([])
            size = 0
        contents[-1].append(group)
        size += group.nbytes
    total = len(contents)
    suffixes = [f"-{i + 1:05d}-of-{total:05d}" if total > 1 else "" for i in range(total)]
    return {f"model{suffix}.safetensors": part for suffix, part in zip(suffixes, contents, strict=True)}


def _group(
    found: Any, live: Mapping[str, Tensor], cast: Mapping[str, torch.dtype], merges: Mapping[str, Merge]
) -> Group:
    mine = {name: merges[name] for name in found.inputs if name in merges}
    parts = {name: Part.of(live[name], None if name in mine else cast[name]) for name in found.inputs}
    for name, merge in mine.items():
        parts |= {f"{name}/{key}": Part.of(tensor) for key, tensor in merge.tensors.items()}

    def convert(whole: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, merge in mine.items():
            whole[name] = merge.combine(whole[name], **{key: whole.pop(f"{name}/{key}") for key in merge.tensors})
        return found.convert({name: whole.pop(name).to(cast[name]) for name in found.inputs})

    return Group(parts, {name: (t.dtype, tuple(t.shape)) for name, t in found.outputs.items()}, convert)


def _casts(model: Any, live: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    fixed = {plain_name(name) for name, _ in model.named_buffers()} | kept_in_float32(model, live, dtype)
    return {
        name: dtype if dtype is not None and tensor.is_floating_point() and name not in fixed else tensor.dtype
        for name, tensor in live.items()
    }


def kept_in_float32(model: nn.Module, names: Mapping[str, Any], dtype: torch.dtype | None) -> set[str]:
    """Those of ``names`` that ``model`` insists on keeping in float32 where it is saved in ``dtype``."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {name for name in names if any(f".{pattern}." in f".{name}." for pattern in patterns)}


@contextmanager
def as_transformers_class(model: Any) -> Iterator[None]:
    """The model as the class transformers defines, so that the class name and remote code saved are its own."""
    ours = type(model)
    model.__class__ = next(c for c in ours.__mro__ if not c.__module__.startswith(("nemo_automodel.", "torch.")))
    config, generation = model.config, getattr(model, "generation_config", None)
    model.config = copy.deepcopy(config)  # save_pretrained writes into it
    try:
        yield
    finally:
        model.__class__, model.config = ours, config
        if generation is not None:
            model.generation_config = generation
