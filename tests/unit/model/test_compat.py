"""Each private name of transformers that the package relies on still means what it did."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from nemo_automodel import NeMoAutoModelForImageTextToText
from nemo_automodel._transformers import compat
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from tests.builders import tiny_config


def build(family: str, **over: object) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **over))


def test_unsplittable_classes() -> None:
    assert compat.unsplittable_class_names(build("llama")) == {"LlamaDecoderLayer"}
    assert compat.unsplittable_class_names(torch.nn.Linear(1, 1)) == set()


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gpt2", True), ("bloom", False), ("mamba", False)])
def test_pluggable_attention(family: str, expected: bool) -> None:
    over = {"bloom": {"n_layer": 1, "n_head": 4}, "mamba": {"state_size": 4}}.get(family, {})
    assert compat.attention_is_pluggable(build(family, **over)) is expected


class Chosen(LlamaAttention):
    """Its indexer, say, chose blocks of keys, and nothing but this argument says which."""

    def forward(self, hidden_states, attention_interface, **kwargs):  # type: ignore[no-untyped-def]
        return attention_interface(self, hidden_states, dropout=0.0, chosen_blocks=[1], **kwargs)


def test_an_attention_that_says_more_than_ours_knows_is_left_alone() -> None:
    model = build("llama")
    assert compat.unknown_attention_arguments(model) == set()
    model.model.layers[-1].self_attn.__class__ = Chosen
    assert compat.unknown_attention_arguments(model) == {"chosen_blocks"}
    assert not compat.attention_is_pluggable(model)


@pytest.mark.skipif("minimax_m3_vl" not in CONFIG_MAPPING, reason="not in this transformers")
def test_keys_chosen_by_blocks_are_attended_to_and_no_others() -> None:
    config = tiny_twin(start_config("minimax_m3_vl", causal=False))
    text = config.get_text_config()
    text.layer_types = ["minimax_m3_sparse"] * text.num_hidden_layers
    torch.manual_seed(0)
    plain = AutoModelForImageTextToText.from_config(config).eval()
    ours = NeMoAutoModelForImageTextToText.from_config(config, dtype="float32").eval()
    ours.load_state_dict(plain.state_dict())
    assert text.index_block_size * text.index_topk_blocks < 40
    ids = torch.randint(10, 100, (2, 40))
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_attention_name() -> None:
    model = build("llama")
    assert compat.attention_name(model) == "sdpa"
    model.set_attn_implementation("eager")
    assert compat.attention_name(model) == "eager"
    assert compat.attention_name(torch.nn.Linear(1, 1)) == "None"


def test_loss_function_is_the_hook() -> None:
    """A transformers model computes its loss by ``self.loss_function``, which an instance attribute replaces."""
    assert compat.calls_loss_function(LlamaForCausalLM)
    assert not compat.calls_loss_function(torch.nn.Linear)
    model = LlamaForCausalLM(tiny_config("llama"))
    model.__dict__["_loss_function"] = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 7
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids, labels=ids).loss.item() == 7


def test_windows_and_chunks() -> None:
    assert compat.window_size(build("gemma3_text")) == 16
    assert compat.window_size(build("llama")) is None
    assert compat.chunk_size(build("gemma3_text")) is None
    chunked = build("llama4_text", attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=64)
    assert compat.chunk_size(chunked) == 16
    assert compat.window_size(chunked) is None


def test_model_class() -> None:
    assert compat.model_class_for(AutoModelForCausalLM, tiny_config("llama")) is LlamaForCausalLM
    assert compat.model_class_for(AutoModelForImageTextToText, tiny_config("llama")) is None


def test_positions() -> None:
    assert compat.takes_positions(build("llama"))
    assert not compat.takes_positions(build("bloom", n_layer=1, n_head=4))


def test_tensor_parallel_plan() -> None:
    plan = compat.own_tp_plan(build("llama"))
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert plan["model.layers.*.mlp.down_proj"] == "rowwise"
    assert plan["lm_head"] == "colwise_gather_output"
    assert compat.own_tp_plan(build("gpt2")) == {}
    experts = compat.own_tp_plan(build("qwen3_moe"))
    assert experts["model.layers.*.mlp.experts.gate_up_proj"] == "packed_colwise"


def test_class_and_arguments() -> None:
    model = build("llama")
    assert compat.base_class(model) is LlamaForCausalLM
    assert compat.takes(model, "use_cache")
    assert not compat.takes(model, "cu_seqlens")
