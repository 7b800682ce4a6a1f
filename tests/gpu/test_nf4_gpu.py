"""Four-bit base weights on a GPU: adapted blocks against the same weights unpacked, compiled or not, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.nf4 import Nf4Linear, QuantizationConfig, nf4_layers

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class Block(nn.Module):
    def __init__(self, hidden=512, inner=1408):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def blocks(use_triton):
    """A four-bit block, and one of plain layers with the weights that it unpacks."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        made = Block().to("cuda", torch.bfloat16)
        PeftConfig(match_all_linear=True, dim=16, use_triton=use_triton).apply(made)
        for module in (made.gate, made.up, made.down):
            nn.init.normal_(module.lora_B.weight, std=0.02)
        found.append(made)
    packed, whole = found
    assert QuantizationConfig().apply(packed, [packed], torch.device("cuda"))
    for module, other in zip((packed.gate, packed.up, packed.down), (whole.gate, whole.up, whole.down), strict=True):
        assert isinstance(module, Nf4Linear)
        other.weight.data.copy_(module.weight)
    return packed, whole


def gradients(forward, block, x):
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    y.float().square().mean().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


def off(found, expected):
    """Relative errors of the output, the input's gradient and each parameter's."""
    return [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("use_triton", [False, True])
def test_an_adapted_block_computes_what_its_unpacked_weights_give(use_triton):
    x = torch.randn(2, 300, 512, device="cuda", dtype=torch.bfloat16)
    packed, whole = blocks(use_triton)
    exact = copy.deepcopy(whole).float()
    exact = gradients(exact, exact, x.float())
    plain = off(gradients(whole, whole, x), exact)
    eager = off(gradients(packed, packed, x), exact)
    compiled = off(gradients(torch.compile(packed, fullgraph=True), packed, x), exact)
    for name, found in (("eager", eager), ("compiled", compiled)):  # sums and roundings are in another order, no more
        assert all(a <= 1.25 * b for a, b in zip(found, plain, strict=True)), (name, found, plain)


def test_no_whole_weight_outlives_its_product():
    packed, _ = blocks(True)
    x = torch.randn(1, 16, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    forward = torch.compile(packed, fullgraph=True)
    forward(x).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward(x)
    kept = torch.cuda.memory_allocated() - before
    whole = sum(2 * layer.packed_parameters for layer in nf4_layers(packed))
    assert kept < whole / 4
    y.sum().backward()
