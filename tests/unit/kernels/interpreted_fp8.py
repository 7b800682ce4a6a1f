"""The kernel that joins an FP8 product with a low-rank one, run by Triton's interpreter (``test_fp8_op.py`` starts this file).

Claims: no further from the exact sum than its one rounding, for odd shapes, ranks and strides; adapters on FP8 layers go
through it and give what two products do; it is a well-formed torch op.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.fp8 import Fp8Config
from nemo_automodel.kernels import fp8, fp8_triton


def operands(tokens, k, n, rank, dtype=torch.float32, transposed=False):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, k, generator=g).bfloat16(), torch.randn(n, k, generator=g).bfloat16() * k**-0.5
    v = torch.randn(n, rank, generator=g).t() if transposed else torch.randn(rank, n, generator=g)
    return *fp8.quantize_rows(x), *fp8.quantize_rows(w), torch.randn(tokens, rank, generator=g).bfloat16(), v.to(dtype)


def exact(x, x_scales, w, w_scales, u, v):
    return (x.double() * x_scales) @ (w.double() * w_scales).t() + u.double() @ v.bfloat16().double()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "k", "n", "rank"),
                         [(130, 48, 272, 5), (1, 160, 16, 16), (300, 256, 528, 33), (17, 16, 16, 128)])  # fmt: skip
def test_it_rounds_once(tokens, k, n, rank, dtype, transposed):
    case = operands(tokens, k, n, rank, dtype, transposed)
    y = fp8.product_with_low_rank(*case)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(*case), rtol=2**-8, atol=1e-5)


def test_more_tiles_than_programs():
    case = operands(600, 32, 800, 3)
    assert fp8_triton._multiprocessors(torch.device("cpu")) < 5 * 4
    torch.testing.assert_close(fp8.product_with_low_rank(*case).double(), exact(*case), rtol=2**-8, atol=1e-5)


def adapted_layer(bias):
    layer = nn.Sequential(nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)).requires_grad_(False)
    adapters = PeftConfig(match_all_linear=True, dim=4, use_triton=True)
    adapters.apply(layer)
    assert Fp8Config(min_features=16).apply([layer], torch.bfloat16, torch.device("cpu"), adapters)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_on_fp8_layers_go_through_it(bias, monkeypatch):
    torch.manual_seed(0)
    layer = adapted_layer(bias)
    nn.init.normal_(layer[0].lora_B.weight, std=0.1)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    dy = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    calls = []
    kernel = fp8_triton.product_with_low_rank
    monkeypatch.setattr(fp8_triton, "product_with_low_rank", lambda *given: calls.append(1) or kernel(*given))
    found = []
    for by_kernel in (True, False):
        layer[0].lora_use_triton = by_kernel
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append([y.detach(), leaf.grad, layer[0].lora_A.weight.grad, layer[0].lora_B.weight.grad])
        assert len(calls) == 2
    for joined, apart in zip(*found, strict=True):
        assert joined.dtype == apart.dtype
        torch.testing.assert_close(joined.float(), apart.float(), rtol=2**-6, atol=2**-6)


def test_other_activations_go_by_two_products():
    layer = adapted_layer(bias=True)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    assert layer[0].lora_B.weight.grad.abs().max() > 0


def test_it_is_a_well_formed_op():
    op = torch.ops.automodel.fp8_product_with_low_rank.default
    some = ("test_faketensor", "test_autograd_registration")  # others multiply single FP8 numbers, which torch cannot
    results = torch.library.opcheck(op, operands(20, 32, 48, 4), test_utils=some)
    assert set(results.values()) == {"SUCCESS"}
