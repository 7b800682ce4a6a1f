"""How a run ends: one code and one cause for all ranks, and ``exit_status.json`` beside the run.

A launcher such as torchrun turns every failure into code 1; what started it finds the real one in that file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_automodel.components.distributed import watch
from nemo_automodel.components.distributed.signals import StopSignals
from nemo_automodel.components.distributed.watch import COLLECTIVE, DIED, ERROR, SIGNAL, SILENT, Failure
from nemo_automodel.config import Config
from nemo_automodel.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    AutoModelError,
    DirectoryInUseError,
    OutOfMemory,
    StoppedError,
    Terminated,
    causes,
    first_line,
)

logger = logging.getLogger(__name__)

SAVING_THREAD = "checkpoint"  # that of components.checkpoint.background, which would import torch
EXIT_STATUS = "exit_status.json"
_BY_CODE = {
    EXIT_OK: "done",
    EXIT_BAD_INPUT: "bad_input",
    EXIT_PREEMPTED: "preempted",
    EXIT_INTERRUPTED: "interrupted",
}
_BY_KIND = {DIED: "rank_died", SILENT: "rank_silent", COLLECTIVE: "collective_failed"}
_BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
_GO_ON = "every rank was ended; what was saved before is intact: go on with --checkpoint.restore_from=latest"
_LESS_MEMORY = (
    "write one of these:\n"
    "  step_scheduler.local_batch_size: half of it (the global batch and the order of the data stay the same)\n"
    "  distributed.activation_checkpointing: full\n"
    "  dataset.seq_length, or packed_sequence.packed_sequence_size where rows are packed: less (validation_dataset.seq_length, too)"
)
_NOTHING_YET = "before the first step: there was nothing to save; run the same command again"


def run_to_end(main: Callable[[Config], Any], cfg: Config) -> int:
    """Call ``main(cfg)`` and write how it ended to ``exit_status.json`` in the checkpoint directory.

    Of several ranks that fail, each ends in here or, where its main thread waits for another, in its ``Watch``.

    Returns:
        The exit code: what ``main`` returned, if that is an int.
    """
    directory = Path(getattr(cfg.checkpoint, "checkpoint_dir", None) or "checkpoints").expanduser()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        (directory / EXIT_STATUS).unlink(missing_ok=True)
    watch.on_end = lambda first: _report(directory, first, rank)
    StopSignals(("SIGTERM", "SIGUSR1"))  # until the recipe's own take over
    try:
        result = main(cfg)
    except BaseException as raised:
        error = _out_of_memory(raised) or raised
        own = _describe(error, rank, alone=ranks == 1)
        if ranks == 1:
            _finish_saving()
            _write(directory, own)
            raise error
        _end_together(directory, error, own, rank)
    code = result if isinstance(result, int) else EXIT_OK
    if rank == 0:
        _write(directory, Failure("", "", None, _step(), code))
    return code


def _finish_saving() -> None:
    """Let a checkpoint that is being written in the background be written whole, and say whether it was."""
    for thread in threading.enumerate():
        if thread.name == SAVING_THREAD:
            print("an error: the checkpoint that is being written is finished first", file=sys.stderr, flush=True)
            thread.join()
            if failed := getattr(thread, "error", None):
                print(f"it was not: {failed}", file=sys.stderr, flush=True)


def _end_together(directory: Path, error: BaseException, own: Failure, rank: int) -> None:
    """Learn what failed first on all ranks, say it once, and end this process without waiting for any other."""
    if own.kind == ERROR and not isinstance(error, AutoModelError):
        traceback.print_exception(error)
        _tell_torchrun(error)
    line = watch.current()
    first = own if line is None else line.fail(own)
    _report(directory, first, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(first.exit_code)  # leaving in order would wait for the threads and collectives of ranks that are gone


def _report(directory: Path, first: Failure, rank: int) -> None:
    """Write and print the first failure: rank 0 does, or whoever comes first where rank 0 cannot."""
    written = _write(directory, first)
    rank_0_is_gone = first.rank == 0 and first.kind in (DIED, SILENT)
    if rank != 0 and not (rank_0_is_gone and written):
        return
    after = f" (after step {first.step})" if first.step else ""
    if first.rank is None or first.kind == SIGNAL or (first.kind == ERROR and first.rank == 0):
        text = first.message
    else:
        text = f"rank {first.rank} failed first{after}: {first.message}"
    if first.exit_code == EXIT_FAULT and first.kind != SIGNAL:
        text += f"\n{_GO_ON}"
    print("error: " + text.replace("\n", "\n       "), file=sys.stderr, flush=True)


def _out_of_memory(error: BaseException) -> OutOfMemory | None:
    """What to tell the user where ``error``, or what it was raised from, is torch's of a full device."""
    for cause in causes(error) if isinstance(error, Exception) else ():  # a signal stays one
        if any(kind.__name__ == "OutOfMemoryError" for kind in type(cause).__mro__):  # torch's, not imported for this
            what = ". ".join(first_line(cause).split(". ")[:3])  # how much was asked for, and what is free
            told = OutOfMemory(f"{what}\n{_LESS_MEMORY}")
            told.__cause__ = error
            return told
    return None


def _describe(error: BaseException, rank: int, alone: bool) -> Failure:
    step = _step()
    if isinstance(error, KeyboardInterrupt):
        name = str(error) if isinstance(error, Terminated) else "SIGINT"
        code = EXIT_PREEMPTED if isinstance(error, Terminated) else EXIT_INTERRUPTED
        return Failure(SIGNAL, f"{name} {_NOTHING_YET}", rank, step, code)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAULT if error.code else EXIT_OK
        text = f"the program left early, with {error.code!r}"
        return Failure(ERROR, text, rank, step, code if alone else code or EXIT_FAULT)
    kind = COLLECTIVE if isinstance(error, StoppedError) or any(map(_is_broken_collective, causes(error))) else ERROR
    if isinstance(error, AutoModelError):
        return Failure(kind, str(error), rank, step, error.exit_code, not isinstance(error, DirectoryInUseError))
    return Failure(kind, f"{type(error).__name__}: {error}", rank, step, EXIT_FAULT)


def _is_broken_collective(error: BaseException) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _BROKEN)


def _step() -> int | None:
    line = watch.current()
    return None if line is None else line.step


def _write(directory: Path, failure: Failure) -> bool:
    """Write the file, whole or not at all; returns whether none of this run was there (the first to fail is right)."""
    if not failure.own_directory:
        return False
    run = _run()
    content = {
        "exit_code": failure.exit_code,
        "reason": _BY_KIND.get(failure.kind) or _BY_CODE.get(failure.exit_code, "error"),
        "step": failure.step,
        "rank": failure.rank,
        "message": failure.message or None,
        "time": time.time(),
        "run": run,
    }
    temporary, final = directory / f".{EXIT_STATUS}.{os.getpid()}", directory / EXIT_STATUS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1))
        try:
            os.link(temporary, final)
        except FileExistsError:
            if _run_of(final) == run:
                return False
            os.replace(temporary, final)  # of a run that failed before it found this one saving here
        except OSError:  # a file system without links
            os.replace(temporary, final)
        return True
    except OSError as error:
        logger.warning("%s could not be written: %s", final, error)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _run() -> str:
    """What all ranks of this run have in common, and no other run at this time."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _run_of(file: Path) -> str | None:
    try:
        return json.loads(file.read_text()).get("run")
    except (OSError, ValueError, AttributeError):  # gone, or nothing that a run wrote
        return None


def _tell_torchrun(error: BaseException) -> None:
    """Where torchrun started this rank, its own report names this error too."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
