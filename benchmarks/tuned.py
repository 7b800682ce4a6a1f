"""What a run gains by options: ours with none set beside ours tuned, in one run; the default is to be within 5%.

    python -m benchmarks.tuned [--workloads A B B' D] [--warmup 8] [--steps 20] [--cpu] [--out DIR]

A process each, tuned first; that both compute the right thing is ``step.py``'s matter, first losses are compared here.
Workloads C (two GPUs, ``scale.py``), E and E+ have no faster option than their default.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.contenders import TUNED
from benchmarks.step import LOSS_TOLERANCE, run_contender

WITHIN = 95.0  # per cent
COLUMNS = ["workload", "tuned by", "tuned tok/s", "default tok/s", "default / tuned %", "tuned peak GiB",
           "default peak GiB", "loss difference", "met", "failed"]  # fmt: skip


def compare(workload: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: both contenders of ``workload``."""
    name, options = TUNED[workload]
    row: dict[str, Any] = {"workload": workload, "tuned by": options}
    tuned, default = (run_contender(contender, workload, arguments) for contender in (name, "ours"))
    if failed := tuned.get("failed") or default.get("failed"):
        return row | {"failed": failed}
    share = 100 * default["tok/s"] / tuned["tok/s"]
    difference = abs(default["losses"][0] - tuned["losses"][0])
    row |= {"tuned tok/s": tuned["tok/s"], "default tok/s": default["tok/s"], "default / tuned %": round(share, 1)}
    row |= {"tuned peak GiB": tuned.get("peak GiB"), "default peak GiB": default.get("peak GiB")}
    met = None if arguments.cpu else "yes" if share >= WITHIN else "NO"
    return row | {"loss difference": float(f"{difference:.1e}"), "met": met}


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where a contender failed, the two disagree, or the default is too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=240, help="seconds a contender may take")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    arguments.profile = []
    rows: list[dict[str, Any]] = []
    table = ""
    for workload in arguments.workloads:
        rows.append(compare(workload, arguments))
        print({key: rows[-1][key] for key in COLUMNS if rows[-1].get(key) is not None}, flush=True)
        table = write("tuned-cpu" if arguments.cpu else "tuned", rows, COLUMNS, arguments.out)
    print(table)
    wrong = (row for row in rows if "failed" in row or row["met"] == "NO" or row["loss difference"] > LOSS_TOLERANCE)
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
