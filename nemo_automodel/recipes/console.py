"""What a recipe's run puts on the screen besides its progress: the package's own messages, and no library's bars."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # read by what is imported later
_SWITCHES = (
    ("huggingface_hub.utils", "disable_progress_bars"),
    ("datasets", "disable_progress_bars"),
    ("transformers.utils.logging", "disable_progress_bar"),
)


class _Stderr(logging.Handler):
    """Prints to what ``sys.stderr`` is at that moment: a live display replaces it, to keep its line below."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            sys.stdout.flush()  # keeps the order where both streams go to one file
            print(prefix + self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def messages_shown() -> Iterator[None]:
    """Show the package's messages while a recipe runs: all but debugging on rank 0, errors on the others.

    Only this package's logger is touched, and not where someone has given it a handler already.
    """
    ours = logging.getLogger("nemo_automodel")
    if ours.handlers:
        yield
        return
    before, handler = (ours.level, ours.propagate), _Stderr()
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if _is_main() else logging.ERROR)
    ours.propagate = False  # a handler of the root logger would say it all again
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]


def quiet_bars() -> None:
    """Turn the libraries' progress bars off where no terminal shows them; a user's own variables go before this."""
    if (_is_main() and sys.stderr.isatty()) or any(variable in os.environ for variable in _VARIABLES):
        return
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    for module, function in _SWITCHES:
        if module in sys.modules:
            getattr(sys.modules[module], function)()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
