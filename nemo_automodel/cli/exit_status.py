"""How a run ended, as it says itself in ``exit_status.json``: torchrun and ``srun`` only know that some rank failed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

FILE_NAME = "exit_status.json"


class ExitStatus:
    """Reads the ``exit_status.json`` that a run writes into its checkpoint directory when it ends.

    What lies there already is an earlier run's; it is told from the new one by its bytes, not by clocks, which
    differ between machines.

    Args:
        directory: The run's checkpoint directory; None where the recipe has none.
    """

    def __init__(self, directory: str | Path | None):
        self._path = Path(directory).expanduser() / FILE_NAME if directory else None
        self._before = self._bytes()

    def read(self, seconds: float = 0) -> dict[str, Any] | None:
        """What the run has written since this object was made; None where it has not within ``seconds``."""
        deadline = time.monotonic() + seconds
        while (status := self._new()) is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return status

    def _new(self) -> dict[str, Any] | None:
        content = self._bytes()
        if content is None or content == self._before:
            return None
        try:
            status = json.loads(content)
        except ValueError:  # not a whole one yet
            return None
        return status if isinstance(status, dict) and isinstance(status.get("exit_code"), int) else None

    def _bytes(self) -> bytes | None:
        try:
            return self._path.read_bytes() if self._path else None
        except OSError:
            return None
