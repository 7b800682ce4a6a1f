"""The recipe with one broken function of ours in it, as a script. FAULT says which: attention, leak or tp."""

import os
import sys

from transformers.models.llama.modeling_llama import LlamaForCausalLM

from nemo_automodel._transformers import certificate
from nemo_automodel.components.attention import function
from nemo_automodel.recipes.llm import finetune
from nemo_automodel.recipes.run import run_recipe

right_attention, right_packed, right_prove = (
    function.attention,
    function.packed_attention,
    certificate.Certificate.prove,
)


def wrong_scale(module, query, key, *args, scaling=None, **kwargs):
    return right_attention(module, query, key, *args, scaling=scaling * 1.5, **kwargs)


def leaks_one_token(query, key, value, cu_seqlens, longest, *args, **kwargs):
    moved = cu_seqlens.clone()
    moved[1] -= 1
    return right_packed(query, key, value, moved, longest + 1, *args, **kwargs)


def after_loading(self, *args, **kwargs):
    """What is tried when the model is loaded has passed: the certificate is all that is left to see it."""
    function.packed_attention = leaks_one_token
    return right_prove(self, *args, **kwargs)


def left_as_columns(model):
    return {name: "colwise" if name.endswith("o_proj") else style for name, style in right_plan(model).items()}


if os.environ["FAULT"] == "attention":
    function.attention = wrong_scale
elif os.environ["FAULT"] == "leak":
    certificate.Certificate.prove = after_loading
else:
    from nemo_automodel._transformers import compat

    right_plan = compat.own_tp_plan
    assert "o_proj" in repr(right_plan(LlamaForCausalLM._from_config(LlamaForCausalLM.config_class(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=8))))  # fmt: skip
    compat.own_tp_plan = left_as_columns

if __name__ == "__main__":
    sys.exit(run_recipe("llm", sys.argv[1:], finetune.main))
