"""Files of a model, from the Hub or a directory, and what to tell the user when they cannot be had.

Downloads are ``huggingface_hub``'s; this adds the waiting out of a server's bad minute, and one-line errors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_automodel.errors import AutoModelError, ModelError

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_FIRST_WAIT_S = 0.5
_PATIENCE_S = 20.0  # huggingface_hub waits by itself for some requests; what took this long is not tried again
_T = TypeVar("_T")


def fetch(name: str, filename: str, revision: str | None, **options: Any) -> Path | None:
    """The local path of a repository's or directory's file; None where it has no such file.

    Raises ModelError where the repository cannot be had.
    """
    directory = Path(name)
    if directory.is_dir():
        path = directory / filename
        return path if path.exists() else None
    try:
        return Path(patiently(lambda: hf_hub_download(name, filename, revision=revision, **options)))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE and _has_commit(name, revision, options):
            return None  # the cache knows this revision: the file is not part of what was downloaded
        raise explain(error, name, revision) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise explain(error, name, revision) from error


def patiently(download: Callable[[], _T]) -> _T:
    """Call ``download``, again after a while (0.5, 1, 2, 4 s) where the server is busy or the connection breaks."""
    wait, start = _FIRST_WAIT_S, time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return download()
        except Exception as error:
            if attempt == _ATTEMPTS or time.monotonic() - start > _PATIENCE_S or not _passing(error):
                raise
            logger.warning("Hub: %s; trying again in %.1f s", _first_line(error), wait)
            time.sleep(wait)
            wait *= 2
    raise AssertionError


def explain(error: BaseException, name: str, revision: str | None = None) -> AutoModelError:
    """The one-line ModelError for ``error``, raised by transformers or huggingface_hub about the repository ``name``."""
    if isinstance(error, AutoModelError):
        return error
    at = name if revision is None else f"{name} (revision {revision})"
    page = f"{constants.ENDPOINT}/{name}"
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return ModelError(
                f"model {at} is gated: accept its licence at {page} with your account, then run `hf auth login` "
                f"(or set HF_TOKEN)"
            )
        if isinstance(cause, DisabledRepoError):
            return ModelError(f"model {at} was disabled on the Hub: {page} says why; choose another model")
        if isinstance(cause, RevisionNotFoundError):
            return ModelError(f"model {name} has no revision {revision!r}: {page}/tree/main lists branches and tags")
        if isinstance(cause, RepositoryNotFoundError):
            return ModelError(
                f"model {name} not found at {constants.ENDPOINT} (404), and there is no such local directory: check "
                f"the spelling; if it is private, run `hf auth login` (or set HF_TOKEN)"
            )
        if isinstance(cause, HFValidationError):
            return ModelError(f"model {name}: no such local directory, and it is no Hub ID either (owner/name)")
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return ModelError(
                f"model {at}: access refused by {constants.ENDPOINT} ({status}); run `hf auth login` with an account "
                f"that may read {page}"
            )
        if isinstance(cause, HfHubHTTPError) and status is not None:
            return ModelError(f"model {at}: {constants.ENDPOINT} answered {status}; try again later")
    return _explain_unreachable(error, name, at)


def _explain_unreachable(error: BaseException, name: str, at: str) -> AutoModelError:
    causes = list(_causes(error))
    if constants.HF_HUB_OFFLINE or any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return ModelError(
            f"model {at} is not in the local cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set: unset it, or "
            f"run `hf download {name}` where there is a network"
        )
    if any(isinstance(c, (ConnectionError, LocalEntryNotFoundError)) or _is_http(c, "TransportError") for c in causes):
        return ModelError(
            f"model {at}: {constants.ENDPOINT} cannot be reached and it is not in the local cache "
            f"({constants.HF_HUB_CACHE}); check the network, or HF_ENDPOINT, or give a local directory"
        )
    return ModelError(f"model {at}: {_first_line(error)}")


def _has_commit(name: str, revision: str | None, options: dict[str, Any]) -> bool:
    cache = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    repository = cache / f"models--{name.replace('/', '--')}"
    return (repository / "refs" / (revision or "main")).is_file() or (
        revision is not None and (repository / "snapshots" / revision).is_dir()
    )


def _passing(error: BaseException) -> bool:
    """Whether the fault may be gone in a moment: 429, 5xx, a broken connection."""
    for cause in _causes(error):
        if isinstance(cause, (OfflineModeIsEnabled, RepositoryNotFoundError, EntryNotFoundError)) and not isinstance(
            cause, LocalEntryNotFoundError
        ):
            return False
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status == 429 or status >= 500
        if _is_http(cause, "TransportError"):
            return not _is_http(cause, "ConnectError")  # nothing listens there: that does not pass
    return "Consistency check failed" in str(error)


def _is_http(error: BaseException, name: str) -> bool:
    """Whether ``error`` is the HTTP client's ``name``; huggingface_hub 1 uses httpx, 2 uses httpx2."""
    return any(cls.__name__ == name and cls.__module__.startswith("httpx") for cls in type(error).__mro__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
