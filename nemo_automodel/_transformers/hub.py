"""Files of a model, from the Hub or a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from nemo_automodel import hub
from nemo_automodel.errors import AutoModelError, ModelError
from nemo_automodel.hub import patiently


def fetch(name: str, filename: str, revision: str | None, **options: Any) -> Path | None:
    """The local path of a repository's or directory's file; None where it has no such file.

    Raises ModelError where the repository cannot be had.
    """
    directory = Path(name)
    if directory.is_dir():
        path = directory / filename
        return path if path.exists() else None
    try:
        return Path(patiently(lambda: hf_hub_download(name, filename, revision=revision, **options), f"model {name}"))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE and _has_commit(name, revision, options):
            return None  # the cache knows this revision: the file is not part of what was downloaded
        raise explain(error, name, revision) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise explain(error, name, revision) from error


def explain(error: BaseException, name: str, revision: str | None = None) -> AutoModelError:
    """The one-line ModelError for ``error``, raised by transformers or huggingface_hub about the repository ``name``."""
    return error if isinstance(error, AutoModelError) else ModelError(hub.explain(error, "model", name, revision))


def _has_commit(name: str, revision: str | None, options: dict[str, Any]) -> bool:
    cache = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    repository = cache / f"models--{name.replace('/', '--')}"
    return (repository / "refs" / (revision or "main")).is_file() or (
        revision is not None and (repository / "snapshots" / revision).is_dir()
    )


__all__ = ["explain", "fetch", "patiently"]
