"""The lines of the coverage table: one architecture's cells, each "yes" or the reason why not."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nemo_automodel.errors import AutoModelError

COLUMNS = ("twin", "load", "sft", "save", "lora", "adapter", "fused", "attention", "packing", "fsdp2", "tp2")
REQUIRED = ("twin", "load", "sft", "save", "lora", "adapter")
YES = "yes"
THEIRS = ("PEFT itself", "transformers itself")
"""How a reason begins where there is nothing to compare with, because the other side does not do it either."""
LATER = "not measured"


@dataclass
class Row:
    """One architecture's line of the table: for each column "yes" or why not."""

    model_type: str
    kind: str  # causal or vlm
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(COLUMNS, ""))
    seconds: float = 0.0
    blind: bool = False  # a vision-language type whose registered class takes no images

    @property
    def trains_plainly(self) -> bool:
        """Whether plain transformers trains the twin: what it does not, nothing here can be compared with."""
        return self.cells["twin"] == YES

    @property
    def wrong(self) -> dict[str, str]:
        """The cells that must be "yes" and are not, those left out that the other side fails in too."""
        return {c: text for c in REQUIRED if (text := self.cells[c]) not in (YES, "") and not text.startswith(THEIRS)}

    @property
    def theirs(self) -> bool:
        """Whether PEFT or transformers itself fails in some cell that must be "yes"."""
        return any(self.cells[column].startswith(THEIRS) for column in REQUIRED)


class Differs(Exception):
    """Ours and plain transformers do not agree; the message says in what and by how much."""


def attempt(stage: Callable[[], None]) -> str:
    """The cell that ``stage`` earns: "yes" where it returns, else the first of what it raises."""
    torch.manual_seed(0)
    try:
        stage()
    except (Differs, AutoModelError) as error:
        return one_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
    return YES


def one_line(error: object) -> str:
    """A message on one line, of at most 300 letters, without the names of temporary directories."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w+", "<directory>", str(error))
    return " ".join(text.split())[:300]


__all__ = ["COLUMNS", "LATER", "REQUIRED", "THEIRS", "YES", "Differs", "Row", "attempt", "one_line"]
