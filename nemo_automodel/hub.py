"""What is loaded from the Hub: waiting out its bad minutes, and one line for the user where it cannot be had.

Errors are told apart by the names of their classes: huggingface_hub, its HTTP client, datasets and transformers each
wrap the others', under names that stay when modules move. Nothing heavy is imported before something goes wrong.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from nemo_automodel.errors import causes

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5
_PATIENCE_S = 20.0  # huggingface_hub waits by itself for some requests; what took this long is not tried again
_LASTING = {"OfflineModeIsEnabled", "RepositoryNotFoundError", "ConnectError"}  # nothing listens: that does not pass
_PASSING = {"ConnectionError", "TransportError", "IncompleteRead"}
_UNREACHED = _PASSING | {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def patiently(download: Callable[[], _T], what: str = "Hub") -> _T:
    """Call ``download``, again after a while (0.5, 1, 2, 4 s) where the server is busy or the connection breaks.

    Args:
        download: What to call.
        what: What is loaded, for the warning ("dataset a/b").
    """
    wait, start = _FIRST_WAIT_S, time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return download()
        except Exception as error:
            if attempt == _ATTEMPTS or time.monotonic() - start > _PATIENCE_S or not _passing(error):
                raise
            logger.warning("%s: %s; trying again in %.1f s", what, _first_line(error), wait)
            time.sleep(wait)
            wait *= 2
    raise AssertionError


def explain(error: BaseException, kind: str, name: str, revision: str | None = None) -> str:
    """One line that says why something cannot be loaded, and what to do about it.

    Args:
        error: What huggingface_hub, datasets or transformers raised; its causes are looked at too.
        kind: What is loaded: ``model``, ``tokenizer`` or ``dataset``.
        name: Its Hub ID.
        revision: The branch, tag or commit asked for.
    """
    from huggingface_hub import constants

    what = f"{kind} {name}"
    at = what if revision is None else f"{what} (revision {revision})"
    endpoint = constants.ENDPOINT
    page = f"{endpoint}/datasets/{name}" if kind == "dataset" else f"{endpoint}/{name}"
    names, status = _names(error), _status(error)
    text = " ".join(str(cause) for cause in causes(error)).lower()
    if "GatedRepoError" in names or "gated dataset" in text or "gated repo." in text:
        return (
            f"{at} is gated: accept its licence at {page} with your account, then run `hf auth login` (or set HF_TOKEN)"
        )
    if "DisabledRepoError" in names:
        return f"{at} was disabled on the Hub: {page} says why; choose another {kind}"
    if "RevisionNotFoundError" in names:
        return f"{what} has no revision {revision!r}: {page}/tree/main lists branches and tags"
    if "RepositoryNotFoundError" in names:
        return (
            f"{what} not found at {endpoint} (404), and there is no such local directory: check the spelling; if it is "
            f"private, run `hf auth login` (or set HF_TOKEN)"
        )
    if "HFValidationError" in names:
        seen_from = "" if os.path.isabs(name) else f" (relative to {os.getcwd()})"
        return f"{what}: no such local directory{seen_from}, and it is no Hub ID either (owner/name)"
    if status in (401, 403):
        return (
            f"{at}: access refused by {endpoint} ({status}); run `hf auth login` with an account that may read {page}"
        )
    if status is not None:
        return f"{at}: {endpoint} answered {status}; try again later (what is downloaded so far is kept)"
    if (_is_offline() and names & _UNREACHED) or "OfflineModeIsEnabled" in names:
        repository = f"{name} --repo-type dataset" if kind == "dataset" else name
        return (
            f"{at} is not in the local cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set: unset it, or run "
            f"`hf download {repository}` where there is a network"
        )
    if names & _UNREACHED:
        return (
            f"{at}: {endpoint} cannot be reached and it is not in the local cache ({constants.HF_HUB_CACHE}); check the "
            f"network, or HF_ENDPOINT, or give a local directory"
        )
    if "DatasetNotFoundError" in names:
        return (
            f"{what} not found at {endpoint}, and there is no such local directory: check the spelling; if it is "
            f"private, run `hf auth login` (or set HF_TOKEN)"
        )
    return f"{at}: {_first_line(error)}"


def _passing(error: BaseException) -> bool:
    """Whether the fault may be gone in a moment: 429, 5xx, a broken connection."""
    names, status = _names(error), _status(error)
    if names & _LASTING or _is_offline() or ("EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names):
        return False
    if status is not None:
        return status == 429 or status >= 500
    return bool(names & _PASSING) or "Consistency check failed" in str(error)


def _is_offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _names(error: BaseException) -> set[str]:
    return {base.__name__ for cause in causes(error) for base in type(cause).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status of the first cause that has one."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes(error))
    return next((status for status in found if status is not None), None)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
