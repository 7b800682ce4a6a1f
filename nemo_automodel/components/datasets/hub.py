"""Talk to the Hub: retry what passes by itself, and say in one line what the user can do about the rest."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_FIRST_WAIT = 1.0  # seconds; doubled each time
_PATIENCE = 10.0  # seconds; most calls of huggingface_hub back off by themselves, and then there is no point in more


def with_retries(call: Callable[[], T], what: str) -> T:
    """``call()``, again after 1, 2, 4, 8 seconds while the Hub answers 429 or 5xx or cuts the connection."""
    start, wait = time.monotonic(), _FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:
            if _offline() or not _passes_by_itself(error) or time.monotonic() - start > _PATIENCE:
                raise
            logger.warning("%s: %s; trying again in %.0f s", what, _first_line(error), wait)
        time.sleep(wait)
        wait *= 2


def hub_problem(error: BaseException, what: str, page: str = "") -> str:
    """One line that says what went wrong with ``what`` (e.g. "dataset 'a/b'") and what to do about it.

    Args:
        error: what huggingface_hub, datasets or transformers raised; its causes are looked at too.
        what: how the message names the repository.
        page: the repository's address below the Hub's, for the page where access is asked for ("datasets/a/b").
    """
    chain = list(_causes(error))
    names = {base.__name__ for cause in chain for base in type(cause).__mro__}
    text = " ".join(str(cause) for cause in chain).lower()
    status = next((code for cause in chain if (code := _status(cause)) is not None), None)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if "GatedRepoError" in names or "gated dataset" in text or "gated repo." in text:
        return f"{what} is gated: ask for access at {endpoint}/{page} and log in with `hf auth login` (or set HF_TOKEN)"
    unreached = _passes_by_itself(error) or names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    if status is None and unreached and _offline():
        return (
            f"{what} is not in the local cache and HF_HUB_OFFLINE=1 forbids a download; unset it, or give a local path"
        )
    if "RevisionNotFoundError" in names or ("revision" in text and status == 404):
        return f"{what}: no such revision; see {endpoint}/{page}/tree/main for branches, tags and commits"
    if status == 401 and "RepositoryNotFoundError" not in names:
        return f"{what}: the Hub refused the token (401); log in with `hf auth login` (or set HF_TOKEN)"
    if status == 403:
        return f"{what}: access denied (403); log in with `hf auth login` as a user who may read it"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status == 404:
        return (
            f"{what} was not found: no such local path, and no such repository on the Hub; "
            "check the spelling, and if it is private log in with `hf auth login`"
        )
    if status is not None and (status >= 500 or status == 429):
        return f"{what}: the Hub answers {status}, also when asked again; try again later (what is downloaded so far is kept)"
    if unreached:
        return (
            f"{what}: cannot reach {endpoint}, and it is not in the local cache; "
            "check the network or HF_ENDPOINT, or give a local path"
        )
    return f"{what}: {_first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _passes_by_itself(error: BaseException) -> bool:
    for cause in _causes(error):
        names = {base.__name__ for base in type(cause).__mro__}
        if "OfflineModeIsEnabled" in names:
            return False
        status = _status(cause)
        if status is not None:
            return status == 429 or status >= 500
        if names & {"ConnectionError", "TransportError", "TimeoutException", "IncompleteRead"}:
            return True
    return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
