"""Regional compile: blocks in place, names kept, one compilation for equal blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_automodel.components.training.compile import CompileConfig


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


@pytest.mark.parametrize(("enabled", "device", "expected"), [(None, "cpu", False), (None, "cuda", True), (False, "cuda", False), (True, "cpu", True)])  # fmt: skip
def test_on_for_cuda_unless_said_otherwise(enabled, device, expected, monkeypatch):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda self, **options: compiled.append(options))
    blocks = [Block(), Block()]
    config = CompileConfig(enabled=enabled, mode="max-autotune", fullgraph=True, dynamic=False)
    assert config.apply(blocks, torch.device(device)) is expected
    options = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}
    assert compiled == [options] * (2 if expected else 0)


def test_off_where_deterministic_unless_said_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not CompileConfig().apply([], torch.device("cuda"))
    assert CompileConfig(enabled=True).apply([], torch.device("cuda"))


def test_blocks_share_one_compilation_and_compute_the_same():
    blocks = nn.Sequential(*[Block() for _ in range(10)])
    names, x = list(blocks.state_dict()), torch.randn(3, 8, requires_grad=True)
    expected = blocks(x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert CompileConfig(enabled=True, fullgraph=True).apply(list(blocks), x.device)
    torch.testing.assert_close(blocks(x), expected)
    assert list(blocks.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
