"""``automodel coverage``: try this package on every architecture that the installed transformers has."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated

import typer

from nemo_automodel.config.suggest import nearest
from nemo_automodel.errors import ConfigError

_KINDS = ("causal", "vlm")


def coverage(
    names: Annotated[list[str] | None, typer.Argument(help="Model types (llama, qwen3, ...); default: all.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Only {' or '.join(_KINDS)}; default: both.")] = None,
    jobs: Annotated[int, typer.Option(help="How many architectures at a time; 0 is one a processor.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write, with a .json beside it; updated if it exists.")
    ] = None,
) -> int:
    """Train, save and reload a tiny twin of each architecture, and compare it with plain transformers.

    Returns 0 where everything that plain transformers trains works here, else 1.

    Raises:
        ConfigError: An unknown kind or model type.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from nemo_automodel._transformers.compat import registered_types
    from nemo_automodel._transformers.coverage_cells import LATER, REQUIRED, YES
    from nemo_automodel._transformers.coverage_report import read_rows, summary, write_report
    from nemo_automodel._transformers.coverage_run import sweep

    if kind is not None and kind not in _KINDS:
        raise ConfigError(f"--kind {kind}: write {' or '.join(_KINDS)}")
    known = {k: registered_types(k) for k in _KINDS if kind in (None, k)}
    for name in names or []:
        if not any(name in types for types in known.values()):
            everything = sorted({t for types in known.values() for t in types})
            close = nearest(name, everything)
            raise ConfigError(f"{name}: not an architecture of that kind{f'; did you mean {close}?' if close else ''}")
    tasks = [(t, k) for k, types in known.items() for t in types if not names or t in names]

    rows = []
    for row in sweep(tasks, jobs or os.cpu_count() or 1):
        rows.append(row)
        wrong = {c: text for c, text in row.cells.items() if c in (*REQUIRED, "fsdp2") and text not in (YES, LATER)}
        stage, why = next(iter(wrong.items()), ("", ""))
        print(f"[{len(rows)}/{len(tasks)}] {row.model_type} ({row.kind}) {row.seconds:.0f} s: ", end="")
        print(f"{stage}: {why}" if wrong else "yes", flush=True)
    if output is not None:
        done = {(row.model_type, row.kind) for row in rows}
        kept = [row for row in read_rows(output) if (row.model_type, row.kind) not in done]
        write_report(kept + rows, output, datetime.date.today().isoformat())
        print(f"Wrote {output} and {output.with_suffix('.json')}")
    for k in known:
        print(summary(rows, k))
    return 1 if any(row.wrong for row in rows if row.trains_plainly) else 0
