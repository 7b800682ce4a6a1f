"""Features of a frozen vision tower, kept in host memory once they are computed (``freeze.cache_features_gb``).

The tower runs for one row at a time. So its features are a function of the row alone, whoever shares its micro-batch: what
a resumed run computes anew is what the interrupted one had kept, to the bit, and nothing has to be known of how a model lays
them out. That rows one by one are worth the whole micro-batch is tried first, for each tower; where they are not, the model
goes on as it is. Only what the model reads of a tower's output is kept, which is found out in the first micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from nemo_automodel._transformers.parts import frozen_towers
from nemo_automodel.types import Batch, RowImages

logger = logging.getLogger(__name__)

_GIB = 2**30
_SLAB = 2**30  # bytes of host memory taken at once; page-locked memory is rounded up to powers of two
_ALIGNED = 256
_PLAIN = (type(None), bool, int, float, str, torch.dtype)
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class TowerCache:
    """Serves ``towers`` from what they returned for a row before; does nothing without towers.

    Args:
        towers: frozen modules of a model by name, as ``frozen_towers`` finds them.
        limit_gb: GiB of host memory that features may take.
        rows: rows of the training data.
    """

    def __init__(self, towers: dict[str, nn.Module], limit_gb: float = 0.0, rows: int = 0) -> None:
        self._towers, self._rows, self._limit = towers, rows, int(limit_gb * _GIB)
        self._held: dict[Hashable, _Held] = {}
        self._new: dict[Hashable, _Held] = {}  # of this micro-batch, on the device
        self._read: dict[str, set[int]] = {name: set() for name in towers}
        self._tried = dict.fromkeys(towers, 0)  # rows in the trial, up to 2
        self._measured = False
        self._memory: _HostMemory | None = None

    @contextmanager
    def serve(self, batch: Batch) -> Iterator[None]:
        """Let the forward of ``batch``, a micro-batch of the training data, take features from here."""
        rows = dict(zip(batch.get("sample_ids", []), batch.get("image_rows", []), strict=False))
        if "image_rows" in batch and not any(count for row in rows.values() for count in row.entries.values()):
            yield  # only filler has an image
            return
        self._new.clear()
        with ExitStack() as stack:
            for name, tower in self._towers.items():
                call = _Call(name, tower, tower.forward, rows, {k: v.shape for k, v in batch.items() if isinstance(v, Tensor)})  # fmt: skip
                stack.enter_context(_forward_replaced(tower, partial(self._forward, call)))
            yield
        self._keep(len(rows))

    def _forward(self, call: _Call, *args: Any, **kwargs: Any) -> Any:
        """In place of a tower's forward."""
        if not self._towers:
            return call.forward(*args, **kwargs)
        try:
            return self._features(call, args, kwargs)
        except _Unfit as reason:
            self._give_up(str(reason))
            return call.forward(*args, **kwargs)

    def _features(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts, signature = _by_row(call, args, kwargs)
        on_trial = min(len(parts), 2) > self._tried[call.name]
        with _undone(call.tower) if on_trial else nullcontext():
            found = [self._of_row((call.name, row, signature), call, row, inputs) for row, inputs in parts.items()]
            leaves, spec = _joined(found), found[0].spec
            if on_trial:
                _require_equal(call.whole(args, kwargs), (leaves, spec))
        if on_trial:
            self._tried[call.name] = min(len(parts), 2)

        def read(i: int) -> Tensor:
            self._read[call.name].add(i)
            return cast(Tensor, leaves[i])

        def computed(i: int) -> Tensor:
            return cast(Tensor, call.whole(args, kwargs)[0][i])

        for i, leaf in enumerate(leaves):
            if leaf is _NOT_HELD:
                leaves[i] = _Watched.of(torch.empty(0), partial(computed, i))
        if not self._measured:
            leaves_read = [
                _Watched.of(x, partial(read, i)) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)
            ]
            return tree_unflatten(leaves_read, spec)
        return tree_unflatten(leaves, spec)

    def _of_row(self, key: Hashable, call: _Call, row: int, inputs: _Inputs) -> _Held:
        """What the tower returns for ``row`` alone, on the device."""
        checksum = call.rows[row].checksum
        held = self._held.get(key)
        if held is None:
            leaves, spec = call.whole(*inputs)
            held = _Held(checksum, self._wanted(call.name, leaves) if self._measured else leaves, spec)
            if key in self._new and not _same(self._new[key], held):
                raise _Unfit("it runs more than once for a row")
            self._new[key] = held
            return held
        if held.checksum != checksum:
            raise _Unfit(f"the images of row {row} are others than they were before (a random transform?)")
        device = next(call.tower.parameters()).device
        on_device = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in held.leaves]
        return _Held(checksum, on_device, held.spec)

    def _wanted(self, name: str, leaves: list[Any]) -> list[Any]:
        """``leaves`` of the tower ``name``, without the tensors that the model does not read."""
        read = self._read[name]
        return [x if i in read or not isinstance(x, Tensor) else _NOT_HELD for i, x in enumerate(leaves)]

    def _keep(self, rows: int) -> None:
        """Copy what is new of a micro-batch of ``rows`` rows to the host, behind what the device is doing."""
        if not self._towers or not self._new:
            return
        if not self._measured:
            self._measured = True
            for (name, *_), new in cast("dict[tuple[str], _Held]", self._new).items():
                new.leaves = self._wanted(name, new.leaves)
            if not self._fits(rows):
                return
        assert self._memory is not None
        for key, new in self._new.items():
            leaves = self._memory.copies(new.leaves)
            if leaves is not None:
                self._held[key] = _Held(new.checksum, leaves, new.spec)
        self._new.clear()

    def _fits(self, rows: int) -> bool:
        """Whether all rows' features will, judged by those of the first micro-batch, of ``rows`` rows."""
        tensors = [leaf for new in self._new.values() for leaf in new.leaves if isinstance(leaf, Tensor)]
        each = sum(map(_slot, tensors)) / rows
        said = f"{self._rows:,} rows of {each / 2**20:,.2f} MiB are {self._rows * each / _GIB:,.2f} GiB"
        if self._rows * each > self._limit:
            self._give_up(f"{said}, more than the {self._limit / _GIB:g} GiB it allows")
            return False
        logger.info("features of %s are kept in host memory: %s", ", ".join(self._towers), said)
        self._memory = _HostMemory(self._limit, pinned=bool(tensors) and tensors[0].is_cuda)
        return True

    def _give_up(self, reason: str) -> None:
        self._towers, self._memory = {}, None
        self._held.clear()
        self._new.clear()
        logger.warning(
            "freeze.cache_features_gb: the vision tower's features are computed anew in every epoch, because %s", reason
        )


