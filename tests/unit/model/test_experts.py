"""The experts function: equal to transformers' own loop, in one graph, said at start-up, refused where it cannot be."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import compat, experts
from nemo_automodel._transformers.ep_plan import ep_plan_for
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components._peft.match import stacked_weights
from nemo_automodel.errors import ModelError
from tests.builders import tiny_config

SIZES = {
    "qwen3_moe": {"moe_intermediate_size": 24},
    "mixtral": {"intermediate_size": 40},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "num_key_value_heads": 4,
    },
    "nemotron_h": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                   "layers_block_type": ["moe", "attention"], "n_group": 1, "topk_group": 1},
}  # fmt: skip
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def build(model_type, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **SIZES[model_type])).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)
    return model.train()


def choose(model, asked=None):
    experts.choose_experts(model, torch.device("cpu"), next(model.parameters()).dtype, asked)
    return model


@pytest.mark.parametrize("model_type", SIZES)
def test_loss_and_every_gradient_equal_transformers_loop(model_type):
    found = {}
    ids = torch.randint(3, 384, (2, 19), generator=torch.Generator().manual_seed(2))
    for asked in ("eager", None):
        model = choose(build(model_type), asked)
        modules = compat.pluggable_experts(model)
        assert modules
        assert {compat.experts_name(m) for m in modules} == {asked or experts.NAME}
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[asked] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[None].keys() == found["eager"].keys()
    for name, value in found["eager"].items():
        assert (found[None][name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.full
@pytest.mark.parametrize("model_type", compat.registered_types("causal"))
def test_every_type_of_model_equals_transformers_loop(model_type):
    """Experts and, where there are any, their adapters: by factors as when they are added to the weights."""
    try:
        config = tiny_twin(start_config(model_type, causal=True))
        plain = AutoModelForCausalLM.from_config(config).float()
    except Exception as error:
        pytest.skip(f"no twin: {error}")
    names = [name for name in stacked_weights(plain) if name.split(".")[-1] in experts._PROJECTIONS]
    if not compat.pluggable_experts(plain) or not names:
        pytest.skip("no experts from the registry")
    ids = torch.randint(3, 30, (2, 13), generator=torch.Generator().manual_seed(2))
    found = {}
    for asked in ("eager", None):
        model = copy.deepcopy(plain)
        PeftConfig(target_parameters=names, dim=4, alpha=8).apply(model)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            parameter.requires_grad_()
        choose(model.eval(), asked)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[asked] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    largest = max(value.norm() for value in found["eager"].values())
    assert found[None].keys() == found["eager"].keys()
    for name, value in found["eager"].items():
        assert (found[None][name] - value).norm() <= 1e-4 * max(value.norm(), 1e-3 * largest), name


def test_experts_that_get_no_token_and_batches_without_any():
    model = choose(build("qwen3_moe"))
    module = compat.pluggable_experts(model)[0]
    x = torch.randn(3, 32, requires_grad=True)
    chosen, weights = torch.tensor([[1, 2], [2, 1], [1, 2]]), torch.rand(3, 2)
    module(x, chosen, weights).sum().backward()
    assert not module.gate_up_proj.grad[[0, 3]].any()
    assert module.gate_up_proj.grad[[1, 2]].any()
    assert module(x[:0], chosen[:0], weights[:0]).shape == (0, 32)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_block_is_one_graph(rank):
    model = build("qwen3_moe", torch.bfloat16)
    if rank:
        PeftConfig(target_parameters=TARGETS, dim=rank).apply(model)
    choose(model)
    layer, x = model.model.layers[0], torch.randn(1, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(16)[None]
    rotary = model.model.rotary_emb(x, positions)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(
        lambda x: layer(x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    )(x)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_what_runs_the_experts_is_said(caplog):
    with caplog.at_level(logging.INFO):
        choose(build("qwen3_moe"))
        adapted = build("qwen3_moe")
        PeftConfig(target_parameters=TARGETS, dim=4).apply(adapted)
        choose(adapted, "grouped_mm")
        torch.manual_seed(0)
        choose(AutoModelForCausalLM.from_config(tiny_config("llama")))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("experts:")]
    assert said == [
        "experts: grouped products over 4 experts (in a loop: the device is cpu)",
        "experts: grouped_mm, as asked for; their adapters are added to the weights in each forward",
    ]


@pytest.mark.parametrize("name", ["automodel", "grouped_mm", "eager"])
def test_the_config_chooses(name):
    config = tiny_config("qwen3_moe")
    model = NeMoAutoModelForCausalLM.from_config(config, dtype="float32", experts_implementation=name)
    assert compat.experts_name(model) == name
    assert "automodel" not in str(model.config.to_dict()), "a saved config must load without this package"


@pytest.mark.parametrize(("kind", "name"), [("qwen3_moe", "fastest"), ("llama", "grouped_mm"), ("llama", "automodel")])
def test_a_choice_that_cannot_be_is_refused(kind, name):
    with pytest.raises(ModelError, match=f"experts_implementation={name}"):
        NeMoAutoModelForCausalLM.from_config(tiny_config(kind), dtype="float32", experts_implementation=name)


def test_adapters_of_experts_are_refused_where_they_would_be_cut():
    model = build("qwen3_moe")
    PeftConfig(target_parameters=TARGETS, dim=4).apply(model)
    with pytest.raises(ModelError, match=r"tp_size: model.layers.0.mlp.experts.gate_up_proj has adapters"):
        experts.require_no_cut(model)
    choose(model, "eager")
    with pytest.raises(ModelError, match=r"ep_size: the adapters of model.layers.0.mlp.experts are added"):
        ep_plan_for(model)
    choose(model)
    assert "lora_experts.down_proj.lora_B.weight" in ep_plan_for(model)["model.layers.0.mlp.experts"]
