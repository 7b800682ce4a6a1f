"""Directories that are complete or absent: write aside, fsync, seal with checksums, rename, then move the pointer.

A directory being written has a hidden name (``.tmp-``); one being replaced is set aside (``.old-``) and one being
removed is renamed first (``.trash-``), so whatever carries a checkpoint's name was whole once. What happened to it
since is for ``damage`` to find. Another run's checkpoint of the same name is kept under ``<name>.<time it was written>``,
which no run takes for its own. Order among checkpoints is a counter kept in their manifests, never a clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint.ranks import Ranks

MANIFEST = "manifest.json"
POINTERS = LATEST, BEST = "LATEST", "BEST"
_NAME = re.compile(r"epoch_(\d+)_step_(\d+)")
_KEPT = re.compile(_NAME.pattern + r"\.[\d.-]+")
_TMP, _OLD, _TRASH = ".tmp-", ".old-", ".trash-"


@dataclass(frozen=True)
class Found:
    """A directory with a checkpoint's name; ``sequence`` counts the saves of its parent (-1: manifest unreadable)."""

    path: Path
    epoch: int
    step: int
    sequence: int
    run: str

    @property
    def name(self) -> str:
        """The directory's own name, ``epoch_E_step_S``."""
        return self.path.name


def find_checkpoints(root: Path) -> list[Found]:
    """What carries a checkpoint's name under ``root``, the latest saved first; says nothing about damage."""
    if not root.is_dir():
        return []
    found = [_found(path) for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    unreadable = float("inf")  # first, so that its damage is reported rather than passed over
    return sorted(found, key=lambda f: (f.sequence if f.sequence >= 0 else unreadable, f.epoch, f.step), reverse=True)


def found_at(path: Path) -> Found | None:
    """The checkpoint that ``path`` is, one kept from an earlier run included; None if it is none."""
    named = _NAME.fullmatch(path.name) or _KEPT.fullmatch(path.name)
    return _found(path) if named and path.is_dir() else None


def _found(path: Path) -> Found:
    match = _NAME.match(path.name)
    epoch, step = map(int, match.groups()) if match else (0, 0)
    try:
        manifest = read_manifest(path)
    except ValueError:
        return Found(path, epoch, step, -1, "")
    return Found(path, epoch, step, int(manifest.get("sequence", 0)), str(manifest.get("run", "")))


def temporary_directory(root: Path, name: str) -> Path:
    """A fresh hidden directory beside where ``name`` will be published, on the same file system."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{_TMP}{name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def seal(directory: Path, meta: Mapping[str, Any], ranks: Ranks) -> None:
    """Fsync everything in ``directory`` and write its manifest; the hashing is spread over the ranks.

    Args:
        directory: Every file in it is complete on disk or in the page cache.
        meta: JSON-able entries for the manifest (``sequence``, ``run``, ...).
        ranks: All take part.
    """
    files = ranks.on_main("Listing the checkpoint's files", lambda: _files(directory))
    mine = files[ranks.rank :: ranks.world_size]
    digests = ranks.together("Hashing the checkpoint", lambda: _digests(directory, mine))
    merged = {name: digest for part in ranks.gather(digests) for name, digest in part.items()}
    ranks.on_main("Writing the manifest", lambda: _write_manifest(directory, meta, merged))


def _files(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in (path.relative_to(directory).as_posix() for path in paths) if name != MANIFEST)


def _digests(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    names = list(names)
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        return dict(zip(names, pool.map(lambda name: _digest(directory / name), names), strict=True))


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_manifest(directory: Path, meta: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    for name in files:
        fsync(directory / name)
    body = {**meta, "files": dict(sorted(files.items()))}
    text = json.dumps({**body, "sha256": _self_digest(body)}, indent=1)
    _write_text(directory / MANIFEST, text)
    for path in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        fsync(path)


def _self_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of ``directory``, its own checksum verified.

    Raises:
        ValueError: It is missing, is not JSON or was changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is missing or unreadable ({error})") from error
    if digest != _self_digest(manifest) or not isinstance(files, dict):
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    return manifest


def damage(directory: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a sealed directory: one line for each file missing, resized or changed; empty if sound.

    Every byte is read and hashed, each rank taking its share.
    """
    try:
        files = read_manifest(directory)["files"]
        problem = None
    except ValueError as error:
        files, problem = {}, str(error)
    problems = [p for p in ranks.gather(problem) if p]
    if problems:
        return problems[:1]
    mine = sorted(files)[ranks.rank :: ranks.world_size]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: _file_damage(directory / name, name, files[name]), mine))
    return [line for part in ranks.gather([line for line in found if line]) for line in part]


def _file_damage(path: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if _digest(path)["sha256"] != expected["sha256"]:
            return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def publish(temporary: Path, final: Path, run: str) -> None:
    """Give a sealed directory its name; one of that name is replaced if it is of the same run, else kept aside.

    It goes only once this one is whole. Killed in between, an earlier run's stays aside, and no pointer names it.
    """
    aside = final.with_name(_OLD + final.name)
    if final.exists() and _found(final).run != run:
        keep_aside(final)
    elif final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)  # killed here, ``clean`` gives it its name back
    temporary.rename(final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def keep_aside(path: Path) -> Path:
    """Rename another run's checkpoint to ``<name>.<time it was written>``; returns where it is."""
    source = path / MANIFEST if (path / MANIFEST).exists() else path
    kept = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S', time.localtime(source.stat().st_mtime))}")
    number = 0
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.{kept.name.split('.')[1]}.{number}")
    path.rename(kept)
    for pointer in POINTERS:  # else they would name the other run's checkpoint that takes this name
        if _named_by(path.with_name(pointer)) == path.name:
            path.with_name(pointer).unlink()
    return kept


def clean(root: Path) -> list[str]:
    """Undo what a killed run left half done under ``root``; returns the names of what was removed or given back."""
    if not root.is_dir():
        return []
    touched = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(_OLD) and not (root / path.name.removeprefix(_OLD)).exists():
            path.rename(root / path.name.removeprefix(_OLD))
        elif path.name.startswith((_TMP, _OLD, _TRASH)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        else:
            continue
        touched.append(path.name)
    return touched


def remove(found: Found) -> None:
    """Delete a checkpoint; killed half-way, nothing with a checkpoint's name is left incomplete."""
    trash = found.path.with_name(_TRASH + found.name)
    shutil.rmtree(trash, ignore_errors=True)
    found.path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def write_pointer(root: Path, pointer: str, target: str) -> None:
    """Make the text file ``root/pointer`` name ``target``, atomically."""
    write_text(root / pointer, target + "\n")


def write_text(path: Path, text: str) -> None:
    """Make ``path`` a file that holds ``text``, atomically."""
    temporary = path.with_name(f"{_TMP}{path.name}")
    _write_text(temporary, text)
    temporary.replace(path)
    fsync(path.parent)


def read_pointer(root: Path, pointer: str) -> str | None:
    """The checkpoint that ``root/pointer`` names; None where it is absent, unreadable or dangling."""
    name = _named_by(root / pointer)
    return name if _NAME.fullmatch(name) and (root / name).is_dir() else None


def _named_by(pointer: Path) -> str:
    try:
        return pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Force a file's or a directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
