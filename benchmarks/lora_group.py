"""Adapted layers that share an input (q, k and v; gate and up), together and one by one: kernels, plain torch and FP8.

    python benchmarks/lora_group.py --out DIR

On one CUDA device, bf16 activations and base, fp32 adapters of rank 16, T = 8192 tokens, the shapes of workload A. Equality
comes first: the group's error against fp32 may be at most twice that of torch in bf16. Times are medians in ms over runs
with a cold L2; "step" is forward and backward, the sum of the dX included. Writes DIR/lora_group.json; exits 1 where
equality fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a bare checkout

from benchmarks.lora_kernel import SCALE, TOKENS, median_ms
from nemo_automodel.kernels import lora_triton
from nemo_automodel.kernels.fp8 import fp8_linear, has_units, quantize_rows
from nemo_automodel.kernels.lora import lora_linear
from nemo_automodel.kernels.lora_group import lora_linears

GROUPS = {"q,k,v": (4096, (4096, 1024, 1024)), "gate,up": (4096, (14336, 14336))}
RANK = 16

Tensors = list[torch.Tensor]


class Case:
    """A group's activations, frozen weights, fp32 adapters and output gradients."""

    def __init__(self, k: int, ns: tuple[int, ...]) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        generator = torch.Generator("cuda").manual_seed(0)
        self.x = randn(TOKENS, k).bfloat16().requires_grad_()
        self.weights = [(randn(n, k) * k**-0.5).bfloat16() for n in ns]
        self.lora_as = [(randn(RANK, k) * k**-0.5).requires_grad_() for _ in ns]
        self.lora_bs = [(randn(n, RANK) * 0.1).requires_grad_() for n in ns]
        self.dys = [randn(TOKENS, n).bfloat16() for n in ns]

    def quantize(self) -> None:
        self.copies = [(*quantize_rows(w), *quantize_rows(w.t().contiguous())) for w in self.weights]

    def step(self, forward: Callable[[Case, torch.Tensor], Tensors]) -> Tensors:
        """dX, every dA, every dB."""
        return list(torch.autograd.grad(forward(self, self.x), [self.x, *self.lora_as, *self.lora_bs], self.dys))


def one_by_one(case: Case, x: torch.Tensor) -> Tensors:
    parts = zip(case.weights, case.lora_as, case.lora_bs, strict=True)
    return [lora_linear(x, w, None, a, b, SCALE) for w, a, b in parts]


def together(case: Case, x: torch.Tensor) -> Tensors:
    return lora_linears(x, case.weights, [], case.lora_as, case.lora_bs, SCALE)


def plain(base: Callable[[Case, int, torch.Tensor], torch.Tensor], case: Case, x: torch.Tensor) -> Tensors:
    """In plain torch, one by one."""
    pairs = enumerate(zip(case.lora_as, case.lora_bs, strict=True))
    return [base(case, i, x) + F.linear(F.linear(x, a.to(x.dtype)) * SCALE, b.to(x.dtype)) for i, (a, b) in pairs]


def plain_together(base: Callable[[Case, int, torch.Tensor], torch.Tensor], case: Case, x: torch.Tensor) -> Tensors:
    narrow = F.linear(x, torch.cat(case.lora_as).to(x.dtype)) * SCALE
    pairs = enumerate(zip(narrow.split(RANK, dim=-1), case.lora_bs, strict=True))
    return [base(case, i, x) + F.linear(u, b.to(x.dtype)) for i, (u, b) in pairs]


def in_bf16(case: Case, i: int, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, case.weights[i].to(x.dtype))


