"""FP8 products on a GPU: what the matrix units make of quantised operands, in both directions, compiled blocks included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.fp8 import Fp8Config
from nemo_automodel.kernels import fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and fp8.has_units(torch.device("cuda"))), reason="needs a GPU with FP8 units"
    ),
]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("tokens", "k", "n"), [(8192, 4096, 1024), (4096, 14336, 4096), (33, 512, 272), (1, 256, 256)])
def test_products_add_next_to_nothing_to_the_error_of_quantising(tokens, k, n):
    """Against float64 products of the operands as they were: 2% more than exact sums of the quantised ones are off."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", generator=g).bfloat16().requires_grad_()
    weight = torch.randn(n, k, device="cuda", generator=g).bfloat16() * k**-0.5
    dy = torch.randn(tokens, n, device="cuda", generator=g).bfloat16()
    copies = [*fp8.quantize_rows(weight), *fp8.quantize_rows(weight.t().contiguous())]
    y = fp8.fp8_linear(x, *copies)
    y.backward(dy)
    pairs = ((y, x, weight.t(), copies[:2]), (x.grad, dy, weight, copies[2:]))
    for value, operand, factor, (values, scales) in pairs:
        rows, row_scales = fp8.quantize_rows(operand.detach())
        summed_exactly = (rows.double() * row_scales) @ (values.double() * scales).t()
        exact = operand.double() @ factor.double()
        assert error(value, exact) <= 1.02 * error(summed_exactly, exact)
        assert error(value, exact) < 0.05


@pytest.mark.parametrize("fp8_grad_weight", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n"), [(8192, 4096, 1024), (333, 512, 272)])
def test_trained_weights_too(tokens, k, n, fp8_grad_weight):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(n, k, device="cuda", generator=g) * k**-0.5).bfloat16().requires_grad_()
    dy = torch.randn(tokens, n, device="cuda", generator=g).bfloat16()
    y = fp8.fp8_dynamic_linear(x, weight, fp8_grad_weight)
    y.backward(dy)
    dx, x, w = x.grad, x.detach(), weight.detach()
    for value, left, right in ((y, x, w), (dx, dy, w.t()), (weight.grad, dy.t(), x.t())):
        exact = left.double() @ right.double().t()
        if value is weight.grad and not fp8_grad_weight:
            assert error(value, exact) < 0.004
            continue
        (a, s), (b, t) = fp8.quantize_rows(left.contiguous()), fp8.quantize_rows(right.contiguous())
        summed_exactly = (a.double() * s) @ (b.double() * t).t()
        assert error(value, exact) <= 1.02 * error(summed_exactly, exact)
        assert error(value, exact) < 0.05


@pytest.mark.parametrize("rank", [4, 16, 128])
@pytest.mark.parametrize(
    ("tokens", "k", "n"), [(8192, 4096, 14336), (4096, 14336, 4096), (8192, 4096, 1024), (33, 512, 272), (1, 256, 256)]
)
def test_a_low_rank_product_joins_with_one_rounding_and_without_waiting(tokens, k, n, rank):
    """No further from the exact sum than the two products on their own and added; fp32 factors, either way round."""
    g = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(rows, k, device="cuda", generator=g).bfloat16() for rows in (tokens, n))
    u = torch.randn(tokens, rank, device="cuda", generator=g).bfloat16()
    (x, x_scales), (w, w_scales) = fp8.quantize_rows(x), fp8.quantize_rows(w)
    for v in (torch.randn(n, rank, device="cuda", generator=g).t(), torch.randn(rank, n, device="cuda", generator=g)):
        low_rank = u.double() @ v.bfloat16().double()
        apart = torch._scaled_mm(x, w.t(), x_scales, w_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        apart = apart + u @ v.bfloat16()
        exact = (x.double() * x_scales) @ (w.double() * w_scales).t() + low_rank
        fp8.product_with_low_rank(x, x_scales, w, w_scales, u, v)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            joined = fp8.product_with_low_rank(x, x_scales, w, w_scales, u, v)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert error(joined, exact) <= error(apart, exact)
        assert torch.equal(joined, fp8.product_with_low_rank(x, x_scales, w, w_scales, u, v))


class Block(nn.Module):
    def __init__(self, hidden=512, inner=1408):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def block(quantised, adapters, grad_weight="bfloat16"):
    torch.manual_seed(0)
    made = Block().to("cuda", torch.bfloat16)
    peft = PeftConfig(match_all_linear=True, dim=16) if adapters else None
    if peft is not None:
        peft.apply(made)
    for module in (made.gate, made.up, made.down) if adapters else ():
        nn.init.normal_(module.lora_B.weight, std=0.02)
    if quantised:
        device = torch.device("cuda")
        assert Fp8Config(grad_weight=grad_weight).apply([made], torch.bfloat16, device, peft)
    return made


@pytest.mark.parametrize(("adapters", "grad_weight"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float8")])
def test_a_block_is_close_to_bf16_and_compiles_whole(adapters, grad_weight):
    x = torch.randn(2, 300, 512, device="cuda", dtype=torch.bfloat16)
    results = []
    plain, quantised = block(False, adapters), block(True, adapters, grad_weight)
    for made, forward in (
        (plain, plain),
        (quantised, quantised),
        (quantised, torch.compile(quantised, fullgraph=True)),
    ):
        made.zero_grad()
        leaf = x.clone().requires_grad_()
        forward(leaf).float().square().mean().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in made.parameters() if p.requires_grad)])
    bound = math.hypot(0.06, 0.05) if grad_weight == "float8" else 0.06  # what one product adds, by the test above
    for bf16, eager, compiled in zip(*results, strict=True):
        assert error(eager, bf16.double()) < bound
        assert error(compiled, bf16.double()) <= 1.1 * error(eager, bf16.double())  # it rounds at other places
