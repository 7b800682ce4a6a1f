"""The LoRA op against plain torch, PEFT's formula and other ways to join the low-rank product to the base GEMM.

    python benchmarks/lora_kernel.py --out DIR [--quick]

On one CUDA device, bf16 activations and base, fp32 adapters, T = 8192 tokens, the linear shapes of an 8B model. Equality
comes first: the op's error against an fp32 reference may be at most twice torch's own in bf16. Times are medians in ms
over runs with a cold L2; "step" is forward and backward. Writes DIR/lora_kernel.json; exits 1 where equality fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from nemo_automodel.kernels import lora_triton, reference
from nemo_automodel.kernels.lora import lora_linear

TOKENS = 8192
SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (4096, 28672), (14336, 4096)]  # (K in, N out)
RANKS = [8, 16, 64]
COMPILED_RANK = 16  # the compiled contenders take seconds each to compile
SCALE = 2.0

Tensors = tuple[torch.Tensor, ...]


class Case:
    """One layer: activations, frozen weight, fp32 adapters and an output gradient."""

    def __init__(self, k: int, n: int, rank: int) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        generator = torch.Generator("cuda").manual_seed(0)
        self.x = randn(TOKENS, k).bfloat16().requires_grad_()
        self.weight = (randn(n, k) * k**-0.5).bfloat16()
        self.a = (randn(rank, k) * k**-0.5).requires_grad_()
        self.b = (randn(n, rank) * 0.1).requires_grad_()
        self.dy = randn(TOKENS, n).bfloat16()

    def outputs(self, forward: Callable[..., torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        """y, dX, dA, dB, with activations and weight in ``dtype``."""
        x = self.x.detach().to(dtype).requires_grad_()
        y = forward(x, self.weight.to(dtype), self.a, self.b)
        return [y.detach(), *torch.autograd.grad(y, [x, self.a, self.b], self.dy.to(dtype))]


def base_only(x, w, a, b):
    return F.linear(x, w)


def op(x, w, a, b):
    return lora_linear(x, w, None, a, b, SCALE)


def plain_torch(x, w, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)) * SCALE, b.to(x.dtype))


def peft_fp32_adapters(x, w, a, b):
    y = F.linear(x, w)
    return (y + F.linear(F.linear(x.to(a.dtype), a), b) * SCALE).to(y.dtype)


def peft_bf16_adapters(x, w, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a.bfloat16()), b.bfloat16()) * SCALE


def read_modify_write(x, w, a, b):
    """Base GEMM first, then a kernel that adds the low-rank product to its output (forward only)."""
    y = F.linear(x, w)
    lora_triton.expand(lora_triton.shrink(x, a.t(), SCALE), b.t(), y, add=True)
    return y


def k_extended(case: Case) -> Callable[[], torch.Tensor]:
    """``[x | xa] @ [W | B]^T`` with the weights side by side already; x still has to be copied (forward only)."""
    pad = -case.a.shape[0] % 64
    b = F.pad(case.b.detach().bfloat16(), (0, pad))
    wide = torch.cat([case.weight, b], 1)
    a = F.pad(case.a.detach(), (0, 0, 0, pad))
    return lambda: F.linear(torch.cat([case.x, lora_triton.shrink(case.x, a.t(), SCALE)], 1), wide)


_flush: torch.Tensor | None = None


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median device time of ``run``; the L2 is overwritten before each."""
    global _flush
    if _flush is None:
        _flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run()
    events = []
    for _ in range(repeats):
        _flush.zero_()
        torch.cuda._sleep(1_000_000)  # about half a millisecond, in which the host gets ahead, as in training
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Relative error of the op and of torch's bf16 against fp32, for y, dX, dA and dB."""
    exact = case.outputs(lambda x, w, a, b: reference.lora_linear(x, w, None, a, b, SCALE), torch.float32)
    result: dict[str, dict[str, float]] = {}
    for name, forward in (("op", op), ("torch", plain_torch)):
        for part, value, want in zip(("y", "dx", "da", "db"), case.outputs(forward), exact, strict=True):
            error = (value.float() - want.float()).norm() / want.float().norm()
            result.setdefault(part, {})[name] = error.item()
    return result


