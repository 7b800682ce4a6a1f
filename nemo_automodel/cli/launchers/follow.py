"""Show the output of a Slurm job until it has ended for good, requeues included."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from nemo_automodel.errors import EXIT_FAULT, AutoModelError

_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
_POLL_SECONDS = 1.0


def follow(job: str, log: Path) -> int:
    """Print what is added to ``log`` until ``job`` is over, and return its exit code (128 + n for signal n).

    Raises:
        AutoModelError: Slurm does not know the job any more.
    """
    shown, state, over = 0, "", False
    while not over:
        fields = _job_fields(job)
        over = fields["JobState"] in _OVER
        if fields["JobState"] != state and not over:
            state = fields["JobState"]
            print(f"job {job}: {state.lower()}{_reason(fields)}", file=sys.stderr, flush=True)
        shown = _show(log, shown)
        if not over:
            time.sleep(_POLL_SECONDS)
    time.sleep(_POLL_SECONDS)  # what a shared file system shows late
    _show(log, shown)
    code, signal = (int(number) for number in fields["ExitCode"].split(":"))
    print(f"job {job}: {fields['JobState'].lower()}", file=sys.stderr)
    if code or signal:
        return code or 128 + signal
    return 0 if fields["JobState"] == "COMPLETED" else EXIT_FAULT


def _job_fields(job: str) -> dict[str, str]:
    result = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    fields = dict(re.findall(r"(\w+)=(\S*)", result.stdout))
    if result.returncode or "JobState" not in fields:
        raise AutoModelError(f"Slurm tells no more of job {job}: {result.stderr.strip()}; sacct -j {job} may")
    return fields


def _reason(fields: dict[str, str]) -> str:
    reason = fields.get("Reason", "None")
    return f" ({reason})" if fields["JobState"] == "PENDING" and reason != "None" else ""


def _show(log: Path, shown: int) -> int:
    """Print ``log`` from byte ``shown`` on; returns up to where."""
    try:
        with open(log, "rb") as file:
            file.seek(shown)
            added = file.read()
    except FileNotFoundError:  # not started yet
        return shown
    sys.stdout.buffer.write(added)
    sys.stdout.buffer.flush()
    return shown + len(added)
