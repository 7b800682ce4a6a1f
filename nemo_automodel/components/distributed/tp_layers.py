"""Layers that hold a shard: what a module becomes, in place, under tensor and sequence parallelism.

A module's class is exchanged for a subclass of it (``isinstance`` still holds) whose parameters are *stored* as DTensors,
which FSDP2, checkpoints and optimizers understand, and *seen* by its forward as plain local tensors. So no DTensor is
dispatched, and adapters and kernels need to know nothing of it. Outside a forward that FSDP2 gathered for, an attribute
such as ``.weight`` is the stored parameter; ``_parameters`` always holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from nemo_automodel.components.distributed.tp_collectives import (
    Ranks,
    all_reduce,
    copy_to_ranks,
    exchange_slices,
    gather_from_ranks,
    gather_to_parts,
    reduce_from_ranks,
    scatter_parts,
    split_to_ranks,
)


@dataclass(frozen=True)
class Storage:
    """How one parameter lies among the ranks: cut along ``dim`` (None: whole on each), and what its gradient needs."""

    dim: int | None = None
    parts: tuple[int, ...] | None = None  # sizes of what is fused along ``dim``; each rank computes with 1/R of each
    summed: bool = False  # whole on each rank, but each rank's gradient is a part of it


@dataclass
class Sequence:
    """How the sequence between regions is sharded: by how much the batch under way was filled up.

    That number, not the length: a compiled block is compiled anew for each value that it saw here.
    """

    ranks: Ranks
    filler: int = 0

    def begin(self, x: Tensor) -> Tensor:
        """This rank's part of ``x`` [B, S, H], with which a forward begins."""
        self.filler = -x.shape[1] % self.ranks.size
        return split_to_ranks(self.pad(x), 1, self.ranks)

    def pad(self, x: Tensor) -> Tensor:
        """``x`` [B, S, H] with S filled up to a multiple of the ranks."""
        return F.pad(x, (0, 0, 0, self.filler)) if self.filler else x

    def trim(self, x: Tensor) -> Tensor:
        """``x`` [B, S, H] without that filler."""
        return x[:, : -self.filler].contiguous() if self.filler else x


class Sharded:
    """First of all bases: parameters are local tensors here."""

    tp_ranks: Ranks
    tp_storage: dict[str, Storage]
    tp_sequence: Sequence | None

    def tp_parameter(self, name: str) -> Tensor | None:
        """Parameter ``name`` as forward sees it; a parameter that FSDP2 has sharded is returned as it is."""
        parameter = self._parameters.get(name)  # type: ignore[attr-defined]
        if not _is_here(parameter):
            return parameter
        assert isinstance(parameter, DTensor)
        storage, local = self.tp_storage[name], parameter.to_local()
        if storage.summed:
            return copy_to_ranks(local, self.tp_ranks) if local.requires_grad else local
        if storage.parts is not None and storage.dim is not None:
            return exchange_slices(local, storage.dim, storage.parts, self.tp_ranks)
        return local


class Column(Sharded):
    """A linear layer that makes this rank's share of the output features."""

    tp_gather: bool  # its output is wanted whole
    tp_entered: bool  # a region around it has taken the input in

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in]`` -> ``[..., out / R]``, or whole."""
        if not self.tp_entered:
            x = enter(x, self.tp_ranks, self.tp_sequence)
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return gather_from_ranks(y, -1, self.tp_ranks) if self.tp_gather else y


class Row(Sharded):
    """A linear layer that takes this rank's share of the input features; the ranks' outputs are summed."""

    tp_split: bool  # its input comes whole

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in / R]`` (or whole) -> ``[..., out]``."""
        if self.tp_split:
            x = split_to_ranks(x, -1, self.tp_ranks)
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.tp_sequence is None:
            y = reduce_from_ranks(y, self.tp_ranks)
        else:
            y = scatter_parts(self.tp_sequence.pad(y), 1, self.tp_ranks)
        bias = self.tp_parameter("bias")
        return y if bias is None else y + bias

    def squared_weight_norm(self) -> Tensor:
        """DoRA's squared norm of each row, of which this rank has some columns."""
        return all_reduce(super().squared_weight_norm(), self.tp_ranks)  # type: ignore[misc]


class VocabularyEmbedding(Sharded):
    """An embedding that holds this rank's share of the vocabulary; the ranks' outputs are summed."""

    tp_first: int
    tp_rows: int

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[...]`` -> ``[..., H]``."""
        local = ids - self.tp_first
        held = (local >= 0) & (local < self.tp_rows)
        y = super().forward(torch.where(held, local, 0), *args, **kwargs)  # type: ignore[misc]
        return reduce_from_ranks(y.masked_fill(~held.unsqueeze(-1), 0.0), self.tp_ranks)


class Experts(Sharded):
    """Stacked experts, of each of which this rank holds a share; the ranks' outputs are summed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens and their routing, whole -> what the experts make of them, whole."""
        args = tuple(_copied(value, self.tp_ranks) for value in args)
        kwargs = {name: _copied(value, self.tp_ranks) for name, value in kwargs.items()}
        return reduce_from_ranks(super().forward(*args, **kwargs), self.tp_ranks)  # type: ignore[misc]


