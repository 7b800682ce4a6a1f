"""Workload C: full fine-tuning of an 8B shape with FSDP2 on the GPUs of one host, beside a plain FSDP2 loop.

    python -m benchmarks.scale [--gpus 2] [--contenders NAME ...]

Every contender runs under torchrun in processes of its own, with the same weights, tokens, AdamW and clipping: fp32
shards, bf16 compute, fp32 gradient sums. Equality first: the loss of every step and the first gradient norm, against
the plain loop. Then the time of a step, the peak memory of a GPU, and how long a step communicates while no other
kernel runs (exposed). Writes ``results/scale.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import covered, write
from benchmarks.contenders import Contender, _optimizer, ours, ours_fp8_trained
from benchmarks.step import _reset_peak, _speed, _synchronize, optimizer_step
from benchmarks.workloads import LLAMA_8B, TINY, Workload, batches, fill

SHAPE = Workload("C", "Llama-3.1-8B shape, full SFT, FSDP2, 2x4096 tokens a GPU", LLAMA_8B, 2, 4096)
SMALL = Workload("C", "tiny: full SFT, FSDP2", {**TINY, "tie_word_embeddings": False}, 2, 64)
PLAIN, COMPILED, OURS = "plain FSDP2 loop", "plain FSDP2 loop, compiled layers", "ours"
COLUMNS = (
    "contender", "tok/s per GPU", "TFLOP/s per GPU", "step ms", "spread ms", "peak GiB", "communication ms", "exposed ms",
    "loss error", "grad norm error", "equal", "failed",
)  # fmt: skip
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-3, 2e-2


def plain(workload: Workload, device: torch.device, compiled: bool = False) -> Contender:
    """transformers under ``fully_shard``, written out as its documentation shows."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(workload.config())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    for module in model.modules():
        if device.type == "cpu" and isinstance(module, FSDPModule):  # gloo has no mean over ranks
            module.set_gradient_divide_factor(float(dist.get_world_size()))
            module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "inv_freq"):  # a buffer that the meta device left empty
            with torch.device(device):
                module._buffers.update(type(module)(model.config)._buffers)
    fill(model.named_parameters())
    model.train()
    params = list(model.parameters())

    def forward_backward(batch: Any) -> torch.Tensor:
        ids = batch["input_ids"].to(device, non_blocking=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return Contender(
        model, forward_backward, lambda: torch.nn.utils.clip_grad_norm_(params, 1.0), _optimizer(model, device)
    )


BUILDERS: dict[str, Callable[[Workload, torch.device], Contender]] = {
    PLAIN: plain,
    COMPILED: lambda w, d: plain(w, d, compiled=True),
    OURS: ours,
    f"{OURS}, reshard_after_forward: false": lambda w, d: ours(w, d, reshard_after_forward=False),
    f"{OURS}, fp8": lambda w, d: ours_fp8_trained(w, d, "bfloat16"),
    f"{OURS}, fp8, gradients of weights too": lambda w, d: ours_fp8_trained(w, d, "float8"),
}


def measure(name: str, workload: Workload, device: torch.device, warmup: int, steps: int) -> dict[str, Any]:
    """Train ``name`` on this rank's own rows; what rank 0 saw, losses averaged over ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    contender = BUILDERS[name](workload, device)
    data = batches(workload, 4 * world)[rank::world]
    done = []
    for i in range(warmup + steps):
        if i == warmup:
            _reset_peak(device)
        done.append(optimizer_step(contender, data[i % len(data)], device))
    _synchronize(device)
    mean = torch.stack([step.loss.float() for step in done]).to(device)
    if name.startswith(OURS):  # it divides by the label tokens of all ranks: the ranks' shares add up to the mean
        mean *= world
    dist.all_reduce(mean)
    norm: Any = done[0].norm
    speed = _speed(workload, [step.milliseconds() for step in done[warmup:]])
    result = {
        "losses": (mean / world).tolist(),
        # the plain loop's gradient is the mean over ranks of per-rank means, which is ours too: all rows are as long
        "grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm),
        "step ms": speed["step ms"],
        "spread ms": speed["spread ms"],
        "tok/s per GPU": speed["tok/s"],
        "TFLOP/s per GPU": speed["TFLOP/s"],
    }
    if device.type == "cuda":
        result["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        result |= _communication(contender, data)
    return result


def _communication(contender: Contender, data: Any, steps: int = 2) -> dict[str, float]:
    """Milliseconds of a step in NCCL kernels, and those in which nothing else ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for i in range(steps):
            optimizer_step(contender, data[i % len(data)], torch.device("cuda"))
        _synchronize(torch.device("cuda"))
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in trace.events():
        if event.device_type.name == "CUDA":
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    both, compute, nccl = covered(spans[True] + spans[False]), covered(spans[False]), covered(spans[True])
    scale = 1e3 * steps
    return {"communication ms": round(nccl / scale, 1), "exposed ms": round((both - compute) / scale, 1)}


def run_contender(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """``measure`` on every GPU, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus}"]
    command += ["-m", "benchmarks.scale", "--measure", name, "--warmup", str(arguments.warmup)]
    command += ["--steps", str(arguments.steps), *(["--cpu"] if arguments.cpu else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"contender": name, "failed": f"no result within {arguments.limit:.0f} s"}
    found = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode != 0 or not found:
        print(run.stderr[-4000:], flush=True)
        return {"contender": name, "failed": (run.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return {"contender": name, **json.loads(found[-1])}


def judge(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How far a contender's losses and first gradient norm are from the plain loop's."""
    loss = max(abs(a - b) / b for a, b in zip(row["losses"], reference["losses"], strict=True))
    norm = abs(row["grad_norm"] / reference["grad_norm"] - 1)
    equal = loss < LOSS_TOLERANCE and norm < NORM_TOLERANCE
    return {
        "loss error": float(f"{loss:.1e}"),
        "grad norm error": float(f"{norm:.1e}"),
        "equal": "yes" if equal else "NO",
    }


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where a contender failed or is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--limit", type=float, default=200, help="seconds a contender may take")
    parser.add_argument("--cpu", action="store_true", help="a tiny shape on gloo ranks, to exercise the harness")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    workload = SMALL if arguments.cpu else SHAPE
    if arguments.measure:
        local = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu") if arguments.cpu else torch.device("cuda", local)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if arguments.cpu else "cpu:gloo,cuda:nccl")
        found = measure(arguments.measure, workload, device, arguments.warmup, arguments.steps)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        dist.destroy_process_group()
        return 0
    rows: list[dict[str, Any]] = []
    for name in arguments.contenders:
        row = run_contender(name, arguments)
        if "losses" in row and rows and "losses" in rows[0]:
            row |= judge(row, rows[0])
        print({key: row[key] for key in COLUMNS if key in row}, flush=True)
        rows.append(row)
        about = {"C": f"{workload.about}, {arguments.gpus} GPUs"}
        table = write("scale-cpu" if arguments.cpu else "scale", rows, COLUMNS, arguments.out, workloads=about)
    print(table)
    return int(any("failed" in row or row.get("equal", "yes") != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
