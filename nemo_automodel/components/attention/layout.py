"""What is known of the batch that a forward runs on, said once outside the model instead of read from its tensors.

transformers would find padding and packing out of ``attention_mask`` and ``position_ids`` on the device, at the price
of a synchronisation per forward and a dense [S, S] mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_automodel.types import ContextLayout


@dataclass(frozen=True)
class BlockMask:
    """A mask that is causal, or within one block of tokens (an image's), all of it within the last ``window`` keys."""

    ids: Tensor
    """[B, S] the block that a token is in, negative for none."""
    window: int | None = None


@dataclass(frozen=True)
class Layout:
    """Rows that are causal from their first token on: right padded, or packed documents."""

    cu_seqlens: Tensor | None = None
    """[D+1] int32 boundaries of the packed documents; None: one document a row."""
    windows_as_argument: bool = False
    """The model hands ``sliding_window`` to its attention function, so that a mask need not say it."""
    documents_as_argument: bool = True
    """The model hands ``cu_seq_lens_q`` on to its attention function; else the mask says where documents end."""
    context: ContextLayout | None = None
    """The rows are this rank's chunks of longer ones; None: they are whole."""
    read_blocks: Callable[[Callable[..., Any]], BlockMask | None] | None = None
    """Tells whether a mask function is a ``BlockMask``, and which; None: nobody can tell."""


_CURRENT: ContextVar[Layout | None] = ContextVar("nemo_automodel_layout", default=None)
_last_context: ContextLayout | None = None  # of the latest announcement, over or not


def current_layout() -> Layout | None:
    """The layout announced for the forward in progress, if any."""
    return _CURRENT.get()


def current_context() -> ContextLayout | None:
    """The sequence sharding of the forward in progress, or of the latest one where backward recomputes a part of it."""
    if _last_context is None:  # a plain global, so that compiled blocks without context parallelism only guard on it
        return None
    layout = _CURRENT.get()
    if layout is not None:
        return layout.context
    recomputing = torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks
    return _last_context if recomputing else None


@contextmanager
def announce(layout: Layout | None) -> Iterator[None]:
    """Say what the batch of the forward inside is; None says nothing."""
    global _last_context
    if layout is not None or _CURRENT.get() is None:
        _last_context = layout.context if layout is not None else None
    if layout is None:
        yield
        return
    token = _CURRENT.set(layout)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def unannounced() -> Iterator[None]:
    """What runs inside has another sequence than the announced one: a tower beside the language model."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)