def cache_tower(model: nn.Module, freeze: Any, rows: int) -> TowerCache:
    """The cache that ``freeze.cache_features_gb`` asks for; one that does nothing where it asks for none.

    Args:
        model: as it will be trained.
        freeze: what the recipe's section makes, a ``Freeze`` or one of the user's own.
        rows: rows of the training data.

    Raises:
        ConfigError: a tower is trained.
    """
    limit_gb = getattr(freeze, "cache_features_gb", None)
    if limit_gb is None:
        return TowerCache({})
    towers, reason = frozen_towers(model)
    cache = TowerCache(towers, limit_gb, rows)
    if reason is not None:
        cache._give_up(reason)
    return cache


class _Unfit(Exception):
    """The features of a tower cannot be kept; the message says why."""


_NOT_HELD = object()
"""Stands for a tensor of a tower's output that the model does not read."""


@dataclass
class _Held:
    """What a tower returned for one row: its tensors and what is between them."""

    checksum: int
    leaves: list[Any]
    spec: TreeSpec


@dataclass
class _Call:
    """A tower and the micro-batch that it is called for."""

    name: str
    tower: nn.Module
    forward: Callable[..., Any]
    rows: dict[int, RowImages]
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the batch's tensors

    @torch.no_grad()
    def whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
        """What the tower itself returns: leaves and structure."""
        leaves, spec = tree_flatten(self.forward(*args, **kwargs))
        return [x.contiguous() if isinstance(x, Tensor) else x for x in leaves], spec

    def counts(self, value: Tensor) -> tuple[int, ...]:
        """How many entries of ``value`` each row has, by its length and that of the batch's inputs."""
        names = dict.fromkeys(name for row in self.rows.values() for name in row.entries)
        by_name = {name: tuple(row.entries.get(name, 0) for row in self.rows.values()) for name in names}
        fitting = {name: n for name, n in by_name.items() if value.ndim and sum(n) == len(value) > 0}
        same = {n for name, n in fitting.items() if self.shapes.get(name) == value.shape} or {*fitting.values()}
        if len(same) != 1:
            raise _Unfit(f"what goes into it, of shape {list(value.shape)}, does not say which part is whose row's")
        return same.pop()


def _by_row(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[int, _Inputs], Hashable]:
    """The inputs of a tower's call for each row alone that has some, and what else they depend on: padding, options."""
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    cut: dict[Any, Sequence[Any]] = {}
    signature: list[Hashable] = []
    having: set[tuple[bool, ...]] = set()
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise _Unfit("its input wants a gradient")
            counts = call.counts(value)
            cut[name] = value.split(list(counts))
            having.add(tuple(count > 0 for count in counts))
            signature.append((name, tuple(value.shape[1:]), value.dtype))
        elif isinstance(value, _PLAIN):
            cut[name] = [value] * len(call.rows)
            signature.append((name, value))
        else:
            raise _Unfit(f"its argument {name!r} is a {type(value).__name__}, which may be of several rows")
    if len(having) != 1:
        raise _Unfit("its inputs are not all of the same rows")
    parts = {}
    for i, (row, has) in enumerate(zip(call.rows, having.pop(), strict=True)):
        if has:
            parts[row] = (tuple(cut[at][i] for at in range(len(args))), {name: cut[name][i] for name in kwargs})
    return parts, tuple(signature)


