"""One optimizer step, ours beside the peers': equality first, then time.

    python -m benchmarks.step [--workloads A B] [--contenders NAME ...] [--steps 30] [--warmup 10]
        [--reference NAME] [--cpu] [--out DIR]

Each contender runs in a process of its own, with the same weights, tokens, optimizer and clipping. Its loss and
gradient norms at step 0 are compared with fp32 transformers, its loss curve with that of plain transformers which keeps
the same things in the same dtypes; one that differs is marked, whatever its speed. Times are CUDA events around whole
steps. Contenders run in the order given; whom another's curve is compared with is best named first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import trl_peer
from benchmarks.common import covered, write
from benchmarks.contenders import REFERENCE, TRL, Contender, build, contenders, curve_of
from benchmarks.moe import E_EXPERTS, E
from benchmarks.vision import D
from benchmarks.workloads import WORKLOADS as TEXT_WORKLOADS
from benchmarks.workloads import Workload, canonical

WORKLOADS = TEXT_WORKLOADS | {"D": D, "E": E, "E+": E_EXPERTS}

LOSS_TOLERANCE = 2e-3  # of step 0, absolute
NORM_TOLERANCE = 0.02  # of the gradient norm, relative
CURVE_TOLERANCE = 0.005  # of every step's loss, relative
FP8_TOLERANCE = 0.01  # of the first and every loss, relative, where products run in FP8
COLUMNS = [
    "workload", "contender", "tok/s", "TFLOP/s", "step ms", "spread ms", "peak GiB", "first-step peak GiB",
    "cold start s", "loss error", "grad norm error", "per-tensor norm error", "curve error", "equal", "failed",
]  # fmt: skip


# --- one contender, in its own process -----------------------------------------------------------------------------


def measure(name: str, workload: Workload, device: torch.device, warmup: int, steps: int, profile: bool) -> dict:
    """Build ``name``, take ``warmup + steps`` optimizer steps, and say what was seen."""
    started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
    _reset_peak(device)
    if name == TRL:
        found = trl_peer.measure(workload, device, warmup, steps, started)
        times = found.pop("times")
        return found | (_speed(workload, times) if times else {})
    contender = build(name, workload, device)
    built_peak = _peak_gib(device)
    data = workload.batches()
    if device.type == "cuda":
        data = [{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in data]
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"trainable": sum(p.numel() for p in _trained(contender)), "build peak GiB": built_peak}
    steps_done: list[_Step] = []
    for i in range(warmup + steps):
        if i == warmup:
            _synchronize(device)
            _reset_peak(device)
        steps_done.append(optimizer_step(contender, data[i % len(data)], device, norms_into=result if i == 0 else None))
        if i == 0:
            _synchronize(device)
            result |= {"grad_norm": float(steps_done[0].norm), "cold start s": round(time.time() - started, 1)}
            result["first-step peak GiB"] = _peak_gib(device)
    _synchronize(device)  # the only one after the warm-up: a training loop does not wait for its steps either
    result["losses"] = [float(step.loss) for step in steps_done]
    if steps:
        result |= _speed(workload, [step.milliseconds() for step in steps_done[warmup:]])
        result["peak GiB"] = _peak_gib(device)
    if profile:
        print(_kernel_table(contender, data[0], device), file=sys.stderr, flush=True)
    return result


@dataclass
class _Step:
    """What one optimizer step left behind; nothing of it is read before the device is done."""

    loss: torch.Tensor
    norm: torch.Tensor
    start: Any  # CUDA events, or seconds
    end: Any

    def milliseconds(self) -> float:
        return (
            self.start.elapsed_time(self.end)
            if isinstance(self.end, torch.cuda.Event)
            else (self.end - self.start) * 1e3
        )


def optimizer_step(contender: Contender, batch: Any, device: torch.device, norms_into: dict | None = None) -> _Step:
    """Take one; ``norms_into`` gets the norms of the gradients, for which it waits."""
    start = _now(device)
    loss = contender.forward_backward(batch)
    if norms_into is not None:
        norms_into["norms"] = _norms(contender)
    norm = contender.clip()
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    return _Step(loss, norm, start, _now(device))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _trained(contender: Contender) -> list[torch.Tensor]:
    return [p for p in contender.model.parameters() if p.requires_grad]


def _norms(contender: Contender) -> dict[str, float]:
    if contender.gradients is not None:
        return {name: grad.float().norm().item() for name, grad in contender.gradients().items()}
    named = contender.model.named_parameters()
    return {canonical(name): p.grad.float().norm().item() for name, p in named if p.grad is not None}


def _peak_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None


def _speed(workload: Workload, times: list[float]) -> dict[str, float]:
    median = statistics.median(times)
    quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "step ms": round(median, 1),
        "spread ms": round(quarters[2] - quarters[0], 2),
        "tok/s": round(workload.tokens / median * 1e3),
        "TFLOP/s": round(workload.flops() / median / 1e9, 1),
    }


def _kernel_table(contender: Contender, batch: Any, device: torch.device, steps: int = 3) -> str:
    """Device time of a step by kernel, the largest first, and the share of the time in which no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            optimizer_step(contender, batch, device)
        _synchronize(device)
    events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) or 1
    spans = [(e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type.name == "CUDA"]
    busy = covered(spans)
    wall = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 1.0
    lines = [
        f"kernels {total / 1e3 / steps:.1f} ms a step; {wall / 1e3 / steps:.1f} ms passed, {1 - busy / wall:.1%} idle"
    ]
    for e in events[:40]:
        milli = e.self_device_time_total / 1e3 / steps
        lines.append(
            f"{milli:8.2f} ms {100 * e.self_device_time_total / total:5.1f}% x{e.count // steps:5d} {e.key[:120]}"
        )
    return "\n".join(lines)


# --- all of them ---------------------------------------------------------------------------------------------------


def judge(
    result: dict[str, Any], reference: dict[str, Any], curve: list[float] | None, relative: float = 0.0
) -> dict[str, Any]:
    """How far ``result`` is from the fp32 reference at step 0, and from ``curve`` over all steps (None: not known).

    ``relative`` is how far losses may be off where that is more than the usual.
    """
    loss_error = abs(result["losses"][0] - reference["losses"][0])
    norm_error = abs(result["grad_norm"] / reference["grad_norm"] - 1)
    pairs = [(result["norms"].get(name, 0.0), norm) for name, norm in reference["norms"].items()]
    tensor_error = (sum((a - b) ** 2 for a, b in pairs) / sum(b * b for _, b in pairs)) ** 0.5
    equal = (
        loss_error < max(LOSS_TOLERANCE, relative * reference["losses"][0])
        and norm_error < NORM_TOLERANCE
        and set(result["norms"]) == set(reference["norms"])
    )
    curve_error = None
    if curve is not None:
        curve_error = max(abs(a - b) / b for a, b in zip(result["losses"], curve, strict=True))
        equal = equal and curve_error < max(CURVE_TOLERANCE, relative)
    return {
        "loss error": float(f"{loss_error:.1e}"),
        "grad norm error": float(f"{norm_error:.1e}"),
        "per-tensor norm error": float(f"{tensor_error:.1e}"),
        "curve error": None if curve_error is None else float(f"{curve_error:.1e}"),
        "equal": "NO" if not equal else "yes" if curve is not None else "yes, step 0",
    }


def run_contender(name: str, workload: str, arguments: argparse.Namespace, steps: int | None = None) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--measure", name, "--workloads", workload]
    warmup, steps = (arguments.warmup, arguments.steps) if steps is None else (steps, 0)
    command += ["--warmup", str(warmup), "--steps", str(steps)]
    command += ["--cpu"] * arguments.cpu + ["--profile", name] * (name in arguments.profile)
    environment = os.environ | {"BENCHMARK_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {arguments.limit:.0f} s"}
    if name in arguments.profile:
        print(run.stderr, flush=True)
    if run.returncode != 0:
        print(run.stderr[-3000:], flush=True)
        return {"failed": (run.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def run_workload(workload: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The reference, then every contender, judged."""
    known = contenders(workload, arguments.cpu)
    chosen = [name for name in arguments.contenders or known if name in known]
    takes_part = arguments.reference in chosen
    reference = run_contender(arguments.reference, workload, arguments, steps=None if takes_part else 1)
    if "failed" in reference:
        yield {"workload": workload, "contender": arguments.reference, **reference}
        return
    curves: dict[str, list[float]] = {}
    for name in chosen:
        result = dict(reference) if name == arguments.reference else run_contender(name, workload, arguments)
        if "failed" not in result:
            curves[name] = result["losses"]
            result |= judge(result, reference, curves.get(curve_of(name)), FP8_TOLERANCE * ("fp8" in name))
            result.pop("norms")
        yield {"workload": workload, "contender": name, **result}


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where a contender failed or is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", default=[], help="names; default all")
    parser.add_argument(
        "--reference", default=REFERENCE, help="with whom step 0 is compared, where fp32 does not fit the device"
    )
    parser.add_argument("--profile", nargs="+", default=[], help="names whose kernel table is printed")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, default=240, help="seconds a contender may take")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the harness")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        workload = WORKLOADS[arguments.workloads[0]]
        workload, device = (workload.tiny(), "cpu") if arguments.cpu else (workload, "cuda")
        found = measure(
            arguments.measure,
            workload,
            torch.device(device),
            arguments.warmup,
            arguments.steps,
            bool(arguments.profile),
        )
        print(json.dumps(found), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    about = {name: WORKLOADS[name].about for name in arguments.workloads}
    table = ""
    for row in itertools.chain(*(run_workload(name, arguments) for name in arguments.workloads)):
        print({key: row[key] for key in COLUMNS if row.get(key) is not None}, flush=True)
        rows.append(row)  # written each time, so that a run cut short leaves what it has
        table = write("step-cpu" if arguments.cpu else "step", rows, COLUMNS, arguments.out, workloads=about)
    print(table)
    return int(any("failed" in row or row["equal"] != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
