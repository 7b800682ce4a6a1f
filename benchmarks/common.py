"""What every benchmark shares: the machine in words, timing by CUDA events, results as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "liger-kernel", "cut-cross-entropy")


def machine() -> dict[str, Any]:
    """GPU, driver, host and versions: what a number means nothing without."""
    found: dict[str, Any] = {"python": platform.python_version(), "host": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["device"] = "cpu"
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        name, driver, memory = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
        found |= {"device": name, "driver": driver, "memory": memory, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of ``spans`` (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total, reached = total + max(0.0, end - max(start, reached)), max(reached, end)
    return total


def milliseconds(function: Callable[[], Any], warmup: int = 5, repeats: int = 20) -> tuple[float, float]:
    """Median and spread (max - min of the middle half) of the time of ``function``, in ms."""
    times = []
    for i in range(warmup + repeats):
        elapsed = _cuda_time(function) if torch.cuda.is_available() else _wall_time(function)
        if i >= warmup:
            times.append(elapsed)
    times.sort()
    middle = times[len(times) // 4 : max(len(times) // 4 + 1, 3 * len(times) // 4)]
    return statistics.median(times), middle[-1] - middle[0]


def attention_figures(
    function: Callable[..., torch.Tensor],
    exact: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    gradient: torch.Tensor,
) -> dict[str, float]:
    """Times of ``function(*inputs)`` on a GPU, and its error, gradients included, against ``exact`` in fp32."""

    def both() -> list[torch.Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    torch.cuda.synchronize()
    start = time.perf_counter()
    found = both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    wide = [x.detach().float().requires_grad_() for x in inputs]
    out = exact(*wide)
    want = [out, *torch.autograd.grad(out, wide, gradient.float())]
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, want, strict=True))
    del wide, out, want, found
    with torch.no_grad():
        forward, _ = milliseconds(lambda: function(*inputs), 3, 15)
    together, _ = milliseconds(both, 3, 15)
    start = time.perf_counter()
    for _ in range(10):
        both()
    host = (time.perf_counter() - start) * 100
    torch.cuda.synchronize()
    return {"forward ms": round(forward, 3), "forward + backward ms": round(together, 3), "host ms": round(host, 2),
            "first call ms": round(first * 1e3), "error": float(f"{error:.1e}")}  # fmt: skip


def _cuda_time(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _wall_time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def write(
    name: str, rows: list[dict[str, Any]], columns: list[str], directory: Path | None = None, **extra: Any
) -> str:
    """Write ``name.json`` and ``name.md``; return the Markdown table."""
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    described = machine()
    content = {"machine": described, **extra, "rows": rows}
    (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    table = markdown(rows, columns)
    facts = ", ".join(f"{key} {value}" for key, value in described.items())
    (directory / f"{name}.md").write_text(f"{table}\n\nMachine: {facts}.\n")
    return table


def write_each(
    name: str, rows: Iterable[dict[str, Any]], columns: list[str], directory: Path | None = None
) -> list[dict[str, Any]]:
    """Print each of ``rows`` as it comes and ``write`` all so far: a run cut short leaves what it has. Returns them."""
    done: list[dict[str, Any]] = []
    table = ""
    for row in rows:
        print({key: row[key] for key in columns if row.get(key) is not None}, flush=True)
        done.append(row)
        table = write(name, done, columns, directory)
    print(table)
    return done


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """``rows`` as a Markdown table; a missing value is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column) for column in columns]
        lines.append("| " + " | ".join("–" if cell is None else f"{cell:,}" if isinstance(cell, (int, float)) and not isinstance(cell, bool) else str(cell) for cell in cells) + " |")  # fmt: skip
    return "\n".join(lines)
