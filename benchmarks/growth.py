"""How speed and memory grow with sequence and batch, ours beside the best peer; and the longest sequence that trains.

    python -m benchmarks.growth [--workloads A B] [--points 1x8192 ...] [--contenders NAME ...] [--cpu] [--out DIR]
    python -m benchmarks.growth --longest lora sft [--contenders ...]

A process per workload and contender goes through its points, building the model anew for each, so that compiled code
is for that one shape. What does not fit is a row that says so; a peer is then tried once more with gradient
checkpointing, ours chooses by ``activation_checkpointing: auto``. Whether contenders compute the same is ``step.py``'s
matter; first losses are compared here (``loss error``: from the first contender's). Results are written after each point.

``--longest`` takes one step at two lengths (and at twice the last, while a peak may be that of the optimizer's step),
extrapolates the peak (which is linear in the length), and tries from there on: longer while it fits, shorter while it does
not; each try in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write
from benchmarks.contenders import AUTO, GROWTH, LIGER, build
from benchmarks.step import _peak_gib, _reset_peak, _synchronize, optimizer_step
from benchmarks.workloads import WORKLOADS, Workload, tiny

POINTS = ["1x8192", "1x32768", "1x2048", "4x4096", "16x4096", "1x4096", "1x131072"]  # rows x tokens, the telling first
TINY_POINTS = ["1x64", "2x32"]
SECONDS = 8.0  # of timed steps, after which no further one is taken
COLUMNS = ["workload", "rows", "sequence", "contender", "tok/s", "TFLOP/s", "step ms", "peak GiB", "first step s",
           "loss error", "checkpointing", "failed"]  # fmt: skip
LOSS_TOLERANCE = 2e-3
STEP_TOKENS = 4096  # lengths that are tried are multiples of it
SHARE = 0.97  # of the device, that a predicted length is to fill


# --- in a process of its own ---------------------------------------------------------------------------------------


def measure(name: str, workload: Workload, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    """``warmup`` steps, then at most ``steps`` and ``SECONDS`` of them, timed together; OOM is a result."""
    try:
        return _measure(name, workload, device, warmup, steps)
    except torch.OutOfMemoryError as error:
        return {"failed": "out of memory", "wanted": str(error).partition(". GPU")[0][:120]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(name: str, workload: Workload, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    contender = build(name, workload, device)
    data = workload.batches(2)
    _reset_peak(device)
    began = time.monotonic()
    first = optimizer_step(contender, data[0], device)
    _synchronize(device)
    found: dict[str, Any] = {"first loss": float(first.loss), "first step s": round(time.monotonic() - began, 1)}
    found |= {"peak GiB": _peak_gib(device), "checkpointing": _mode(contender.model)}
    slow = time.monotonic()
    for i in range(1, warmup):
        optimizer_step(contender, data[i % 2], device)
        _synchronize(device)
        if time.monotonic() - slow > SECONDS / 2:
            break  # long steps need no further warming
    taken = []
    began = time.monotonic()
    for i in range(steps):
        taken.append(optimizer_step(contender, data[i % 2], device))
        if time.monotonic() - began > SECONDS or (workload.tokens > STEP_TOKENS * 8 and _late(began, device)):
            break
    _synchronize(device)
    if taken:
        median = statistics.median(step.milliseconds() for step in taken)
        found |= {
            "step ms": round(median, 1),
            "tok/s": round(workload.tokens / median * 1e3),
            "timed steps": len(taken),
        }
        found["TFLOP/s"] = round(workload.flops() / median / 1e9, 1)
        found["peak GiB"] = _peak_gib(device)
    return found


def _late(began: float, device: torch.device) -> bool:
    _synchronize(device)  # steps of seconds: waiting for each costs nothing
    return time.monotonic() - began > SECONDS


def _mode(model: Any) -> str | None:
    """What ``auto`` chose, read off the blocks."""
    found = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    options = [recomputed.options for recomputed in found if type(recomputed).__name__ == "_Recomputed"]
    if options:
        selective = sum("context_fn" in option for option in options)
        return ", ".join(
            f"{mode} in {n}" for mode, n in (("selective", selective), ("full", len(options) - selective)) if n
        )
    return "full" if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) else "off"


def shaped(workload: Workload, point: str, cpu: bool) -> Workload:
    """``workload`` with the rows and tokens of ``point``."""
    rows, seq = map(int, point.split("x"))
    base = tiny(workload) if cpu else workload
    shape = {**base.shape, "max_position_embeddings": max(seq, base.shape["max_position_embeddings"])}
    return replace(base, shape=shape, batch=rows, seq=seq, about=f"{base.about} as {point}")


# --- all of them ---------------------------------------------------------------------------------------------------


def rows_of(
    workload: str, contender: str, points: list[str], steps: tuple[int, int], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each of ``points`` as a process of its own prints it; points that it did not come to say why."""
    command = [sys.executable, "-m", "benchmarks.growth", "--measure", contender, "--workloads", workload]
    command += ["--points", *points, "--warmup", str(steps[0]), "--steps", str(steps[1])] + ["--cpu"] * arguments.cpu
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    left = list(points)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1) as run:
        assert run.stdout is not None
        why = "the process ended early"
        while left:
            ready, _, _ = select.select([run.stdout], [], [], arguments.limit)
            if not ready:
                why = f"no result within {arguments.limit:.0f} s"
                run.kill()
                break
            line = run.stdout.readline()
            if not line:
                break
            if line.startswith("{"):
                rows, seq = left.pop(0).split("x")
                yield {"workload": workload, "rows": int(rows), "sequence": int(seq), **json.loads(line)}
    for point in left:
        rows, seq = point.split("x")
        yield {"workload": workload, "rows": int(rows), "sequence": int(seq), "contender": contender, "failed": why}