class IdentityExpert(Sharded):
    """An expert without weights: as each rank's output is summed, each gives its share."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` -> ``[..., H]``."""
        return super().forward(x) / self.tp_ranks.size  # type: ignore[misc]


class Region(Sharded):
    """A module whose column layers share its input and whose output is its row layer's: it takes the input in once."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        args, kwargs = on_first_tensor(lambda x: enter(x, self.tp_ranks, self.tp_sequence), args, kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class WholeSequence(Sharded):
    """A module between sharded sequences that gets, and gives, the whole one."""

    tp_sequence: Sequence

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, around it ``[B, S / R, H]``."""
        rows = next(value.shape[0] for value in (*args, *kwargs.values()) if _is_hidden(value))
        args, kwargs = on_first_tensor(self._gather, args, kwargs)
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return on_output(lambda x: self._split(x, rows), output)

    def _gather(self, x: Tensor) -> Tensor:
        return self.tp_sequence.trim(gather_from_ranks(x, 1, self.tp_ranks))

    def _split(self, x: Tensor, rows: int) -> Tensor:
        if x.ndim == 2:  # tokens of all rows in one dimension, as routers leave them
            x = x.unflatten(0, (rows, -1))
            return split_to_ranks(self.tp_sequence.pad(x), 1, self.tp_ranks).flatten(0, 1)
        return split_to_ranks(self.tp_sequence.pad(x), 1, self.tp_ranks)


class SequenceBlock(Sharded):
    """A decoder block between whose regions the sequence is sharded: from the first one's input to the last one's output.

    Done around the call, where no compiled code sees it, and every block is of one class: so all share one compilation.
    """

    tp_sequence: Sequence
    tp_first: bool
    tp_last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own call."""
        if self.tp_first:
            args, kwargs = on_first_tensor(self.tp_sequence.begin, args, kwargs)
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        return on_output(self._end, output) if self.tp_last else output

    def _end(self, x: Tensor) -> Tensor:
        return self.tp_sequence.trim(gather_from_ranks(x, 1, self.tp_ranks))


def enter(x: Tensor, ranks: Ranks, sequence: Sequence | None) -> Tensor:
    """``x`` into sharded compute, put together first where its sequence is sharded."""
    if sequence is None:
        return copy_to_ranks(x, ranks) if x.requires_grad else x
    return sequence.trim(gather_to_parts(x, 1, ranks))


def on_first_tensor(change: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments with ``change`` made to the first floating tensor of three dimensions: the hidden states."""
    for i, value in enumerate(args):
        if _is_hidden(value):
            return (*args[:i], change(value), *args[i + 1 :]), kwargs
    for name, value in kwargs.items():
        if _is_hidden(value):
            return args, {**kwargs, name: change(value)}
    return args, kwargs


def on_output(change: Any, output: Any) -> Any:
    """``output`` with ``change`` made to its hidden states: itself, or a tuple's first."""
    if isinstance(output, Tensor):
        return change(output)
    return type(output)((change(output[0]), *output[1:]))


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _copied(value: Any, ranks: Ranks) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
        return copy_to_ranks(value, ranks)
    return value


def become(module: nn.Module, kind: type[Sharded], ranks: Ranks, storage: dict[str, Storage], **settings: Any) -> None:
    """Put ``kind`` before ``module``'s class. Its parameters must be stored as ``storage`` says."""
    module.__class__ = _subclass(type(module), kind, tuple(storage), _hidden_bias(module, kind))
    module.__dict__.setdefault("tp_sequence", None)
    module.__dict__.update(tp_ranks=ranks, tp_storage=storage, **settings)


def _hidden_bias(module: nn.Module, kind: type) -> str | None:
    """How a row layer's bias is kept out of its own forward, to be added once, after the sum."""
    if not issubclass(kind, Row) or module._parameters.get("bias") is None:
        return None
    return "none" if isinstance(module, nn.Linear) else "zeros"


_classes: dict[tuple[Any, ...], type] = {}


def _subclass(cls: type, kind: type, names: tuple[str, ...], hidden_bias: str | None) -> type:
    key = (cls, kind, names, hidden_bias)
    if key not in _classes:  # one class each, so that torch.compile sees the same code in every block
        namespace: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": cls.__module__}
        if not issubclass(cls, Sharded):
            namespace |= {name: _seen(name) for name in names}
        if hidden_bias is not None:
            namespace["bias"] = property(_no_bias if hidden_bias == "none" else _zero_bias)
        _classes[key] = type(cls.__name__, (kind, cls), namespace)
    return _classes[key]


def _seen(name: str) -> property:
    return property(lambda self: self.tp_parameter(name))


def _no_bias(self: Any) -> Tensor | None:
    bias = self._parameters["bias"]
    return None if _is_here(bias) else bias


def _zero_bias(self: Any) -> Tensor | None:
    bias = self._parameters["bias"]
    return torch.zeros_like(bias.to_local(), requires_grad=False) if _is_here(bias) else bias


def _is_here(parameter: Any) -> bool:
    """Whether ``parameter`` is sharded by tensor parallelism alone, not by FSDP2 too."""
    return isinstance(parameter, DTensor) and len(parameter.placements) == 1
