"""LoRA over a base in four bits: equality with its rounded weights, the step of A, and what 8B and 70B shapes take.

python -m benchmarks.qlora [--parts curve step 8b 70b] [--steps 15] [--curve 40] [--cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_each
from benchmarks.contenders import ROUNDED
from benchmarks.step import measure
from benchmarks.workloads import LLAMA_8B, WORKLOADS, Workload, tiny

LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
LIMITS = {"8b": 12.0, "70b": 141.0}  # GiB
CURVE_TOLERANCE = 0.005
COLUMNS = ["part", "what", "tok/s", "step ms", "spread ms", "peak GiB", "first-step peak GiB", "build peak GiB",
           "cold start s", "limit GiB", "first loss", "last loss", "largest difference", "fits", "equal"]  # fmt: skip


def parts(cpu: bool, steps: int, curve: int) -> dict[str, Iterator[dict[str, Any]]]:
    """What can be run, by name; nothing runs before it is asked for."""
    device = torch.device("cpu" if cpu else "cuda")
    whole = tiny(WORKLOADS["A"]) if cpu else WORKLOADS["A"]
    shallow = replace(whole, shape={**whole.shape, "num_hidden_layers": 2, "vocab_size": 32000}, batch=1, seq=1024)
    row = replace(whole, batch=1)
    large = row if cpu else replace(row, about="Llama-3.1-70B shape", shape=LLAMA_70B)
    peers = ["ours", "ours, 4 bits"] + ["transformers + Liger, 4 bits"] * (not cpu)
    return {
        "curve": _curve(whole if cpu else shallow, device, curve),
        "step": (_measured("step", name, whole, device, 5, steps) for name in peers),
        "8b": _fits("8b", row, device),
        "70b": _fits("70b", large, device),
    }


def _curve(workload: Workload, device: torch.device, steps: int) -> Iterator[dict[str, Any]]:
    """Losses over ``steps`` steps beside plain transformers and PEFT over the weights that four bits leave."""
    found = [_measured("curve", name, workload, device, steps, 0) for name in (ROUNDED, "ours, 4 bits")]
    pairs = zip(found[1]["losses"], found[0]["losses"], strict=True)
    difference = max(abs(a - b) / b for a, b in pairs)
    found[1] |= {"largest difference": float(f"{difference:.1e}"), "equal": difference < CURVE_TOLERANCE}
    yield from found


def _fits(part: str, workload: Workload, device: torch.device) -> Iterator[dict[str, Any]]:
    """Three steps of one row of 4096 tokens, each block's activations computed again in backward."""
    found = _measured(part, "ours, 4 bits, checkpointed", workload, device, 2, 3)
    peaks = [found[key] for key in ("peak GiB", "first-step peak GiB", "build peak GiB") if found.get(key)]
    fits = max(peaks) < LIMITS[part] if peaks else None
    yield found | {"limit GiB": LIMITS[part], "fits": fits}


def _measured(
    part: str, name: str, workload: Workload, device: torch.device, warmup: int, steps: int
) -> dict[str, Any]:
    found = measure(name, workload, device, warmup, steps, profile=False)
    found.pop("norms")
    found |= {"part": part, "what": f"{name}, {workload.batch} x {workload.seq}"}
    found |= {"first loss": round(found["losses"][0], 4), "last loss": round(found["losses"][-1], 4)}
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; what is done is written after each. 1 where one is not equal or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["curve", "step", "8b", "70b"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--curve", type=int, default=40)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    known = parts(arguments.cpu, arguments.steps, arguments.curve)
    chosen = itertools.chain.from_iterable(known[name] for name in arguments.parts)
    rows = write_each("qlora", chosen, COLUMNS, arguments.out)
    return int(any(row.get("equal") is False or row.get("fits") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