def in_this_process(arguments: argparse.Namespace) -> None:
    """Print a row for each point; a peer that does not fit is tried again with gradient checkpointing."""
    device = torch.device("cpu" if arguments.cpu else "cuda")
    for point in arguments.points:
        workload = shaped(WORKLOADS[arguments.workloads[0]], point, arguments.cpu)
        name = arguments.measure
        found = measure(name, workload, device, arguments.warmup, arguments.steps)
        checkpointed = f"{name}, checkpointed"
        if "failed" in found and checkpointed in GROWTH:
            name, found = checkpointed, measure(checkpointed, workload, device, arguments.warmup, arguments.steps)
        print(json.dumps({"contender": name, **found}), flush=True)


def longest(kind: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the tries; the last that did not fail is the longest sequence."""
    ours = "ours, checkpointed" if kind == "lora" else "ours, full SFT, small state"
    contender = arguments.contenders[0] if arguments.contenders else ours
    unit = 32 if arguments.cpu else STEP_TOKENS

    def attempt(length: int) -> dict[str, Any]:
        (row,) = rows_of("A", contender, [f"1x{length}"], (1, 0), arguments)
        return row

    lengths, known = [4 * unit, 8 * unit], []
    for length in lengths:
        known.append(attempt(length))
        yield known[-1]
        if "failed" in known[-1]:
            return
        peaks = [row["peak GiB"] for row in known]
        flat = None not in peaks and any(b <= a for a, b in itertools.pairwise(peaks[-3:]))
        if length == lengths[-1] and flat:  # at one end of the line at least it was not the activations' peak
            lengths.append(2 * length)
    if None in peaks:  # a CPU: nothing to fill
        return
    slope = (peaks[-1] - peaks[-2]) / (lengths[-1] - lengths[-2])
    total = int(machine()["memory"].split()[0]) / 1024  # not asked of torch, which would take memory for itself
    length = int((SHARE * total - peaks[-1]) / slope + lengths[-1]) // unit * unit
    best: int | None = None
    for _ in range(arguments.tries):
        row = attempt(length)
        yield row | {"predicted GiB": round(peaks[-1] + slope * (length - lengths[-1]), 1)}
        change = max(unit, length // 16 // unit * unit)
        if "failed" in row:
            if best is not None:
                return
            length -= change
        else:
            best = length
            length += change


def with_loss_error(row: dict[str, Any], firsts: dict[tuple[Any, ...], float]) -> dict[str, Any]:
    """``row`` with how far its first loss is from that of the first contender at the same point."""
    if "first loss" not in row:
        return row
    expected = firsts.setdefault((row["workload"], row["rows"], row["sequence"]), row["first loss"])
    return row | {"loss error": float(f"{abs(row['first loss'] - expected):.1e}")}


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where contenders disagree, or one fails for another reason than memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=["A", "B"], default=["A", "B"])
    parser.add_argument("--points", nargs="+", default=None, help="rows x tokens, as 1x8192; default all")
    parser.add_argument("--contenders", nargs="+", default=[], help="names; default ours and the best peer")
    parser.add_argument("--longest", nargs="+", choices=["lora", "sft"], default=[])
    parser.add_argument("--tries", type=int, default=3, help="of the longest sequence, after the two that predict it")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=200, help="seconds a point may take")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.points = arguments.points or (TINY_POINTS if arguments.cpu else POINTS)
    if arguments.measure:
        in_this_process(arguments)
        return 0
    names = arguments.contenders or ([AUTO, "transformers"] if arguments.cpu else [AUTO, LIGER])
    steps = (arguments.warmup, arguments.steps)
    if arguments.longest:
        found = itertools.chain(*(longest(kind, arguments) for kind in arguments.longest))
    else:
        found = itertools.chain(*(rows_of(w, n, arguments.points, steps, arguments) for w in arguments.workloads for n in names))  # fmt: skip
    title = ("longest" if arguments.longest else "growth") + "-cpu" * arguments.cpu
    rows: list[dict[str, Any]] = []
    firsts: dict[tuple[Any, ...], float] = {}
    table = ""
    for row in found:
        rows.append(row if arguments.longest else with_loss_error(row, firsts))
        print({key: rows[-1][key] for key in COLUMNS if rows[-1].get(key) is not None}, flush=True)
        table = write(title, rows, [*COLUMNS, *["predicted GiB"] * bool(arguments.longest)], arguments.out)
    print(table)
    return int(any(row.get("loss error", 0.0) > LOSS_TOLERANCE or row.get("failed", "out of memory") != "out of memory" for row in rows))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
