"""Which documents share a packed row: a pure function of their lengths, in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_automodel.errors import DataError


@dataclass
class PackedSequence:
    """The ``packed_sequence`` section.

    Args:
        packed_sequence_size: tokens in a packed row; 0 (default) = no packing, rows are padded instead.
        overlong: what to do with a document longer than a packed row, which is never split: "error" (default), or
            "drop" it (the loader reports how many).
    """

    packed_sequence_size: int = 0
    overlong: str = "error"

    def __post_init__(self) -> None:
        if self.packed_sequence_size < 0:
            raise DataError(
                f"packed_sequence.packed_sequence_size={self.packed_sequence_size}: must be a number of tokens, or 0 for no packing"
            )
        if self.overlong not in ("error", "drop"):
            raise DataError(f'packed_sequence.overlong={self.overlong!r}: write "error" or "drop"')


def pack(order: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Fill rows of ``size`` tokens with whole documents, greedily and in order (next-fit).

    Args:
        order: document indices, in the order in which they are to be trained on.
        lengths: tokens of each document, indexed by document.
        size: tokens in a packed row.

    Returns:
        The packs, each a list of document indices; every index of ``order`` occurs exactly once.

    Raises:
        DataError: a document is longer than ``size``.
    """
    packs: list[list[int]] = []
    current: list[int] = []
    room = size
    for index in order:
        length = lengths[index]
        if length > room:
            if length > size:
                raise DataError(f"row {index} has {length} tokens, more than a packed row of {size}")
            packs.append(current)
            current, room = [], size
        current.append(index)
        room -= length
    if current:
        packs.append(current)
    return packs


def without_overlong(lengths: Sequence[int], packing: PackedSequence) -> list[int]:
    """The documents that fit into a packed row, in dataset order; raises DataError where ``overlong`` is "error"."""
    size = packing.packed_sequence_size
    kept = [index for index, length in enumerate(lengths) if length <= size]
    overlong = len(lengths) - len(kept)
    if overlong and packing.overlong == "error":
        raise DataError(
            f"{overlong} of {len(lengths)} rows are longer than packed_sequence.packed_sequence_size={size} "
            f"(the longest has {max(lengths)} tokens); set dataset.seq_length={size} to truncate them, "
            "packed_sequence.overlong=drop to leave them out, or a larger packed_sequence_size"
        )
    return kept
