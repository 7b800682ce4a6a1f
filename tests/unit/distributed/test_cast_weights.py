"""Full fine-tuning on one rank with fp32 weights computed with in bf16: each block casts its own.

Claims: (1) nothing is left to FSDP2, and loss and gradients are those of plain transformers in bf16, gradients cast to fp32,
whatever the family, tied weights and activation checkpointing; FSDP2 itself computes the same; (2) micro-batches add up in
fp32; (3) outside of a forward, one that raised too, weights are as stored; (4) blocks of one class share one compilation;
(5) layers that keep their weights elsewhere besides stay with FSDP2; (6) ``auto`` counts what casts take.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel.components.distributed.auto_checkpointing import AutoCheckpointing
from nemo_automodel.components.distributed.cast_weights import casts
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from tests.builders import tiny_config
from tests.unit.distributed.test_one_rank import require_fp32_sums, whole

IDS = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3_moe": {},
}


@pytest.fixture(scope="module")
def env():
    env = DistEnv(device="cpu")
    yield env
    env.shutdown()


def config_of(family):
    return tiny_config("llama" if family == "tied" else family, **FAMILIES[family])


def build(env, family="llama", **manager):
    torch.manual_seed(0)
    options = {"distributed": FSDP2Manager(env=env, **manager), "dtype": "bfloat16", "master_dtype": "float32"}
    return NeMoAutoModelForCausalLM.from_config(config_of(family), attn_implementation="eager", **options).train()


def step(model, ids=IDS):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def plain_bf16(model):
    """transformers' own model with the same weights, rounded to bf16."""
    weights = {name: whole(value).bfloat16() for name, value in model.state_dict().items()}
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="eager")
    plain.load_state_dict(weights)
    return plain.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_plain_transformers_in_bf16_with_gradients_in_fp32(family, env):
    model = build(env, family)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [m for m in find_blocks(model) if isinstance(m, FSDPModule)]
    logits = model(input_ids=IDS, use_cache=False).logits
    plain = plain_bf16(model)
    assert torch.equal(logits, plain(input_ids=IDS, use_cache=False).logits)
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * weight).sum().backward()
    (plain(input_ids=IDS, use_cache=False).logits * weight).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name].float()), name


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
@pytest.mark.parametrize("family", ["tied", "qwen3_moe"])
def test_it_is_the_step_of_fsdp2(family, checkpointing, env):
    loss, gradients = step(build(env, family, activation_checkpointing=checkpointing))
    model = build(env, family, reshard_after_forward=True)  # asked to free casts in between, which FSDP2 does
    assert all(isinstance(block, FSDPModule) for block in find_blocks(model))
    expected_loss, expected = step(model)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def test_micro_batches_add_up_in_fp32(env):
    parts = []
    for micro_batches in ([0], [1], [0, 1]):
        model = build(env, "tied")
        for i in micro_batches:
            step(model, IDS[i : i + 1])
        parts.append({name: p.grad for name, p in model.named_parameters()})
    require_fp32_sums(*parts)


def test_weights_are_as_stored_outside_of_a_forward_and_after_one_that_raised(env):
    model = build(env, "tied", activation_checkpointing="full")
    stored = dict(model.named_parameters())
    names = {type(module).__name__ for module in find_blocks(model)}
    assert names == {type(module).__name__ for module in find_blocks(plain_bf16(model))}
    seen = []
    handle = find_blocks(model)[1].mlp.register_forward_hook(lambda m, *_: seen.append(m.up_proj.weight.dtype))
    step(model)
    assert set(seen) == {torch.bfloat16}  # when it is computed again, too
    assert all(p is stored[name] for name, p in model.named_parameters())
    handle.remove()

    def fail(*_):
        raise RuntimeError("planted")

    find_blocks(model)[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        step(model)
    assert all(p is stored[name] for name, p in model.named_parameters())


def test_weights_set_after_sharding_are_the_ones_that_are_cast(env):
    model = build(env)
    block = find_blocks(model)[0]
    block.mlp.down_proj.weight = nn.Parameter(torch.zeros_like(block.mlp.down_proj.weight))
    seen = []
    block.mlp.register_forward_hook(lambda m, args, result: seen.append(result))
    step(model)
    assert seen[0].dtype == torch.bfloat16
    assert not seen[0].any()


class Small(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_compiled_blocks_of_a_class_share_one_compilation_and_classes_do_not_count_for_each_other(env):
    kinds = [
        type(f"Kind{i}", (Small,), {"forward": lambda self, x, i=i: Small.forward(self, x) * i}) for i in range(10)
    ]
    blocks = [kind(8, 8) for kind in kinds for _ in range(2)]
    model = nn.Sequential(*blocks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    FSDP2Manager(env=env).parallelize(model, blocks, torch.bfloat16)
    assert all(casts(block) == set(block.parameters()) for block in blocks)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds)
    assert all(block.weight.grad.dtype == torch.float32 for block in blocks)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.outer(self.inner(x)[0])


def test_layers_that_keep_a_list_of_their_weights_stay_with_fsdp2(env):
    torch.manual_seed(0)
    block = Recurrent()
    plain = copy.deepcopy(block).bfloat16()
    model = nn.Sequential(block)
    FSDP2Manager(env=env).parallelize(model, [block], torch.bfloat16)
    assert casts(block) == set(block.outer.parameters())
    assert isinstance(block, FSDPModule)
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    found, expected = model(x), plain(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(p.grad), q.grad.float()), name


def test_auto_counts_casts_that_stay_from_forward_to_backward(env):
    """Of a model of many wide layers and few tokens, casts are most of what a forward keeps."""
    torch.manual_seed(0)
    config = tiny_config("llama", num_hidden_layers=6, intermediate_size=1024)
    model = AutoModelForCausalLM.from_config(config).train()
    blocks = find_blocks(model)
    manager = FSDP2Manager(env=env)
    auto = AutoCheckpointing(model, blocks, torch.device("cpu"), lambda f: f, lambda: None, free=lambda: 0)
    manager.parallelize(model, blocks, torch.bfloat16)
    model(input_ids=IDS, use_cache=False)
    weights = 2 * sum(p.numel() for p in blocks[0].parameters())
    estimate = auto.estimate
    assert estimate.casts == weights
    more = estimate.total("off", 18) - estimate.total("full", 18)
    assert more == pytest.approx(6 * (weights + estimate.kept["off"] - estimate.kept["full"]))
    assert estimate.kept["off"] == pytest.approx(_kept_by_bf16(config), rel=0.1)
    assert estimate.fixed >= 3 * 4 * sum(p.numel() for p in model.parameters())


def _kept_by_bf16(config):
    """What a block of a plain model in bf16 keeps, weights aside, counted by hooks of the test's own."""
    block = find_blocks(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))[0]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 9, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.ones(1, 9, config.head_dim, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = block(x, position_embeddings=(rotary, rotary), attention_mask=None)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    del result
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
