"""The floor of each part of a training step on the machine at hand: what explains a target that is missed.

    python -m benchmarks.floors [--workloads A A8 B "B'" C D] [--seconds 1.5] [--cpu] [--out DIR]

Measured: the matrix products of every linear layer and of attention, with the shapes, counts and order of a step, back to
back for ``--seconds``, at the clock that the chip keeps under that load; ``burst ms`` is the same from a rested chip, 10 ms
a kind of product. ``host ms`` is what issuing a step's calls took: where it is near ``ms``, the host was measured.
The rest is bytes that must move (``floor_work.py`` derives them), at the bandwidth of a copy on the same card. The sum has no
idle time and no overlap in it. B, B' and D are in pure bf16, as their targets; D's images are no blocks of attention and its
tower's features are not kept; C is what one GPU of two does, without communication and its buffers.

The optimizer, reading gradients for their norm included, moves 16 bytes a trained weight in pure bf16 (weight 2 + 2, gradient
2 + 2, moments 4 + 4) and 32 with fp32 weights (A's adapters); C 38, a cast to bf16 besides, of the half that a GPU keeps.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floor_work, scale
from benchmarks.common import write
from benchmarks.floor_work import Attention, Product
from benchmarks.step import _now, _synchronize
from benchmarks.vision import D
from benchmarks.workloads import WORKLOADS, Workload
from nemo_automodel.components.attention.function import attention
from nemo_automodel.kernels.fp8 import quantize_rows
from nemo_automodel.kernels.linear_ce import _accumulate_product

BURST_MS = 10.0
REST_S = 0.05  # before a burst
MOST_PASSES = 2000
COLUMNS = ["workload", "part", "ms", "burst ms", "host ms", "TFLOP/s", "GB", "tok/s", "burst tok/s", "target tok/s",
           "what", "failed"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A workload, its target in tokens a second (of one GPU), and what its optimizer moves."""

    workload: Workload
    target: int
    bytes_per_weight: int
    fp8: bool = False
    ranks: int = 1


BF16_UPDATE, FP32_UPDATE, FP32_UPDATE_AND_CAST = 16, 32, 38
CASES = {
    "A": Case(WORKLOADS["A"], 17_500, FP32_UPDATE),
    "A8": Case(WORKLOADS["A"], 23_000, FP32_UPDATE, fp8=True),
    "B": Case(WORKLOADS["B"], 66_000, BF16_UPDATE),
    "B'": Case(WORKLOADS["B'"], 74_000, BF16_UPDATE),
    "C": Case(scale.SHAPE, 12_200, FP32_UPDATE_AND_CAST, ranks=2),
    "D": Case(D, 19_000, BF16_UPDATE),
}


# --- calls that do it ------------------------------------------------------------------------------------------------


