"""Rows of a source -> a sequence of ``types.Sample``, cached on disk under a key that changes when anything does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from nemo_automodel.components.datasets.rendering import Rendered, encode, tokenizer_fingerprint
from nemo_automodel.components.datasets.sources import Source, read
from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX, Sample

logger = logging.getLogger(__name__)

CODE_VERSION = 3
"""Part of the cache key; raise it whenever the same row and options would give other ids or labels."""
MAX_DROPPED = 0.5
"""Share of rows that may have nothing to train on before that is an error."""
_LOOKED_AT = 1000  # rows whose roles that error names

_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "full_length": datasets.Value("int32"),
        "labelled": datasets.Value("int32"),
    }
)

Render = Callable[[dict[str, Any], str], Rendered]
"""(row, where it stands) -> its text; a dataclass, whose fields are the options that enter the cache key. One that
reads conversations has ``roles(row, where)``."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What became of the rows: ``rows`` read, ``dropped`` (no label left) and ``truncated`` ones, and token counts."""

    rows: int
    dropped: int
    truncated: int
    tokens: int
    tokens_cut: int
    label_tokens: int

    def __str__(self) -> str:
        share = 100 * self.label_tokens / max(self.tokens, 1)
        return (
            f"{self.rows - self.dropped} of {self.rows} rows, {self.tokens} tokens ({share:.0f}% trained on); {self.dropped} rows "
            f"dropped with nothing to train on, {self.truncated} truncated ({self.tokens_cut} tokens cut)"
        )


