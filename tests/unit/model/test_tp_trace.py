"""Which layers of a model feed which, found on models whose structure is known."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel._transformers.tp_infer import Inferred, Pair
from nemo_automodel._transformers.tp_plan import plan_from_styles
from nemo_automodel._transformers.tp_trace import Chain, find_chains
from tests.builders import tiny_config

_LLAMA = {
    Chain("model.layers.*.self_attn.o_proj", tuple(f"model.layers.*.self_attn.{x}_proj" for x in "kqv")),
    Chain("model.layers.*.mlp.down_proj", ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj")),
}
_GPT2 = {
    Chain("transformer.h.*.attn.c_proj", ("transformer.h.*.attn.c_attn",)),
    Chain("transformer.h.*.mlp.c_proj", ("transformer.h.*.mlp.c_fc",)),
}
_MLA = {  # the low-rank projections feed norms and, one of them, attention itself: they are no columns
    Chain(
        "model.layers.*.self_attn.o_proj", ("model.layers.*.self_attn.kv_b_proj", "model.layers.*.self_attn.q_b_proj")
    ),
    Chain("model.layers.*.mlp.down_proj", ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj")),
}


@pytest.mark.parametrize(
    ("model_type", "over", "expected"),
    [
        ("llama", {}, _LLAMA),
        ("gpt2", {}, _GPT2),
        (
            "deepseek_v3",
            {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
             "first_k_dense_replace": 2, "num_key_value_heads": 4},
            _MLA,
        ),
    ],
)  # fmt: skip
def test_chains(model_type, over, expected):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **over)).eval()
    inputs = {"input_ids": torch.arange(10, 19)[None], "use_cache": False}
    assert set(find_chains(model, inputs)) == expected


def test_a_fused_weight_falls_into_its_parts():
    model = AutoModelForCausalLM.from_config(tiny_config("phi3"))
    chain = Chain("model.layers.*.self_attn.o_proj", ("model.layers.*.self_attn.qkv_proj",))
    plan = Inferred((Pair(chain, ("grouped",), "heads+config"),), ends=True).plan(model, 2)
    assert plan.layers["model.layers.1.self_attn.qkv_proj"].parts == (32, 16, 16)
    assert plan.regions == {f"model.layers.{i}.self_attn" for i in range(2)}
    assert set(plan.divided["model.layers.0.self_attn"]) == {
        "num_key_value_heads", "config.num_attention_heads", "config.num_key_value_heads"
    }  # fmt: skip


def test_an_odd_vocabulary_stays_whole():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=385))
    plan = plan_from_styles(model, model._tp_plan, 2)
    assert {"lm_head", "model.embed_tokens"}.isdisjoint(plan.layers)
    assert len(plan.layers) == 14
