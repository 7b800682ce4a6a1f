"""The Triton LoRA op on a GPU: error against fp32, whole adapted blocks, compilation, memory.

Compiled code launches the kernels itself, for all lengths the same code, and with no pass over a result besides.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.kernels import reference
from nemo_automodel.kernels.lora import lora_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCALE = 2.0


def outputs(forward, x, weight, bias, lora_a, lora_b, dy, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, lora_a, lora_b)]
    y = forward(leaves[0], weight, bias, leaves[1], leaves[2], SCALE, **options)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 64, 128])
@pytest.mark.parametrize(("tokens", "k", "n"), [(8192, 1024, 512), (4100, 520, 1000), (33, 2048, 256), (1, 64, 72)])
def test_op_is_within_twice_torchs_own_error(dtype, rank, tokens, k, n):
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", generator=g).to(dtype)
    weight = (torch.randn(n, k, device="cuda", generator=g) * k**-0.5).to(dtype)
    bias = torch.randn(n, device="cuda", generator=g).to(dtype)
    lora_a = torch.randn(rank, k, device="cuda", generator=g) * k**-0.5
    lora_b = torch.randn(n, rank, device="cuda", generator=g)
    dy = torch.randn(tokens, n, device="cuda", generator=g).to(dtype)
    args = (x, weight, bias, lora_a, lora_b, dy)
    exact = outputs(reference.lora_linear, *args, dtype=torch.float64)
    theirs = outputs(reference.lora_linear, *args, dtype=dtype)
    ours = outputs(lora_linear, *args)
    for name, value, same_dtype, want in zip(("y", "dx", "da", "db"), ours, theirs, exact, strict=True):
        error = ((value.double() - want).norm() / want.norm()).item()
        baseline = ((same_dtype.double() - want).norm() / want.norm()).item()
        assert error <= 2 * max(baseline, 2e-7), (name, error, baseline)
    again = outputs(lora_linear, *args)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not deterministic"


class Block(nn.Module):
    def __init__(self, hidden=512, inner=1408):
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def adapted_block(use_triton):
    torch.manual_seed(0)
    block = Block().to("cuda", torch.bfloat16)
    PeftConfig(match_all_linear=True, dim=16, use_triton=use_triton).apply(block)
    for module in (block.gate, block.up, block.down):
        nn.init.normal_(module.lora_B.weight, std=0.02)
    return block


def step(block, forward, x):
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    loss = forward(leaf).float().square().mean()
    loss.backward()
    return [loss.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


def test_adapted_block_equals_plain_torch_eager_and_compiled():
    plain, fast = adapted_block(False), adapted_block(True)
    x = torch.randn(2, 300, 512, device="cuda", dtype=torch.bfloat16)
    want = step(plain, plain, x)
    for forward in (fast, torch.compile(fast, fullgraph=True)):
        for value, expected in zip(step(fast, forward, x), want, strict=True):
            assert value.dtype == expected.dtype
            assert (value.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def test_compiled_code_for_many_lengths_is_as_exact_as_the_op():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(lora_linear, fullgraph=True, backend=counter)
    g = torch.Generator("cuda").manual_seed(0)
    weight = (torch.randn(512, 1024, device="cuda", generator=g) * 1024**-0.5).bfloat16()
    lora_a = torch.randn(16, 1024, device="cuda", generator=g) * 1024**-0.5
    lora_b = torch.randn(512, 16, device="cuda", generator=g)
    for tokens in (4096, 700, 9000, 65, 20000, 2048):
        x, dy = (torch.randn(tokens, n, device="cuda", generator=g).bfloat16() for n in (1024, 512))
        args = (x, weight, None, lora_a, lora_b, dy)
        exact = outputs(reference.lora_linear, *args, dtype=torch.float64)
        theirs = outputs(reference.lora_linear, *args, dtype=torch.bfloat16)
        for value, same_dtype, want in zip(outputs(compiled, *args), theirs, exact, strict=True):
            error, baseline = ((t.double() - want).norm() / want.norm() for t in (value, same_dtype))
            assert error <= 2 * baseline, (tokens, error, baseline)
    assert counter.frame_count <= 2  # one length, then any


def test_compiled_code_launches_the_kernels_itself_and_copies_nothing():
    block = adapted_block(True)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16)
    step(block, compiled, x)
    with torch.profiler.profile() as trace:
        step(block, compiled, x)
        torch.cuda.synchronize()
    called = {event.key for event in trace.key_averages()}
    assert not {name for name in called if "lora_linear" in name}
    kernels = [
        event.name for event in trace.events() if event.device_type.name == "CUDA" and "mem" not in event.name.lower()
    ]
    assert sum("_shrink" in name for name in kernels) == sum("_expand" in name for name in kernels) == 6  # three layers
    assert sum("_gradient" in name for name in kernels) == 6
    copies = [name for name in kernels if "copy" in name.lower() and "triton" not in name]
    assert not copies


@pytest.mark.parametrize("compiled", [False, True])
def test_op_needs_no_more_memory_than_plain_torch(compiled):
    def peak(block):
        block = torch.compile(block) if compiled else block
        x = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        block(x).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(adapted_block(True)) <= 1.01 * peak(adapted_block(False))