def measure(case: Case, rank: int, repeats: int) -> dict[str, dict[str, float]]:
    """Forward and step times of every contender, and the parts the op is made of."""
    contenders: dict[str, Callable[..., torch.Tensor]] = {"base_only": base_only, "op": op, "torch_eager": plain_torch}
    if rank == COMPILED_RANK:
        torch.compiler.reset()
        contenders["torch_compiled"] = torch.compile(plain_torch, dynamic=False)
        contenders["peft_fp32_compiled"] = torch.compile(peft_fp32_adapters, dynamic=False)
        contenders["peft_bf16_compiled"] = torch.compile(peft_bf16_adapters, dynamic=False)
    args = (case.x, case.weight, case.a, case.b)
    forward, step, parts = {}, {}, {}
    for name, contender in contenders.items():
        inputs = [case.x] if name == "base_only" else [case.x, case.a, case.b]

        def run_step(contender=contender, inputs=inputs) -> Tensors:
            return torch.autograd.grad(contender(*args), inputs, case.dy)

        forward[name] = median_ms(lambda contender=contender: contender(*args), repeats)
        step[name] = median_ms(run_step, repeats)
    with torch.no_grad():
        forward["read_modify_write"] = median_ms(lambda: read_modify_write(*args), repeats)
        forward["k_extended"] = median_ms(k_extended(case), repeats)
        x, w, a, b = args
        y, xa = F.linear(x, w), lora_triton.shrink(x, a.t(), SCALE)
        a_half, b_half = a.bfloat16(), b.bfloat16()
        for name, run in {
            "shrink": lambda: lora_triton.shrink(x, a.t(), SCALE),
            "shrink_cublas": lambda: F.linear(x, a_half),
            "expand": lambda: lora_triton.expand(xa, b.t(), y),
            "expand_add": lambda: lora_triton.expand(xa, b.t(), y, add=True),
            "expand_cublas": lambda: torch.mm(xa, b_half.t(), out=y),
            "expand_add_cublas": lambda: y.addmm_(xa, b_half.t()),
            "gradient_a": lambda: lora_triton.gradient(xa, x),
            "gradient_a_cublas": lambda: torch.mm(xa.t(), x),
            "gradient_b": lambda: lora_triton.gradient(xa, case.dy, transposed=True),
            "gradient_b_cublas": lambda: torch.mm(case.dy.t(), xa),
            "gemm_onto_output": lambda: y.addmm_(x, w.t()),
        }.items():
            parts[name] = median_ms(run, repeats)
    return {"forward": forward, "step": step, "parts": parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for lora_kernel.json")
    parser.add_argument("--quick", action="store_true", help="rank 16 only")
    options = parser.parse_args()
    began = time.perf_counter()
    rows, failures = [], []
    ranks = [COMPILED_RANK] if options.quick else RANKS
    for k, n in SHAPES:
        for rank in ranks:
            case = Case(k, n, rank)
            row: dict[str, object] = {"k": k, "n": n, "rank": rank, "tokens": TOKENS}
            row["relative_error"] = found = errors(case)
            for part, error in found.items():
                if error["op"] > 2 * error["torch"]:
                    failures.append(
                        f"K={k} N={n} r={rank} {part}: {error['op']:.2e} against torch's {error['torch']:.2e}"
                    )
            row.update(measure(case, rank, repeats=15))
            rows.append(row)
            print(json.dumps(row), flush=True)
            del case
    report = {
        "benchmark": "lora_kernel",
        "machine": {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": lora_triton.triton.__version__,
        },
        "seconds": time.perf_counter() - began,
        "failures": failures,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lora_kernel.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['seconds']:.0f} s; equality: {'; '.join(failures) or 'holds'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