class Operands:
    """Random numbers (zeros would draw less power) and room for results: one tensor for each use and shape."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[Hashable, Any] = {}

    def call(self, product: Product) -> Callable[[], Any]:
        """What does ``product``; weights are those of its layer."""
        rows, n_in, n_out = product.rows, product.n_in, product.n_out
        if product.fp8:
            inner, outer = (n_in, n_out) if product.kind == "forward" else (n_out, n_in)
            factors = self._quantised("", rows, inner), self._quantised(product.layer, outer, inner)
            return partial(_fp8_product, *factors)
        if product.kind == "dW":
            a, b = self._numbers("", rows, n_out).t(), self._numbers("", rows, n_in)
            if product.beta is not None:
                return partial(_accumulate_product, self._room(torch.float32, n_out, n_in), a, b, product.beta)
            return partial(torch.mm, a, b, out=self._room(torch.bfloat16, n_out, n_in))
        weight = self._numbers(product.layer, n_out, n_in)
        if product.kind == "forward":
            return partial(
                torch.mm, self._numbers("", rows, n_in), weight.t(), out=self._room(torch.bfloat16, rows, n_out)
            )
        return partial(torch.mm, self._numbers("", rows, n_out), weight, out=self._room(torch.bfloat16, rows, n_in))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _numbers(self, use: str, rows: int, columns: int) -> Tensor:
        def make() -> Tensor:
            drawn = torch.randn(rows, columns, device=self.device, dtype=torch.bfloat16)
            return drawn.mul_(0.02) if use else drawn

        return self._once(("numbers", use, rows, columns), make)

    def _quantised(self, use: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return self._once(("fp8", use, rows, columns), lambda: quantize_rows(self._numbers(use, rows, columns)))

    def _room(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        return self._once((dtype, rows, columns), lambda: torch.zeros(rows, columns, device=self.device, dtype=dtype))


def _fp8_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """``a`` [T, F] times the transpose of ``b`` [M, F], each with a scale a row; on a CPU the same in fp32."""
    (x, x_scales), (weight, scales) = a, b
    if x.is_cuda:
        return torch._scaled_mm(x, weight.t(), x_scales, scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return ((x.float() @ weight.float().t()) * x_scales * scales.t()).bfloat16()


def attention_call(shape: Attention, device: torch.device) -> Callable[[], Any]:
    """What does one layer's attention, by the function that models train with."""
    rows, length = (1, shape.rows * shape.length) if shape.packed else (shape.rows, shape.length)

    def draw(heads: int) -> Tensor:  # laid out as projections leave them
        drawn = torch.randn(rows, length, heads, shape.size, device=device, dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_(shape.backward)

    q, k, v = (draw(heads) for heads in (shape.heads, shape.groups, shape.groups))
    gradient = torch.randn(rows, length, shape.heads, shape.size, device=device, dtype=torch.bfloat16)
    options: dict[str, Any] = {"is_causal": shape.causal, "sliding_window": shape.window}
    if shape.packed:
        bounds = torch.arange(0, length + 1, shape.length, device=device, dtype=torch.int32)
        options |= {"cu_seq_lens_q": bounds, "max_length_q": shape.length}
    module = nn.Module()

    def call() -> Any:
        out, _ = attention(module, q, k, v, None, **options)
        return torch.autograd.grad(out, (q, k, v), gradient) if shape.backward else out

    return call


# --- how long it takes -----------------------------------------------------------------------------------------------


def _time(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Milliseconds a call of ``repeats`` back to back."""
    start = _now(device)
    for _ in range(repeats):
        call()
    end = _now(device)
    _synchronize(device)
    return _elapsed(start, end) / repeats


def _elapsed(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(end, float) else start.elapsed_time(end)


def burst(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds a call for the first ``BURST_MS`` after a rest."""
    _time(call, 1, device)
    repeats = max(1, min(100, round(BURST_MS / max(_time(call, 1, device), 1e-3))))
    if device.type == "cuda":
        time.sleep(REST_S)
    return _time(call, repeats, device)


def sustained(
    calls: Sequence[Callable[[], Any]], seconds: float, estimate: float, device: torch.device
) -> tuple[float, float]:
    """Milliseconds of all ``calls`` once, run again and again for ``seconds``, the first third left out; the host's share.

    ``estimate`` is what they should take.
    """
    passes = min(MOST_PASSES, max(3, math.ceil(seconds * 1e3 / estimate)))
    marks, host = [_now(device)], 0.0
    started = time.perf_counter()
    for _ in range(passes):
        for call in calls:
            call()
        marks.append(_now(device))
        host = host or (time.perf_counter() - started) * 1e3  # of the first pass: later ones may wait in a full queue
    _synchronize(device)
    times = [_elapsed(a, b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times[passes // 3 :]), host


def timed(
    part: str, work: Sequence[Any], make: Callable[[Any], Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, Any]:
    """The row of ``work``, products or attention, in its order."""
    calls = [make(item) for item in work]
    once = {item: burst(call, device) for item, call in dict(zip(work, calls, strict=True)).items()}
    rested = sum(once[item] for item in work)
    steady, host = sustained(calls, seconds, rested, device)
    row = {"part": part, "ms": round(steady, 3), "burst ms": round(rested, 3), "host ms": round(host, 3)}
    return row | {"TFLOP/s": round(sum(item.flops for item in work) / steady / 1e9, 1)}


def measured_attention(part: str, work: list[Attention], seconds: float, device: torch.device) -> dict[str, Any]:
    made = {shape: attention_call(shape, device) for shape in set(work)}
    shape = work[0]
    what = (
        f"{len(work)} layers, {shape.rows} x {shape.length} tokens, {shape.heads}/{shape.groups} heads of {shape.size}"
    )
    return timed(part, work, made.__getitem__, seconds, device) | {"what": what}


def measured_products(part: str, work: list[Product], seconds: float, device: torch.device) -> dict[str, Any]:
    counts = [f"{sum(p.kind == kind for p in work)} {kind}" for kind in ("forward", "dX", "dW")]
    in_fp8 = sum(p.fp8 for p in work)
    what = ", ".join(counts) + f"; {in_fp8} of them in FP8" * bool(in_fp8)
    return timed(part, work, Operands(device).call, seconds, device) | {"what": what}


def device_copy(seconds: float, device: torch.device) -> dict[str, Any]:
    """A copy between two large tensors: bytes read and written."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**18, device=device)
    target = torch.empty_like(source)
    call = partial(target.copy_, source)
    rested = burst(call, device)
    steady, _ = sustained([call], seconds, rested, device)
    gigabytes = 2 * source.nbytes / 1e9
    what = f"{gigabytes / steady:.3g} TB/s"
    return {"workload": "all", "part": "device copy", "ms": round(steady, 3), "burst ms": round(rested, 3),
            "GB": round(gigabytes, 3), "what": what, "GB per ms": gigabytes / steady}  # fmt: skip


def moved(part: str, count: float, gb_per_ms: float, what: str | None = None) -> dict[str, Any]:
    """The row of ``count`` bytes that must move."""
    return {"part": part, "ms": round(count / 1e9 / gb_per_ms, 3), "GB": round(count / 1e9, 3), "what": what}


def parts(case: Case, seconds: float, gb_per_ms: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each part of ``case``'s step."""
    workload = case.workload
    model = floor_work.on_meta(workload)
    work, seen = floor_work.products(workload, model, device.type, case.fp8)
    yield measured_products("products", work, seconds, device)
    if case.fp8:
        yield moved("quantising", floor_work.quantising_bytes(workload, model), gb_per_ms)
    layers, tower_layers = floor_work.attentions(workload, model)
    yield measured_attention("attention", layers, seconds, device)
    elementwise = f"{floor_work.block_bytes(workload, model):,} bytes a token and layer"
    yield moved("elementwise", floor_work.elementwise_bytes(workload, model), gb_per_ms, elementwise)
    if seen:
        yield measured_products("tower: products", seen, seconds, device)
        yield measured_attention("tower: attention", tower_layers, seconds, device)
        yield moved("tower: elementwise", floor_work.tower_bytes(workload, model), gb_per_ms)
    if workload.lora_rank:
        yield moved(
            "LoRA",
            floor_work.adapter_bytes(workload, model),
            gb_per_ms,
            f"{len(floor_work.adapted(workload, model))} layers",
        )
    yield moved(
        "loss rows", floor_work.loss_bytes(workload, model), gb_per_ms, f"{floor_work.labels_of(workload):,} labels"
    )
    weights = floor_work.trained_weights(workload, model) // case.ranks
    update = f"{weights:,} weights, {case.bytes_per_weight} bytes each"
    yield moved("optimizer", weights * case.bytes_per_weight, gb_per_ms, update)


def total(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of ``rows`` beside the target; TFLOP/s are the model's, by the workload's own formula."""
    steady, rested = sum(row["ms"] for row in rows), sum(row.get("burst ms", row["ms"]) for row in rows)
    tokens = case.workload.tokens
    return {
        "part": "sum",
        "ms": round(steady, 3),
        "burst ms": round(rested, 3),
        "TFLOP/s": round(case.workload.flops() / steady / 1e9, 1),
        "tok/s": round(tokens / steady * 1e3),
        "burst tok/s": round(tokens / rested * 1e3),
        "target tok/s": case.target,
        "what": case.workload.about + "; one GPU, without communication" * (case.ranks > 1),
    }


def run_case(name: str, case: Case, seconds: float, gb_per_ms: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one workload; a failure is a row too."""
    rows: list[dict[str, Any]] = []
    try:
        for row in parts(case, seconds, gb_per_ms, device):
            rows.append(row)
            yield {"workload": name, **row}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield {"workload": name, **total(case, rows)}
    except Exception as error:
        yield {"workload": name, "failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}


def main(argv: list[str] | None = None) -> int:
    """Every workload asked for; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=1.5, help="how long a load is kept up")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to exercise the program")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.cpu else "cuda")
    rows = [device_copy(arguments.seconds, device)]
    gb_per_ms = rows[0].pop("GB per ms")
    table = ""
    for name in arguments.workloads:
        case = CASES[name]
        if arguments.cpu:
            case = replace(case, workload=scale.SMALL if name == "C" else case.workload.tiny())
        for row in run_case(name, case, arguments.seconds, gb_per_ms, device):
            print({key: row[key] for key in COLUMNS if row.get(key) is not None}, flush=True)
            rows.append(row)
            table = write("floors-cpu" if arguments.cpu else "floors", rows, COLUMNS, arguments.out)
    print(table)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
