"""Loading a sharded model: each rank reads its own slices of the checkpoint, through transformers' own conversion.

Tensors that the conversion only renames are read slice by slice, straight into place. What it stacks (experts) is read
for this rank's experts only; what it rearranges otherwise is made whole, one group at a time, and cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat, meta
from nemo_automodel._transformers.compat import TensorGroup
from nemo_automodel._transformers.loading import require_complete
from nemo_automodel._transformers.weight_slices import Stored, pieces, same, stored_tensors, whole
from nemo_automodel.components._peft.export import is_adapter_tensor
from nemo_automodel.components._peft.linear import clean_name
from nemo_automodel.components.checkpoint.shards import count, held, keep, local_of, take
from nemo_automodel.components.quantization.nf4 import Nf4Linear
from nemo_automodel.errors import AutoModelError, ModelError


@dataclass
class Checkpoint:
    """The weights of model ``name`` in ``files``, to be loaded once the model is sharded.

    Made from the model while it is whole, on the meta device and of its own class.
    """

    name: str
    stored: dict[str, Stored]
    conversions: list[Any]

    @classmethod
    def of(cls, model: PreTrainedModel, name: str, files: list[Path], key_mapping: Any = None) -> Checkpoint:
        """Read the headers of ``files``; raises ModelError for a file that cannot be read."""
        return cls(name, stored_tensors(files), compat.conversions_of(model, key_mapping))

    def untied(self, model: PreTrainedModel) -> str | None:
        """The name of a tensor that ``model`` ties and the checkpoint has with other values than what it is tied to."""
        for target, source in compat.tied_names(model).items():
            both = self.stored.get(target), self.stored.get(source)
            if both[0] is not None and both[1] is not None and not same(both[0], both[1]):
                return target
        return None

    def fill(self, model: PreTrainedModel, device: torch.device, offload: bool = False) -> None:
        """Give ``model`` memory on ``device`` (weights on the CPU under ``offload``) and load it; every rank calls it.

        Raises ModelError, on every rank the same: the checkpoint is not the model's, or damaged.
        """
        meta.materialize(model, device, torch.device("cpu") if offload else device)
        meta.set_buffers(model, device)
        _same_on_all_ranks(lambda: self._load(model, device))

    @torch.no_grad()
    def _load(self, model: PreTrainedModel, device: torch.device) -> None:
        live = {clean_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        expected = {name: t for name, t in live.items() if isinstance(t, Tensor) and not is_adapter_tensor(name)}
        packed = {f"{clean_name(name)}.weight": m for name, m in model.named_modules() if isinstance(m, Nf4Linear)}
        expected |= {name: layer.placeholder() for name, layer in packed.items()}
        groups, unexpected = compat.group_tensors(model, self.conversions, self.stored, expected)
        mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
        done: set[int] = set()
        for group in groups:
            for name, tensor, shape in self._load_group(model, group, expected, device):
                done.add(id(expected[name]))
                if shape != tuple(tensor.shape):
                    mismatched.add((name, shape, tuple(tensor.shape)))
                elif not bool(torch.isfinite(local_of(tensor).sum(dtype=_summed_in(tensor)))):
                    _require_finite(self.name, name, tensor)
                if name in packed and shape == tuple(tensor.shape):
                    packed[name].quantize(tensor)
        compat.remember_conversions(model, self.conversions)
        missing = {name for name, tensor in expected.items() if id(tensor) not in done}
        missing, unexpected = compat.really_missing(model, missing, unexpected)
        info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
        require_complete(self.name, info, model)

    def _load_group(
        self, model: PreTrainedModel, group: TensorGroup, expected: Mapping[str, Tensor], device: torch.device
    ) -> Iterable[tuple[str, Tensor, tuple[int, ...]]]:
        """Load what ``group`` gives: the name and tensor of each in the model, and its shape in the checkpoint."""
        first = _with_memory(expected[group.target], device)
        if group.renames_only:
            stored = self.stored[group.sources[-1][0]]
            if stored.shape == tuple(first.shape):
                _copy(first, stored)
            return [(group.target, first, stored.shape)]
        if group.stacks_first_dim and all(n == len(first) for n in _slices(group)):
            return [(group.target, first, self._load_stacked(model, group, first))]
        converted = self._convert(model, group, first, lambda index: True)
        found = []
        for name, value in converted.items():
            if name not in expected:
                raise ModelError(f"model {self.name}: its tensors give {name}, which the model does not have")
            tensor = first if name == group.target else _with_memory(expected[name], device)
            if value.shape == tensor.shape:
                keep(tensor, value)
            found.append((name, tensor, tuple(value.shape)))
        return found

    def _load_stacked(self, model: PreTrainedModel, group: TensorGroup, tensor: Tensor) -> tuple[int, ...]:
        """Load a stack of slices, this rank's only; returns the whole's shape."""
        rows, *others = held(tensor)
        if not count(rows):
            return tuple(tensor.shape)
        mine = {index for start, stop in rows for index in range(start, stop)}
        (value,) = self._convert(model, group, tensor, mine.__contains__).values()
        shape = (len(tensor), *value.shape[1:])
        if shape == tuple(tensor.shape):
            for dim, intervals in enumerate(others, start=1):
                value = take(value, dim, intervals)
            local_of(tensor).copy_(value)
        return shape

    def _convert(self, model: PreTrainedModel, group: TensorGroup, like: Tensor, wanted: Any) -> dict[str, Tensor]:
        """What transformers makes of those slices of ``group`` (numbered within their pattern) that are ``wanted``."""
        number: dict[str, int] = {}
        seen: dict[str, int] = {}
        for name, pattern in group.sources:
            number[name] = seen[pattern] = seen.get(pattern, -1) + 1

        def read(name: str) -> Tensor | None:
            if not wanted(number[name]):
                return None
            return whole(self.stored[name]).to(local_of(like).device).to(like.dtype)

        try:
            return group.convert(model, read)
        except AutoModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model {self.name}: {group.target} cannot be made of its {len(group.sources)} tensors "
                f"({group.sources[0][0]}, ...): {type(error).__name__}: {error}"
            ) from error


def _slices(group: TensorGroup) -> list[int]:
    """How many slices each pattern of ``group`` has."""
    patterns = [pattern for _, pattern in group.sources]
    return [patterns.count(pattern) for pattern in dict.fromkeys(patterns)]


def _copy(tensor: Tensor, stored: Stored) -> None:
    local = local_of(tensor)
    for row, piece in pieces(stored, held(tensor), pinned=local.is_cuda):
        (local.narrow(0, row, len(piece)) if piece.ndim else local).copy_(piece)


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, or, for one that is packed as soon as it is loaded, the room for it until then."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor


def _summed_in(tensor: Tensor) -> torch.dtype | None:
    return torch.float32 if tensor.is_floating_point() else None


def _require_finite(checkpoint: str, name: str, tensor: Tensor) -> None:
    if not torch.isfinite(local_of(tensor)).all():  # a sum can overflow where no number is infinite
        raise ModelError(f"model {checkpoint}: tensor {name} holds NaN or infinity; the checkpoint is damaged")


def _same_on_all_ranks(step: Any) -> None:
    """Run ``step``; where it raises on one rank, every rank raises that rank's error."""
    error: AutoModelError | None = None
    try:
        step()
    except AutoModelError as raised:
        error = raised
    errors = [error]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise error or first