class TokenizedDataset:
    """A sequence of ``types.Sample`` with ``lengths``, ``stats`` and ``fingerprint``."""

    def __init__(self, table: datasets.Dataset, kept: np.ndarray, stats: Stats, fingerprint: str) -> None:
        self._rows, self._kept = table.with_format("arrow"), kept
        self.stats, self.fingerprint = stats, fingerprint
        self.lengths = np.asarray(table.with_format("numpy")["length"][:])[kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        ids, labels = self.arrays(index)
        return Sample(input_ids=ids.tolist(), labels=labels.tolist())

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a sample, int32, not to be written to: in a sixth of the time that lists take."""
        row = self._rows[self.source_row(index)]
        return row["input_ids"][0].values.to_numpy(), row["labels"][0].values.to_numpy()

    def source_row(self, index: int) -> int:
        """Which row of the source sample ``index`` was made from."""
        return int(self._kept[index])


def tokenize(
    source: Source, tokenizer: Any, render: Render, seq_length: int | None = None, num_proc: int | None = None
) -> TokenizedDataset:
    """Render and tokenise every row, or take the result of an earlier run from the cache.

    Args:
        source: the rows.
        tokenizer: a Hugging Face tokenizer.
        render: a dataclass instance that turns a row into text; ``tokenizer``-valued fields are hashed by content.
        seq_length: tokens kept of a row, cut from the right; None = all.
        num_proc: processes (default: this one).

    Raises:
        DataError: a row cannot be read, or more than half of the rows have nothing to train on.
    """
    if seq_length is not None and seq_length < 2:
        raise DataError(f"seq_length={seq_length}: must be at least 2 tokens, or null for no limit")
    options = {f.name: getattr(render, f.name) for f in dataclasses.fields(render) if f.name != "tokenizer"}  # type: ignore[arg-type]
    tokens = tokenizer_fingerprint(tokenizer)
    facts = [CODE_VERSION, source.identity, tokens, type(render).__qualname__, options, seq_length]
    encode_rows = _Encode(tokenizer, render, seq_length, source.name)
    table, fingerprint = map_cached(source, encode_rows, _FEATURES, facts, num_proc, f"Tokenising {source.name}")
    return _checked(table, source, render, seq_length, fingerprint)


def _checked(
    table: datasets.Dataset, source: Source, render: Render, seq_length: int | None, fingerprint: str
) -> TokenizedDataset:
    columns = table.select_columns(["length", "full_length", "labelled"]).with_format("numpy")[:]
    length, full, labelled = columns["length"], columns["full_length"], columns["labelled"]
    kept = np.flatnonzero(labelled > 0)
    cut = full > length
    stats = Stats(
        rows=len(table),
        dropped=len(table) - len(kept),
        truncated=int(cut.sum()),
        tokens=int(length[kept].sum()),
        tokens_cut=int((full - length).sum()),
        label_tokens=int(labelled.sum()),
    )
    if stats.dropped > MAX_DROPPED * stats.rows:
        by_cut = int((cut & (labelled == 0)).sum())
        unmarked = np.flatnonzero(~cut & (labelled == 0))
        raise DataError(
            f"{source.name}: {stats.dropped} of {stats.rows} rows have nothing to train on: in {by_cut} the prompt alone fills "
            f"seq_length={seq_length} (the longest row has {int(full.max())} tokens), {stats.dropped - by_cut} have an empty or "
            f"unmarked answer{_roles(source, render, unmarked)}; raise dataset.seq_length, or look at the columns and at train_on"
        )
    logger.log(logging.WARNING if stats.dropped else logging.INFO, "%s: %s", source.name, stats)
    return TokenizedDataset(table, kept, stats, fingerprint)


def _roles(source: Source, render: Render, rows: np.ndarray) -> str:
    """The roles in the first of ``rows``, where rows are conversations: it may be an assistant under another name."""
    roles_of = getattr(render, "roles", None)
    if roles_of is None or not len(rows):
        return ""
    found = {role for row in rows[:_LOOKED_AT].tolist() for role in roles_of(source[row], f"{source.name} row {row}")}
    return f" (roles there: {', '.join(sorted(found)) or 'none'}; assistant's words are learned)"


class _Encode:
    """The function that ``datasets.map`` runs; a class so that it can be sent to other processes."""

    def __init__(self, tokenizer: Any, render: Render, seq_length: int | None, name: str) -> None:
        self.tokenizer, self.render, self.seq_length, self.name = tokenizer, render, seq_length, name

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rendered = []
        for at, index in enumerate(indices):
            row, where = read({name: values[at] for name, values in columns.items()}, index, self.name)
            rendered.append(self.render(row, where))
        out: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for ids, labels in encode(self.tokenizer, rendered):
            full = len(ids)
            if self.seq_length is not None and full > self.seq_length:
                # The last kept position would still know its next token; without it a row is worth the same packed or not.
                ids, labels = ids[: self.seq_length], [*labels[: self.seq_length - 1], IGNORE_INDEX]
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["length"].append(len(ids))
            out["full_length"].append(full)
            out["labelled"].append(sum(label != IGNORE_INDEX for label in labels))
        return out


def map_cached(
    source: Source,
    function: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    features: datasets.Features,
    facts: list[Any],
    num_proc: int | None,
    desc: str,
    batch_size: int = 1000,
    here: str = "",
) -> tuple[datasets.Dataset, str]:
    """``function`` of all rows of ``source``, made once for the same ``facts``; and the hash of these.

    ``here``, too, must be the same for what was made to be taken, but is not in that hash: what may differ between
    machines, such as files' times. The rows of ``source`` are not read where nothing is to be made.
    """
    fingerprint = _hash(facts)
    key = _hash([fingerprint, here]) if here else fingerprint
    cache = _cache_file(key)
    if cache is not None and (made := _made_before(Path(cache), features)) is not None:
        return made, fingerprint
    table = source.dataset.map(
        function,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=source.dataset.column_names,
        features=features,
        num_proc=num_proc,
        cache_file_name=cache,
        keep_in_memory=cache is None,
        new_fingerprint=key,
        desc=desc,
    )
    return table, fingerprint


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _made_before(cache: Path, features: datasets.Features) -> datasets.Dataset | None:
    """What ``datasets.map`` wrote to ``cache``: one file, or one of each process, all of them there."""
    if not datasets.is_caching_enabled():
        return None
    parts: dict[str, list[Path]] = {"1": [cache]} if cache.exists() else {}
    for part in sorted(cache.parent.glob(f"{cache.stem}_*_of_*.arrow")):
        parts.setdefault(part.stem.rsplit("_", 1)[1], []).append(part)
    whole = next((files for count, files in parts.items() if len(files) == int(count)), None)
    if whole is None:
        return None
    info = datasets.DatasetInfo(features=features)
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file), info=info) for file in whole])


def _cache_file(fingerprint: str) -> str | None:
    """Where rows made under ``fingerprint`` are kept; None (said) where no cache can be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "nemo_automodel"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("tokenised rows are not cached: %s cannot be written (%s)", folder, error.strerror)
        return None
    return str(folder / f"{fingerprint}.arrow")
