"""Open rows from a local file, glob or directory, or from the Hub, and say exactly what is wrong where they are not.

Local JSON and CSV rows are kept as the text they were: Arrow would give every nested mapping the keys of all others
(filled with None), which chat templates render.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_automodel.errors import DataError
from nemo_automodel.hub import explain, patiently

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar")
_SPLIT_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_NOT_ROWS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "config.json")  # as ``datasets`` has it
_CHUNK = 2**22  # characters of rows that wait as Python strings, about
_TEXT, _WHERE = "__json__", "__where__"  # columns of a dataset that holds rows as text


@dataclass(frozen=True)
class Source:
    """Rows to be read, and what identifies them.

    Args:
        load: makes the Arrow table of rows, when they are first asked for: what identifies them is known without.
        name: the path or Hub ID, as the user wrote it.
        identity: changes whenever the content does (file hashes, or the Hub's commit).
        files: the local files that rows are read from, absolute; where they lie is no part of ``identity``.
    """

    load: Callable[[], datasets.Dataset]
    name: str
    identity: str
    files: tuple[str, ...] = ()

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The rows, of which there is at least one; read a row with ``read``."""
        return self.load()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index`` as plain Python values."""
        return read(self.dataset[index], index, self.name)[0]

    def take(self, limit: int | None) -> Source:
        """The first ``limit`` rows (all of them for None)."""
        if limit is None:
            return self
        if limit < 1:
            raise DataError(f"limit_dataset_samples={limit}: must be at least 1")
        return replace(self, load=lambda: _first(self.dataset, limit), identity=f"{self.identity}[:{limit}]")


def _first(dataset: datasets.Dataset, limit: int) -> datasets.Dataset:
    return dataset.select(range(min(limit, len(dataset))))


def read(raw: dict[str, Any], index: int, name: str) -> tuple[dict[str, Any], str]:
    """A raw row of ``Source.dataset`` -> (the row, where it stands: "file:line" or "name row N").

    Raises:
        DataError: the row's text is not JSON, or not an object.
    """
    if _TEXT not in raw:
        return {column: _without_none(value) for column, value in raw.items()}, f"{name} row {index}"
    where = raw[_WHERE]
    try:
        row = json.loads(raw[_TEXT])
        if "\\u" in raw[_TEXT]:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: a text has half a surrogate pair (an emoji cut in two); repair or remove it"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): {raw[_TEXT][:60]!r}") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"question": "..."}}, got {_kind(row)}')
    return row, where


def field(row: dict[str, Any], column: str, where: str, kind: type | tuple[type, ...] = str) -> Any:
    """``row[column]``, checked; raises DataError naming the columns there are, or the type found."""
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; there is {', '.join(map(repr, row)) or 'nothing'}")
    value = row[column]
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise DataError(f"{where}: column {column!r} must be {wanted}, got {_kind(value)}: {str(value)[:60]!r}")
    return value


def open_source(
    path_or_dataset_id: str | list[str], split: str = "train", name: str | None = None, revision: str | None = None
) -> Source:
    """Open local files (jsonl, json, csv, tsv, parquet; a path, glob, directory or list of them) or a Hub dataset.

    Args:
        path_or_dataset_id: what to open; a path that exists wins over a Hub ID.
        split: which split (default "train"), slices such as ``train[:1000]`` or ``train[:10%]`` included. A directory
            is split by the names of its files; a file is its own only split.
        name: configuration of a Hub dataset (its subset).
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        DataError: nothing there, an unreadable file, an absent split, or the Hub refuses; once rows are asked for: no
            rows, or a file that is not what its name says.
    """
    paths = [path_or_dataset_id] if isinstance(path_or_dataset_id, str) else list(path_or_dataset_id)
    label = ", ".join(paths)
    if len(paths) != 1 or _is_local(paths[0]):
        source = _open_local(paths, label, split)
    else:
        source = _open_hub(paths[0], split, name, revision)
    return replace(source, load=lambda: _some(source.load(), label, split))


def _some(dataset: datasets.Dataset, label: str, split: str) -> datasets.Dataset:
    if not len(dataset):
        raise DataError(f"{label}: zero rows in split {split!r}")
    return dataset


# --- local files ----------------------------------------------------------------------------------------------------
def _is_local(path: str) -> bool:
    if Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or glob.has_magic(path):
        return True
    return path.lower().endswith(SUFFIXES + _PACKED) or path.count("/") > 1


def _open_local(paths: list[str], label: str, split: str) -> Source:
    root = Path(paths[0]).expanduser()
    if len(paths) == 1 and ((root / "state.json").exists() or (root / "dataset_dict.json").exists()):
        return _open_saved(root, label, split)
    wanted, chosen = re.match(r"^\w*", split).group(), []  # type: ignore[union-attr]
    for path in paths:
        chosen += _files(path, wanted)
    parquet, text = ([f for f in chosen if (f.suffix.lower() == ".parquet") is kind] for kind in (True, False))
    if parquet and text:
        raise DataError(f"{label}: the files have different columns ({parquet[0]}, {text[0]}); give files of one kind")
    digest = hashlib.sha256()
    for file in chosen:
        digest.update(_digest(file))
    identity = f"{digest.hexdigest()}:{split[len(wanted) :]}"

    def load() -> datasets.Dataset:
        return _slice(_rows_of(chosen, label, digest.hexdigest()), split, wanted)

    return Source(load, label, identity, tuple(str(file.absolute()) for file in chosen))


def _rows_of(files: list[Path], label: str, fingerprint: str) -> datasets.Dataset:
    try:
        table = pa.concat_tables([_table(file) for file in files], promote_options="default")
    except pa.ArrowInvalid as error:
        raise DataError(f"{label}: the files have different columns ({error}); give files of one kind") from None
    return datasets.Dataset(table, fingerprint=fingerprint[:32])  # else it would be found from a copy of all rows


def _files(path: str, split: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        files = [f for f in files if f.name not in _NOT_ROWS]
        if not files:
            script = next(place.glob("*.py"), None)
            hint = f"; {script.name} is a script, which is not run: use the dataset's parquet files" if script else ""
            raise DataError(f"{path}: no data file in this directory (looked for {', '.join(SUFFIXES)}){hint}")
        return _of_split(files, place, split)
    found = [place] if place.is_file() else [Path(f) for f in sorted(glob.glob(str(place), recursive=True))]
    found = [file for file in found if file.is_file()]
    if not found:
        what = "no file matches this pattern" if glob.has_magic(path) else "no such file or directory"
        raise DataError(f"{path}: {what} (relative to {Path.cwd()})")
    for file in found:
        if file.suffix.lower() not in SUFFIXES:
            fix = "unpack it first" if file.suffix.lower() in _PACKED else "rename or convert it"
            raise DataError(f"{file}: not a kind of file that can be read ({', '.join(SUFFIXES)}); {fix}")
    # A file named on its own is what is wanted, whatever it is called; another split than the default must be in it.
    return found if split == "train" else _of_split(found, place.parent, split)


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(root)).lower())
        named = next((name for name, aliases in _SPLIT_WORDS.items() if set(words) & set(aliases)), None)
        by_split.setdefault(named or (split if split in words else "train"), []).append(file)
    key = next((name for name, aliases in _SPLIT_WORDS.items() if split in aliases), split)
    if key not in by_split:
        there = "; ".join(f"{name}: {', '.join(f.name for f in group)}" for name, group in by_split.items())
        raise DataError(f"{root}: no split {split!r}; there is {there}")
    return by_split[key]


def _digest(file: Path) -> bytes:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").digest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _table(file: Path) -> pa.Table:
    kind = file.suffix.lower()
    if kind == ".parquet":
        try:
            return pq.ParquetFile(file).read()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    is_csv = kind in (".csv", ".tsv")
    try:
        # Only "\n" ends a line of JSON: U+2028, say, may stand in its strings. A CSV reader sees to its lines itself.
        with file.open(encoding="utf-8-sig", newline="" if is_csv else "\n") as text:
            if is_csv:
                return _in_chunks(_csv_rows(file, text, "\t" if kind == ".tsv" else ","))
            return _in_chunks(_json_rows(file, text) if kind == ".json" else _lines(file, text))
    except UnicodeDecodeError:
        with file.open("rb") as start:
            other = "utf-16" if start.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{file}: not UTF-8 at byte {_first_bad_byte(file)}; convert it, e.g. `iconv -f {other} -t utf-8 {file.name}`"
        ) from None


def _in_chunks(rows: Iterable[tuple[str, str]]) -> pa.Table:
    """A table of rows and where they stand; few of them at a time are Python strings, which take several times the room."""
    schema = pa.schema({_TEXT: pa.large_string(), _WHERE: pa.large_string()})
    chunks: list[pa.RecordBatch] = []
    texts: list[str] = []
    places: list[str] = []
    size = 0
    for text, place in rows:
        texts.append(text)
        places.append(place)
        size += len(text)
        if size > _CHUNK:
            chunks.append(pa.record_batch([texts, places], schema))
            texts, places, size = [], [], 0
    return pa.Table.from_batches([*chunks, pa.record_batch([texts, places], schema)])


def _first_bad_byte(file: Path) -> int:
    at = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return at + error.start
            at += len(line)
    return at


def _lines(file: Path, text: TextIO) -> Iterator[tuple[str, str]]:
    return ((line.removesuffix("\n"), f"{file}:{number}") for number, line in enumerate(text, 1) if line.strip())


def _csv_rows(file: Path, text: TextIO, delimiter: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}:{reader.line_num}: a row must have the {len(reader.fieldnames or [])} columns of line 1"
                )
            yield json.dumps(row, ensure_ascii=False), f"{file}:{reader.line_num}"
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not valid CSV ({error})") from None


def _json_rows(file: Path, lines: TextIO) -> Iterator[tuple[str, str]]:
    text = lines.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, whatever the file is called
            lines.seek(0)
            return _lines(file, lines)
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
    rows = content.get("data", content) if isinstance(content, dict) else content
    if isinstance(rows, dict) and "\n" not in text.strip():
        rows = [rows]  # a JSONL file of one line
    if not isinstance(rows, list):
        raise DataError(f'{file}: expected a list of rows, or {{"data": [rows]}}; got {_kind(content)}')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        rows = list(_squad_rows(file, rows))
    escaped = re.search(r"\\u[dD][89a-fA-F]", text) is not None  # if half a surrogate pair, it is for ``read`` to tell
    return ((json.dumps(row, ensure_ascii=escaped), f"{file} row {index}") for index, row in enumerate(rows))


def _squad_rows(file: Path, articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The nested SQuAD release format, as the flat rows that ``rajpurkar/squad`` has on the Hub."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = qa["answers"]
                    flat = {
                        "text": [a["text"] for a in answers],
                        "answer_start": [a.get("answer_start", -1) for a in answers],
                    }
                    yield {
                        "id": qa.get("id"),
                        "context": paragraph["context"],
                        "question": qa["question"],
                        "answers": flat,
                    }
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not in SQuAD format: {error!r} is missing or of the wrong type") from None


def _open_saved(root: Path, label: str, split: str) -> Source:
    """A directory that ``save_to_disk`` wrote."""
    wanted = re.match(r"^\w*", split).group()  # type: ignore[union-attr]
    saved = datasets.load_from_disk(str(root))
    if isinstance(saved, datasets.DatasetDict):
        if wanted not in saved:
            raise DataError(f"{label}: no split {wanted!r}; there is {', '.join(saved)}")
        saved = saved[wanted]
    return Source(lambda: _slice(saved, split, wanted), label, f"{_content_hash(saved)}:{split}")


def _slice(dataset: datasets.Dataset, split: str, wanted: str) -> datasets.Dataset:
    if split == wanted:
        return dataset
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({wanted: len(dataset)})
        return dataset.select([i for part in parts for i in range(len(dataset))[part.from_ : part.to]])
    except (ValueError, AssertionError) as error:
        raise DataError(f"split {split!r}: {error}; write e.g. {wanted}[:1000] or {wanted}[:10%]") from None


# --- the Hub --------------------------------------------------------------------------------------------------------
def _open_hub(repo: str, split: str, name: str | None, revision: str | None) -> Source:
    try:
        dataset = patiently(
            lambda: datasets.load_dataset(repo, name, split=split, revision=revision), f"dataset {repo}"
        )
    except Exception as error:
        raise DataError(_dataset_problem(error, repo, revision)) from error
    return Source(lambda: dataset, repo, f"{repo}:{name}:{split}:{_content_hash(dataset)}")


def _dataset_problem(error: Exception, repo: str, revision: str | None) -> str:
    what = f"dataset {repo}" + (f" (revision {revision})" if revision else "")
    text = " ".join(str(error).split())
    if "Dataset scripts are no longer supported" in text or "trust_remote_code" in text:
        return (
            f"{what} is a script, which is code that would run here; use its parquet files instead: "
            f"dataset.revision=refs/convert/parquet, or a copy of them on disk"
        )
    if match := re.search(r'Unknown split "?(.*?)"?\. Should be one of (\[.*?\])', text):
        return f"{what}: no split {match[1]!r}; there is {match[2]}"
    if match := re.search(r"(?:Please pick one among the available configs|Available): (\[.*?\])", text):
        return f"{what}: its configurations are {match[1]}; set dataset.name to one of them"
    if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return f"{what}: no data files that can be read ({', '.join(SUFFIXES)})"
    return explain(error, "dataset", repo, revision)


def _content_hash(dataset: datasets.Dataset) -> str:
    """A hash of the rows themselves: file times and cache folders differ between machines, rows do not."""
    digest = hashlib.sha256(str(dataset.features).encode())
    for start in range(0, len(dataset), 10_000):
        table = dataset.with_format("arrow")[start : start + 10_000].combine_chunks()
        for batch in table.to_batches():
            digest.update(batch.serialize().to_pybytes())
    return digest.hexdigest()


def _without_none(value: Any) -> Any:
    """Mappings without the keys that Arrow filled with None because another row has them."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), type(value).__name__
    )