def _joined(found: Sequence[_Held]) -> list[Any]:
    """Rows' outputs one after the other."""
    if any(held.spec != found[0].spec for held in found):
        raise _Unfit("it returns something else for other rows")
    return [_join(values) for values in zip(*(held.leaves for held in found), strict=True)]


def _join(values: tuple[Any, ...]) -> Any:
    first = values[0]
    if any(value is _NOT_HELD for value in values):
        return _NOT_HELD
    if not all(isinstance(value, Tensor) for value in values):
        if not isinstance(first, _PLAIN) or any(type(value) is not type(first) or value != first for value in values):
            raise _Unfit("it returns more than tensors")
        return first
    if len(values) == 1:
        return first
    if first.ndim == 0 or any(value.shape[1:] != first.shape[1:] for value in values):
        raise _Unfit("what it returns for a row depends on the row in shape")
    return torch.cat(values)


def _same(one: _Held, other: _Held) -> bool:
    tensors = [pair for pair in zip(one.leaves, other.leaves, strict=False) if all(isinstance(x, Tensor) for x in pair)]
    return one.spec == other.spec and all(torch.equal(a, b) for a, b in tensors)


def _require_equal(whole: tuple[list[Any], TreeSpec], rows: tuple[list[Any], TreeSpec]) -> None:
    """``rows``, put together, are what the tower returns for all of them at once, but for rounding."""
    if whole[1] != rows[1]:
        raise _Unfit("it returns something else for a row alone")
    for all_at_once, one_by_one in zip(whole[0], rows[0], strict=True):
        if not isinstance(all_at_once, Tensor) or one_by_one is _NOT_HELD:
            continue
        if all_at_once.shape != one_by_one.shape:
            raise _Unfit("what it returns does not lie row after row")
        # 1e-5 in float32, 3% in bfloat16: sums of another order, through every layer of a tower
        tolerance = 1e-5 if all_at_once.dtype in (torch.float32, torch.float64) else 4 * torch.finfo(all_at_once.dtype).eps  # fmt: skip
        gap = torch.linalg.vector_norm(all_at_once.double() - one_by_one.double())
        size = torch.linalg.vector_norm(all_at_once.double())
        if not bool(gap <= tolerance * size):
            raise _Unfit(
                f"it gives a row other features beside other rows (apart by {float(gap / size):.1e} of their size), "
                "or other ones each time"
            )


@contextmanager
def _undone(tower: nn.Module) -> Iterator[None]:
    """Run ``tower`` without leaving a trace of it: random numbers drawn, buffers changed (which makes it unfit)."""
    for module in tower.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training:
            raise _Unfit(f"it has dropout of {module.p:g}")
    buffers = [(buffer, buffer.clone()) for buffer in tower.buffers()]
    device = next(tower.parameters()).device
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        try:
            yield
            changed = any(not torch.equal(now, before) for now, before in buffers)
        finally:
            for now, before in buffers:
                now.copy_(before)
    if changed:
        raise _Unfit("it changes its buffers in training")


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class _Watched(Tensor):
    """A tensor that is fetched when something is computed from it, and so tells that it is read."""

    fetch: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor, fetch: Callable[[], Tensor]) -> _Watched:
        watched = tensor.as_subclass(cls)
        watched.fetch = fetch
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fetched = tree_map(lambda x: x.fetch() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*fetched[0], **fetched[1])


class _HostMemory:
    """Room for tensors in a few large pieces of host memory, page-locked where a GPU copies to it.

    Copies are made in the order of the device's stream and read back in it alone, so that none is waited for.
    """

    def __init__(self, limit: int, pinned: bool) -> None:
        self._limit, self._pinned, self._used = limit, pinned, 0
        self._slab, self._at, self._full = torch.empty(0, dtype=torch.uint8), 0, False

    def copies(self, leaves: list[Any]) -> list[Any] | None:
        """``leaves`` with their tensors here; None where there is no room for all of them."""
        needed = sum(_slot(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        if self._used + needed > self._limit:
            if not self._full:
                logger.warning(
                    "freeze.cache_features_gb: %.2f GiB are full, since later rows have larger features than the first; "
                    "those of further rows are computed anew",
                    self._limit / _GIB,
                )
            self._full = True
            return None
        self._used += needed
        return [self._copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def _copy(self, tensor: Tensor) -> Tensor:
        size = _slot(tensor)
        if self._at + size > len(self._slab):
            self._slab = torch.empty(max(size, min(_SLAB, self._limit)), dtype=torch.uint8, pin_memory=self._pinned)
            self._at = 0
        place = self._slab[self._at : self._at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._at += size
        return place.copy_(tensor, non_blocking=True)


def _slot(tensor: Tensor) -> int:
    """Bytes that ``tensor`` takes, so that the next begins where any dtype may."""
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED


__all__ = ["TowerCache", "cache_tower"]
