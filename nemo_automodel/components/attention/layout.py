"""What is known of the batch that a forward runs on, said once outside the model instead of read from its tensors.

transformers would find padding and packing out of ``attention_mask`` and ``position_ids`` on the device, at the price
of a synchronisation per forward and a dense [S, S] mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows that are causal from their first token on: right padded, or packed documents."""

    cu_seqlens: Tensor | None = None
    """[D+1] int32 boundaries of the packed documents; None: one document a row."""
    windows_as_argument: bool = False
    """The model hands ``sliding_window`` to its attention function, so that a mask need not say it."""
    documents_as_argument: bool = True
    """The model hands ``cu_seq_lens_q`` on to its attention function; else the mask says where documents end."""


_CURRENT: ContextVar[Layout | None] = ContextVar("nemo_automodel_layout", default=None)


def current_layout() -> Layout | None:
    """The layout announced for the forward in progress, if any."""
    return _CURRENT.get()


@contextmanager
def announce(layout: Layout | None) -> Iterator[None]:
    """Say what the batch of the forward inside is; None says nothing."""
    if layout is None:
        yield
        return
    token = _CURRENT.set(layout)
    try:
        yield
    finally:
        _CURRENT.reset(token)
