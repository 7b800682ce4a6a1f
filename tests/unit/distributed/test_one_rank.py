"""LoRA on one rank: adapters cast themselves, so that blocks are no units of FSDP2.

Claims: (1) no block is one, whatever the family, and inputs of blocks, loss and gradients are what they are where blocks
are units; (2) gradients of micro-batches add up in fp32; (3) weights that do not cast themselves train beside adapters:
clipping and the optimizer's step take both, and none of it is dispatched on a DTensor; (4) compiled blocks share one
compilation.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.linear import LoRALinear, LoRAWeight
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
from nemo_automodel.components.distributed.grads import GradClipper
from nemo_automodel.components.distributed.mesh import MeshSizes
from nemo_automodel.components.training.local_step import step_on_local_tensors
from tests.builders import tiny_config
from tests.ranks.test_local_step import DTensorCalls
from tests.vlm_builders import tiny_vlm_config, write_processor

LLAMA = {"match_all_linear": True, "dim": 4}
FAMILIES = {
    "llama": LLAMA,
    "gemma3_text": LLAMA,
    "qwen3_moe": {**LLAMA, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gpt2": LLAMA,
    "qwen3_vl": {**LLAMA, "parts": "all"},  # its tower's blocks are given rotations in fp32
}


@pytest.fixture(scope="module")
def env():
    env = DistEnv(device="cpu")
    yield env
    env.shutdown()


def build(env, family, tmp_path, peft=None, reshard=None, **options):
    manager = FSDP2Manager(env=env, reshard_after_forward=reshard)
    options = {"dtype": "bfloat16", "distributed": manager, **options}
    options["peft"] = peft or PeftConfig(**FAMILIES[family])
    torch.manual_seed(0)
    if family == "qwen3_vl":
        config = tiny_vlm_config(family, write_processor(family, tmp_path))
        model = NeMoAutoModelForImageTextToText.from_config(config, **options)
        images = config.image_token_id * torch.ones(1, 4, dtype=torch.int64)
        ids = torch.cat([torch.tensor([[config.vision_start_token_id]]), images, torch.arange(3, 12)[None]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        generator = torch.Generator().manual_seed(1)
        inputs |= {"pixel_values": torch.randn(16, 3 * 2 * 16 * 16, generator=generator)}
        inputs |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        model = NeMoAutoModelForCausalLM.from_config(tiny_config(family), **options)
        inputs = {"input_ids": torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(1))}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.add_(torch.randn(local.shape, generator=generator) * 0.05)
    return model.train(), {**inputs, "labels": inputs["input_ids"]}, manager


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dtypes(value):
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, (tuple, list)):
        return [dtypes(v) for v in value]
    return {k: dtypes(v) for k, v in value.items()} if isinstance(value, dict) else None


def seen_in_a_step(model, inputs):
    """Dtypes of what blocks are given, the loss, and the gradients."""
    given = []
    for block in find_blocks(model):
        block.register_forward_pre_hook(lambda _, args, kwargs: given.append(dtypes([args, kwargs])), with_kwargs=True)
    loss = model(**inputs).loss
    loss.backward()
    return given, loss.detach(), {name: whole(p.grad) for name, p in trained(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_no_units_and_compute_what_units_compute(family, env, tmp_path, monkeypatch):
    model, inputs, _ = build(env, family, tmp_path)
    assert isinstance(model, FSDPModule)
    assert not [block for block in find_blocks(model) if isinstance(block, FSDPModule)]
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    given, loss, gradients = seen_in_a_step(model, inputs)
    assert all(g.dtype == torch.float32 for g in gradients.values())

    monkeypatch.setattr(LoRAWeight, "cast_where_used", ())
    monkeypatch.setattr(LoRALinear, "cast_where_used", ())
    model, inputs, _ = build(env, family, tmp_path, reshard=True)
    assert all(isinstance(block, FSDPModule) for block in find_blocks(model))
    expected = seen_in_a_step(model, inputs)
    assert given == expected[0]
    assert torch.equal(loss, expected[1])
    for name, gradient in expected[2].items():
        assert torch.equal(gradients[name], gradient), name


def require_fp32_sums(first, second, total):
    """The gradients ``total`` of two micro-batches are the sums of theirs, which bf16 would have rounded."""
    for name, gradient in total.items():
        assert torch.equal(gradient, first[name] + second[name]), name
    rounded = {name: (first[name].bfloat16() + second[name].bfloat16()).float() for name in total}
    assert not all(torch.equal(total[name], rounded[name]) for name in total)


def test_micro_batches_add_up_in_fp32(env, tmp_path):
    parts = []
    for micro_batches in ([0], [1], [0, 1]):
        model, inputs, manager = build(env, "llama", tmp_path, PeftConfig(**LLAMA, use_dora=True))
        for i in micro_batches:
            manager.sync_gradients(model, last_micro_batch=i == micro_batches[-1])
            model(input_ids=inputs["input_ids"][i : i + 1], labels=inputs["labels"][i : i + 1]).loss.backward()
        parts.append({name: p.grad for name, p in trained(model).items()})
    require_fp32_sums(*parts)


class WithEmbeddings(PeftConfig):
    """LoRA, and embeddings that are trained in fp32."""

    def apply(self, model, *args):
        super().apply(model, *args)
        embeddings = model.get_input_embeddings()
        embeddings.weight = nn.Parameter(embeddings.weight.float())


@pytest.mark.parametrize("reshard", [None, True])
def test_weights_that_do_not_cast_themselves_train_beside_adapters(reshard, env, tmp_path):
    model, inputs, _ = build(env, "llama", tmp_path, WithEmbeddings(**LLAMA), reshard=reshard)
    params = list(trained(model).values())
    inside = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert inside == ({"model.embed_tokens.weight"} if reshard else set())
    before = [whole(p.detach()).clone() for p in params]
    optimizer = step_on_local_tensors(torch.optim.AdamW(params, lr=1e-2, fused=True))
    for _ in range(2):
        model(**inputs).loss.backward()
        expected = torch.stack([whole(p.grad).norm() for p in params]).norm()
        with DTensorCalls() as counted:
            norm = GradClipper(1.0)(params)
            optimizer.step()
        torch.testing.assert_close(norm, expected)
        optimizer.zero_grad()
    assert counted.count == 0
    assert all(not torch.equal(whole(p.detach()), b) for p, b in zip(params, before, strict=True))


class Adapted(nn.Linear):
    """A frozen layer with an fp32 scale that it casts itself."""

    cast_where_used = ("scale",)

    def __init__(self):
        super().__init__(8, 8, bias=False, dtype=torch.bfloat16)
        self.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return super().forward(x) * self.scale.to(x.dtype)


def test_compiled_blocks_share_one_compilation(env):
    blocks = [Adapted() for _ in range(10)]
    model = nn.Sequential(*blocks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    FSDP2Manager(env=env).parallelize(model, blocks, torch.bfloat16)
    assert not any(isinstance(block, FSDPModule) for block in blocks)
    model(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(block.scale.grad.dtype == torch.float32 for block in blocks)


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "nemotron_h", "bailing_hybrid"])
def test_weights_that_transformers_computes_wider_stay_so(env, model_type, reshard, tmp_path, caplog):
    """Routers, or decays of a mixer, in fp32 beside bf16, as in transformers' own model, whose loss and gradients ours has."""
    torch.manual_seed(0)
    config = tiny_twin(start_config(model_type, causal=True))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, p in plain.named_parameters() if p.dtype == torch.float32}
    assert wide
    manager = FSDP2Manager(env=env, reshard_after_forward=reshard)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", distributed=manager)
    assert "rounded to bfloat16" not in caplog.text
    seen = set()
    for name in wide:
        path, _, last = name.rpartition(".")
        owner = ours.get_submodule(path)
        owner.register_forward_pre_hook(lambda m, _, last=last: seen.add(m._parameters[last].dtype))
    ids = torch.randint(0, 100, (2, 48))
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=2e-5, atol=0)
    assert seen == {torch.float32}
    for loss in losses:
        loss.backward()
    found, expected = dict(ours.named_parameters()), dict(plain.named_parameters())
    wide = {name for name in wide if expected[name].grad is not None}
    assert wide
    for name in wide:
        assert found[name].grad.dtype == torch.float32
        difference = (whole(found[name].grad) - expected[name].grad).norm()
        assert difference <= 0.02 * expected[name].grad.norm(), name


class TwoCopies(FSDP2Manager):
    """One rank that is told it is one of two."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sizes = MeshSizes(dp_replicate=2, dp_shard=1, cp=1, tp=1)


class Offloading(FSDP2Manager):
    """One that keeps weights in host memory, which a CPU has no use for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.offload = True


@pytest.mark.parametrize("manager", [TwoCopies, Offloading])
def test_where_they_are_rounded_they_are_named(env, manager, caplog):
    config = tiny_twin(start_config("deepseek_v3", causal=True))
    for dtype, said in (("float32", False), ("bfloat16", True)):
        caplog.clear()
        NeMoAutoModelForCausalLM.from_config(config, dtype=dtype, distributed=manager(env=env))
        assert ("rounded to bfloat16 where they are used: model.layers.*.mlp.gate.weight" in caplog.text) is said