def in_fp8(case: Case, i: int, x: torch.Tensor) -> torch.Tensor:
    return fp8_linear(x, *case.copies[i])


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Relative error against fp32 of the outputs and of each kind of gradient: the group's and torch's in bf16."""

    def everything(
        forward: Callable[[Case, torch.Tensor], Tensors], dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensors]:
        x = case.x.detach().to(dtype).requires_grad_()
        ys = forward(case, x)
        dx, *factors = torch.autograd.grad(ys, [x, *case.lora_as, *case.lora_bs], [dy.to(dtype) for dy in case.dys])
        n = len(ys)
        return [[y.detach() for y in ys], [dx], factors[:n], factors[n:]]

    def off(found: Tensors, want: Tensors) -> float:
        return max(((f.float() - w).norm() / w.norm()).item() for f, w in zip(found, want, strict=True))

    exact = everything(lambda case, x: plain(in_bf16, case, x), torch.float32)
    ways = {"together": together, "torch": lambda case, x: plain(in_bf16, case, x)}
    results = {name: everything(forward) for name, forward in ways.items()}
    return {
        part: {name: off(found[i], exact[i]) for name, found in results.items()}
        for i, part in enumerate(("y", "dx", "da", "db"))
    }


def measure(case: Case, repeats: int = 15) -> dict[str, dict[str, float]]:
    """Forward and step of every contender, and the parts that a group saves or makes wider."""

    def compiled(
        way: Callable[..., Tensors], base: Callable[..., torch.Tensor]
    ) -> Callable[[Case, torch.Tensor], Tensors]:
        return torch.compile(lambda case, x: way(base, case, x), dynamic=False)

    torch.compiler.reset()
    contenders: dict[str, Callable[[Case, torch.Tensor], Tensors]] = {
        "base only": lambda case, x: [F.linear(x, w) for w in case.weights],
        "kernels, one by one": one_by_one,
        "kernels, together": together,
        "plain torch compiled, one by one": compiled(plain, in_bf16),
        "plain torch compiled, together": compiled(plain_together, in_bf16),
    }
    if has_units(case.x.device):
        case.quantize()
        contenders["FP8 compiled, one by one"] = compiled(plain, in_fp8)
        contenders["FP8 compiled, together"] = compiled(plain_together, in_fp8)
    forward, step, parts = {}, {}, {}
    for name, way in contenders.items():
        inputs = [case.x] if name == "base only" else [case.x, *case.lora_as, *case.lora_bs]
        forward[name] = median_ms(lambda way=way: way(case, case.x), repeats)
        step[name] = median_ms(
            lambda way=way, inputs=inputs: torch.autograd.grad(way(case, case.x), inputs, case.dys), repeats
        )
    with torch.no_grad():
        wide = torch.cat(case.lora_as)
        half, u, x = wide.bfloat16(), lora_triton.shrink(case.x, wide.t()), case.x
        for name, run in {
            "cat of A": lambda: torch.cat(case.lora_as),
            "shrink, one": lambda: lora_triton.shrink(x, case.lora_as[0].t()),
            "shrink, all": lambda: lora_triton.shrink(x, wide.t()),
            "shrink, all, A in bf16": lambda: lora_triton.shrink(x, half.t()),
            "shrink, all, cuBLAS": lambda: F.linear(x, half),
            "gradient of A, one": lambda: lora_triton.gradient(u[:, :RANK], x),
            "gradient of A, all": lambda: lora_triton.gradient(u, x),
            "gradient of A, all, cuBLAS": lambda: u.t() @ x,
            "low-rank dX, one": lambda: lora_triton.expand(u[:, :RANK], case.lora_as[0], torch.empty_like(x)),
            "low-rank dX, all": lambda: lora_triton.expand(u, wide, torch.empty_like(x)),
            "low-rank dX, all, cuBLAS": lambda: u @ half,
        }.items():
            parts[name] = median_ms(run, repeats)
    return {"forward": forward, "step": step, "parts": parts}


def print_table(row: dict[str, Any]) -> None:
    print(f"{row['group']}: ms forward / step")
    for name, ms in row["forward"].items():
        print(f"  {name:36} {ms:.3f} {row['step'][name]:.3f}")
    print("  parts: " + ", ".join(f"{name} {ms:.3f}" for name, ms in row["parts"].items()))
    errors = row["relative_error"].items()
    print("  errors: " + ", ".join(f"{part} {e['together']:.1e} ({e['torch']:.1e})" for part, e in errors), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for lora_group.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for name, (k, ns) in GROUPS.items():
        case = Case(k, ns)
        found = errors(case)
        failures += [f"{name} {part}: {e}" for part, e in found.items() if e["together"] > 2 * e["torch"]]
        rows.append({"group": name, "k": k, "n": ns, "rank": RANK, "tokens": TOKENS, "relative_error": found})
        rows[-1] |= measure(case)
        print_table(rows[-1])
        del case
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": lora_triton.triton.__version__,
    }
    report = {"benchmark": "lora_group", "machine": machine, "failures": failures, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lora_group.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"equality: {'; '.join(failures) or 'holds'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
