"""What a run shows while it trains: a live line on a terminal, one plain line now and then in a log file."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

_LAYOUT = {  # by importance: a narrow terminal cuts the end off
    "loss": "loss {:.4f}",
    "val_loss": "val {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "eta": "ETA {}",
    "mem_gib": "{:.2f} GiB",
    "lr": "lr {:.1e}",
    "grad_norm": "grad {:.2f}",
}
_PLAIN_LINES_PER_RUN = 20
_PLAIN_SECONDS = 30.0  # at least one line in this time, however long the run


def format_duration(seconds: float) -> str:
    """``seconds`` as ``45s``, ``12:05`` or ``3:04:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    hours, minutes, secs = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def format_metrics(metrics: Mapping[str, float], eta_seconds: float | None) -> str:
    """The metrics worth a look while waiting, on one line.

    Args:
        metrics: A line of ``metrics.jsonl``; what is absent is left out.
        eta_seconds: Seconds until the last step, or None while unknown.
    """
    shown = {**metrics, "eta": None if eta_seconds is None else format_duration(eta_seconds)}
    return "  ".join(text.format(shown[name]) for name, text in _LAYOUT.items() if shown.get(name) is not None)


class ProgressDisplay:
    """Shows step, loss, tokens/s, ETA, memory and learning rate until ``stop``.

    On a terminal it is one live line, above which everything that the program prints scrolls as usual. Elsewhere
    (a log file, CI, Slurm) it is a plain line at the first and last step, about twenty times a run, and at least
    every thirty seconds.

    Args:
        total_steps: Planned optimizer steps.
        first_step: Steps already done (a resumed run).
        live: Force (True) or forbid (False) the live line. Default: live where stderr is a terminal.
        enabled: False shows nothing at all (ranks other than the first).
    """

    def __init__(self, total_steps: int, first_step: int = 0, live: bool | None = None, enabled: bool = True):
        self.total_steps = total_steps
        self.first_step = first_step
        self.enabled = enabled
        self.console = Console(stderr=True, force_terminal=True if live else None, highlight=False)
        self.live = (self.console.is_terminal if live is None else live) and enabled
        self._val_loss: float | None = None
        self._start_time = time.monotonic()
        self._last_plain_time = self._start_time
        self._bar: Progress | None = None
        if self.live:
            self._open_bar()

    def _open_bar(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True)),
            console=self.console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=self.total_steps, completed=self.first_step, metrics="")
        self._bar.start()
        atexit.register(self.stop)  # an error on the way must not leave the terminal without its cursor

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show ``metrics`` (a line of ``metrics.jsonl``) of optimizer step ``step``."""
        if not self.enabled:
            return
        now = time.monotonic()
        done = step - self.first_step
        eta = (now - self._start_time) / done * (self.total_steps - step) if done > 0 else None
        shown = {**metrics, **({"val_loss": self._val_loss} if self._val_loss is not None else {})}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=format_metrics(shown, eta))
        elif self._plain_line_due(step, now):
            self._last_plain_time = now
            self.print(f"step {step}/{self.total_steps}  {format_metrics(shown, eta)}")

    def validation(self, val_loss: float) -> None:
        """Keep ``val_loss`` in view from now on."""
        self._val_loss = val_loss

    def print(self, line: str) -> None:
        """Print ``line`` above the live line, or as it is where there is none."""
        if self.enabled:
            sys.stdout.flush()  # keeps the order where both streams go to one file
            self.console.print(line, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the last state of the live line on the screen; harmless when repeated."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.stop)

    def _plain_line_due(self, step: int, now: float) -> bool:
        every = max(1, self.total_steps // _PLAIN_LINES_PER_RUN)
        at_an_end = step == self.first_step + 1 or step == self.total_steps
        return at_an_end or step % every == 0 or now - self._last_plain_time >= _PLAIN_SECONDS
