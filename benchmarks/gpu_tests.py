"""Run `tests/gpu` on this machine's CUDA device and write what passed, with the machine, to `results/gpu-tests.md`.

python -m benchmarks.gpu_tests [--out DIR] [pytest arguments ...]
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import write

COLUMNS = ["file", "passed", "failed", "skipped", "seconds"]


def rows_of(junit: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One row a test file and one for all of them; and the names of the tests that did not pass, with their message."""
    counts: dict[str, Counter[str]] = {}
    failures = []
    for case in ElementTree.parse(junit).iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        outcome = "failed" if broken is not None else "skipped" if case.find("skipped") is not None else "passed"
        for name in (file, "all"):
            counts.setdefault(name, Counter())[outcome] += 1
            counts[name]["seconds"] += float(case.get("time", 0))  # type: ignore[assignment]
        if broken is not None:
            message = (broken.get("message") or "no message").splitlines()[0]
            failures.append(f"{file}::{case.get('name')}: {message}")
    order = sorted(name for name in counts if name != "all") + ["all"] * ("all" in counts)
    rows = [{"file": name, **{column: round(counts[name][column]) for column in COLUMNS[1:]}} for name in order]
    return rows, failures


def main(argv: list[str] | None = None) -> int:
    """Run them; pytest's own exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        junit = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", f"--junitxml={junit}", *rest]
        status = subprocess.run(command).returncode
        rows, failures = rows_of(junit) if junit.exists() else ([], ["pytest wrote no report"])
    date = datetime.date.today().isoformat()
    table = write("gpu-tests", rows, COLUMNS, arguments.out, date=date, failures=failures, arguments=rest)
    target = (arguments.out or Path(__file__).parent / "results") / "gpu-tests.md"
    said = "".join(f"- {failure}\n" for failure in failures)
    header = f"`python -m benchmarks.gpu_tests {' '.join(rest)}`".replace(" `", "`") + f", {date}."
    target.write_text(f"{header}\n\n{target.read_text()}" + (f"\nNot passed:\n{said}" if said else ""))
    print(table)
    return status


if __name__ == "__main__":
    sys.exit(main())
