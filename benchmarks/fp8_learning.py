"""Whether a model learns in FP8 what it learns in bf16, in as many steps: loss curves on new batches of a small language.

    python -m benchmarks.fp8_learning [--parts whole adapters] [--steps 300] [--base-steps 160] [--base FILE]
        [--contenders NAME ...] [--cpu] [--out DIR]

``whole``: all weights of workload B, from random ones. ``adapters``: LoRA on A's shape, over weights that learnt another
language before. Both beside plain transformers in the same precision as ``ours``: how far two curves are apart that differ
in the order of their sums alone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_each
from benchmarks.contenders import FP32_MASTERS, Contender, build, ours_small_state
from benchmarks.step import optimizer_step
from benchmarks.workloads import WORKLOADS, Workload, canonical, chain_batches, tiny
from nemo_automodel.components.quantization.fp8 import quantize
from nemo_automodel.types import Batch

NAMES = ["ours", "ours, fp8", FP32_MASTERS]
LEARNING_RATES = {"whole": 3e-4, "base": 2e-4, "adapters": 1e-4}
WARMUP = 20  # steps in which the learning rate rises
COLUMNS = ["part", "what", "steps", "first loss", "last loss", "mean difference", "largest difference", "at step"]


def whole(workload: Workload, device: torch.device, steps: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """All weights of ``workload``, from random ones."""
    batches = chain_batches(workload, steps)
    yield from _compared("whole", {n: _losses(build(n, workload, device), batches, "whole", device) for n in names})


def adapters(
    workload: Workload, device: torch.device, steps: int, names: list[str], base_steps: int, file: Path | None
) -> Iterator[dict[str, Any]]:
    """Adapters on weights that were trained on another language, or are in ``file``, which else gets them."""
    if file is not None and file.exists():
        weights = torch.load(file, mmap=True, weights_only=True)
    else:
        base = ours_small_state(replace(workload, lora_rank=None), device, "bfloat16")
        losses = _losses(base, chain_batches(workload, base_steps), "base", device)
        yield _row("adapters", "their base, all weights in bf16", losses)
        weights = {canonical(name): p.detach().cpu() for name, p in base.model.named_parameters()}
        del base
        if file is not None:
            torch.save(weights, partial := file.with_name(f"{file.name}.part"))
            partial.replace(file)
    batches = chain_batches(workload, steps, seed=3)
    curves = {}
    for name in names:
        contender = build(name, workload, device)
        _start_from(contender, weights)
        curves[name] = _losses(contender, batches, "adapters", device)
        del contender
    yield from _compared("adapters", curves)


@torch.no_grad()
def _start_from(contender: Contender, weights: dict[str, torch.Tensor]) -> None:
    """Give the model ``weights``, and adapters that change nothing yet."""
    for name, parameter in contender.model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
        elif "lora_A" not in name:
            parameter.copy_(weights[canonical(name)])
    quantize(contender.model)
    trained = [p for p in contender.model.parameters() if p.requires_grad]
    stepped = [p for group in contender.optimizer.param_groups for p in group["params"]]
    for own, held in zip(trained, stepped, strict=True):  # two where the optimizer has masters of its own
        held.copy_(own)


def _losses(contender: Contender, batches: list[Batch], part: str, device: torch.device) -> list[float]:
    """Of a step on each of ``batches``."""
    taken = []
    for step, batch in enumerate(batches):
        for group in contender.optimizer.param_groups:
            group["lr"] = LEARNING_RATES[part] * min(1.0, (step + 1) / WARMUP)
        taken.append(optimizer_step(contender, batch, device).loss)
    losses = [round(float(loss), 5) for loss in taken]
    torch._dynamo.reset()
    gc.collect()
    return losses


def _row(part: str, name: str, losses: list[float]) -> dict[str, Any]:
    ends = {"first loss": losses[0], "last loss": losses[-1]}
    return {"part": part, "what": name, "steps": len(losses), **ends, "losses": losses}


def _compared(part: str, curves: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """A row for each curve; differences are relative to that of ``ours``, where it is among them."""
    for name, losses in curves.items():
        row = _row(part, name, losses)
        if name != NAMES[0] and NAMES[0] in curves:
            off = [abs(a - b) / b for a, b in zip(losses, curves[NAMES[0]], strict=True)]
            row |= {
                "mean difference": float(f"{statistics.mean(off):.1e}"),
                "largest difference": float(f"{max(off):.1e}"),
                "at step": off.index(max(off)),
            }
        yield row


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for; what is done is written after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["whole", "adapters"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base-steps", type=int, default=160)
    parser.add_argument("--base", type=Path, default=None, help="file of the adapters' base, which runs share")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.cpu else "cuda")
    a, b = (tiny(WORKLOADS[name]) if arguments.cpu else WORKLOADS[name] for name in "AB")
    steps, names = arguments.steps, arguments.contenders
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "whole": lambda: whole(b, device, steps, names),
        "adapters": lambda: adapters(a, device, steps, names, arguments.base_steps, arguments.base),
    }
    rows = itertools.chain.from_iterable(parts[name]() for name in arguments.parts)
    write_each("fp8-learning", rows, COLUMNS, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
