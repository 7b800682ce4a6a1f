"""The errors a user can meet. Each prints as one message (what, where, what to write instead), never a traceback.

Exit codes: 0 done; 1 a fault of the program or the machine; 2 bad input, found before anything is lost;
75 (``EX_TEMPFAIL``) preempted and saved, run again to continue; 130 interrupted (Ctrl-C) before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C (its name is the argument) before the first step: nothing to save, run again."""


class AutoModelError(Exception):
    """Base of every error with a message meant for the user; ``exit_code`` is what the command returns."""

    exit_code = EXIT_FAULT


class ConfigError(AutoModelError):
    """A mistake in the YAML, an override or a command line (``file:line key=value: problem; fix``)."""

    exit_code = EXIT_BAD_INPUT


class DataError(AutoModelError):
    """A dataset that cannot be read or cannot be trained on; names the file, the row or the column."""

    exit_code = EXIT_BAD_INPUT


class ModelError(AutoModelError):
    """A model or tokenizer that cannot be found, loaded or adapted; names the repository, tensor or module."""

    exit_code = EXIT_BAD_INPUT


class CheckpointError(AutoModelError):
    """A checkpoint that cannot be written, or that is damaged or does not belong to this run."""

    exit_code = EXIT_FAULT


class IncompatibleCheckpointError(CheckpointError):
    """A sound checkpoint of another run than the recipe describes; nothing was changed."""

    exit_code = EXIT_BAD_INPUT


class DirectoryInUseError(ConfigError):
    """Another run saves in this one's checkpoint directory, so nothing there is touched."""


class StoppedError(AutoModelError):
    """This rank ends only because another one failed, which says why."""


class NonFiniteError(AutoModelError):
    """A loss or a gradient is NaN or infinite; names the step and the rows. The state before that step, if any, is saved."""


class OutOfMemory(AutoModelError):
    """A device had too little memory for the run; names the settings that need less of it."""


class MissingExtraError(AutoModelError):
    """An optional dependency is not installed; the message names the extra to install."""

    exit_code = EXIT_BAD_INPUT


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error``, what it was raised from, or else what was being handled, and so on: each once, for they may form a ring."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, of 200 letters at most; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
