"""LoRA over FP8 base weights beside LoRA over bf16 ones, in one process: products, the step of A, a long loss curve.

python -m benchmarks.fp8 [--parts products joined step curve] [--steps 15] [--curve 300] [--cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import milliseconds, write_each
from benchmarks.step import measure
from benchmarks.workloads import WORKLOADS, Workload, tiny
from nemo_automodel.kernels.fp8 import product_with_low_rank, quantize_rows

CONTENDERS = ("ours, fp8", "ours")
SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096))  # tokens, in, out
RANK = 16
CALLS = 10  # of a way between two events, so that the host is ahead as it is in a step
COLUMNS = ["part", "what", "tok/s", "step ms", "spread ms", "peak GiB", "ms", "TFLOP/s", "error", "accumulation error",
           "last loss", "largest difference"]  # fmt: skip


def products() -> list[dict[str, Any]]:
    """Time and error of the matrix products alone, with the accumulator the unit has and with the exact one."""
    rows = []
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens, k, n in SHAPES:
        x = torch.randn(tokens, k, device="cuda", generator=generator).bfloat16()
        weight = torch.randn(n, k, device="cuda", generator=generator).bfloat16() * k**-0.5
        (a, a_scales), (b, b_scales) = quantize_rows(x), quantize_rows(weight)
        wanted = x[:256].double() @ weight.double().t()
        quantised = (a[:256].double() * a_scales[:256]) @ (b.double() * b_scales).t()
        ways = {
            "bf16": lambda x=x, w=weight: x @ w.t(),
            **{
                f"fp8, fast accumulation {fast}": lambda fast=fast, a=a, b=b, s=a_scales, t=b_scales: torch._scaled_mm(
                    a, b.t(), s, t.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
                )
                for fast in (True, False)
            },
        }
        for name, way in ways.items():
            y = way()[:256].double()
            median, _ = milliseconds(way, 3, 12)
            found = {"part": "products", "what": f"{tokens} x {k} x {n}, {name}", "ms": round(median, 3)}
            found["TFLOP/s"] = round(2 * tokens * k * n / median / 1e9)
            found["error"] = float(f"{((y - wanted).norm() / wanted.norm()).item():.2e}")
            if name != "bf16":
                found["accumulation error"] = float(f"{((y - quantised).norm() / quantised.norm()).item():.2e}")
            rows.append(found)
    return rows


def joined() -> list[dict[str, Any]]:
    """A product in FP8 with a low-rank one added by the kernel that makes it, and by products of their own."""
    rows = []
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens, k, n in SHAPES:
        x, weight = (torch.randn(m, k, device="cuda", generator=generator).bfloat16() for m in (tokens, n))
        u, v = (torch.randn(m, RANK, device="cuda", generator=generator).bfloat16() for m in (tokens, n))
        (a, s), (b, t) = quantize_rows(x), quantize_rows(weight)
        exact = (a[:256].double() * s[:256]) @ (b.double() * t).t() + u[:256].double() @ v.double().t()
        alone = partial(torch._scaled_mm, a, b.t(), s, t.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        ways = {
            "fp8 and low-rank in one": partial(product_with_low_rank, a, s, b, t, u, v.t()),
            "fp8, low-rank, their sum": lambda alone=alone, u=u, v=v: alone() + u @ v.t(),
            "fp8 alone": alone,
        }
        for name, way in ways.items():
            median = milliseconds(lambda way=way: [way() for _ in range(CALLS)], 3, 12)[0] / CALLS
            off = ((way()[:256].double() - exact).norm() / exact.norm()).item()
            error = {} if name == "fp8 alone" else {"accumulation error": float(f"{off:.2e}")}
            found = {"part": "joined", "what": f"{tokens} x {k} x {n}, rank {RANK}, {name}", "ms": round(median, 3)}
            rows.append({**found, "TFLOP/s": round(2 * tokens * k * n / median / 1e9), **error})
    return rows


def one_step(workload: Workload, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """The optimizer step of both."""
    rows = [{"part": "step", "what": name, **_measured(name, workload, device, 5, steps)} for name in CONTENDERS]
    return _compared(rows)


def curve(workload: Workload, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """Losses of both over ``steps`` steps of a model of A's width with two layers."""
    rows = [{"part": "curve", "what": name, **_measured(name, workload, device, steps, 0)} for name in CONTENDERS]
    return _compared(rows)


def _measured(name: str, workload: Workload, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    found = measure(name, workload, device, warmup, steps, profile=steps > 0 and "fp8" in name)
    found.pop("norms")
    print(name, found, flush=True)  # at once: a run cut short leaves it
    torch._dynamo.reset()
    gc.collect()
    return found


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours, bf16 = (row["losses"] for row in rows)
    for row in rows:
        row["last loss"] = round(row["losses"][-1], 4)
    rows[0]["largest difference"] = float(f"{max(abs(a - b) / b for a, b in zip(ours, bf16, strict=True)):.1e}")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; what is done is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["products", "joined", "step", "curve"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--curve", type=int, default=300)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.cpu else "cuda")
    whole = tiny(WORKLOADS["A"]) if arguments.cpu else WORKLOADS["A"]
    shallow = replace(whole, shape={**whole.shape, "num_hidden_layers": 2, "vocab_size": 32000}, batch=1, seq=1024)
    shallow = whole if arguments.cpu else shallow
    parts = {
        "products": products,
        "joined": joined,
        "step": lambda: one_step(whole, device, arguments.steps),
        "curve": lambda: curve(shallow, device, arguments.curve),
    }
    rows = itertools.chain.from_iterable(parts[name]() for name in arguments.parts)
    write_each("fp8", rows, COLUMNS, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
