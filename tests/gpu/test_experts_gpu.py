"""Grouped experts on a GPU: equal to a loop in fp32, with adapters, in one graph, and without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_automodel._transformers.experts import choose_experts
from nemo_automodel.components._peft.lora import PeftConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def layer(dtype, rank, experts, compiled=False):
    """The mixture of experts of one layer, adapted (rank 0: not), its values the same for every call."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 192, "num_experts": 16, "num_experts_per_tok": 4}
    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if rank:
        PeftConfig(target_parameters=TARGETS, dim=rank, alpha=2 * rank).apply(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.05).bfloat16())
    choose_experts(model, torch.device("cuda"), dtype, experts)
    block = model.model.layers[0].mlp.experts.to("cuda", dtype)
    if compiled:
        block.compile(fullgraph=True)
    return block


def run(block, dtype, tokens=999):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 256, generator=generator).bfloat16().to("cuda", dtype).requires_grad_()
    chosen = torch.stack(
        [torch.randperm(15, generator=generator)[:4] for _ in range(tokens)]
    ).cuda()  # the last gets none
    weights = torch.rand(tokens, 4, generator=generator).bfloat16().to("cuda", dtype).requires_grad_()
    target = torch.randn(tokens, 256, generator=generator).to("cuda", dtype)

    def step():
        y = block(x, chosen, weights)
        y.backward(target)
        return y

    return step, {"x": x, "weights": weights}


def outcome(block, dtype):
    step, inputs = run(block, dtype)
    y = step()
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    return {"y": y.detach(), **{name: p.grad for name, p in {**inputs, **trained}.items()}}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [0, 4, 16])
def test_bf16_is_as_near_to_fp32_as_transformers_own_loop(rank, compiled):
    exact = outcome(layer(torch.float32, rank, "eager"), torch.float32)
    plain = outcome(layer(torch.bfloat16, rank, "eager"), torch.bfloat16)
    ours = outcome(layer(torch.bfloat16, rank, None, compiled), torch.bfloat16)
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        error, limit = ((found[name].float() - value).norm() / value.norm() for found in (ours, plain))
        assert error <= 1.5 * limit + 1e-4, (name, float(error), float(limit))


def test_forward_and_backward_wait_for_nothing():
    step, _ = run(layer(torch.bfloat16, 16, None), torch.bfloat16)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
