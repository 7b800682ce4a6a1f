"""Which models' sequences can be sharded, and what those that cannot are told."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_automodel import NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.cp_check import require_context_parallel
from nemo_automodel._transformers.window_trial import find_window
from nemo_automodel.components.attention.function import register
from nemo_automodel.errors import ModelError
from tests.builders import tiny_config
from tests.vlm_builders import write_vlm


def build(kind, attention=None, **config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **config), attn_implementation=attention or register())
    find_window(model)
    return model


class Shifted(torch.nn.Module):
    """Adds to each token the one before it: mixing that nothing in a config tells of."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_attention_models_pass(kind):
    require_context_parallel(build(kind))


def test_a_layer_that_mixes_tokens_is_found_by_trying():
    model = build("llama")
    model.model.layers[0].mlp = Shifted(model.model.layers[0].mlp)
    with pytest.raises(ModelError, match=r"cp_size.*depend on those beside it"):
        require_context_parallel(model)


def test_attention_that_is_not_ours_is_refused():
    with pytest.raises(ModelError, match="runs its own attention"):
        require_context_parallel(build("llama", "eager"))


def test_windows_not_handed_on_are_refused():
    model = build("gemma3_text")
    model.__dict__["_automodel_passes_window"] = False
    with pytest.raises(ModelError, match="do not hand their sliding window"):
        require_context_parallel(model)


def test_a_balance_loss_of_whole_rows_is_refused():
    model = build("qwen3_moe", output_router_logits=True)
    with pytest.raises(ModelError, match=r"balance loss is of whole rows .*output_router_logits: false"):
        require_context_parallel(model)


LONG = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LONGROPE = LONG | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("rope", [LONG | {"rope_type": "dynamic"}, LONGROPE, {"full_attention": LONGROPE}])
def test_positions_encoded_by_the_rows_length_are_refused(rope):
    """A rank sees its own tokens' positions only; keys of ranks would be rotated by different frequencies."""
    model = build("llama")
    model.config.rope_parameters = rope
    with pytest.raises(ModelError, match=r"cp_size.*by how long the row is"):
        require_context_parallel(model)


def test_images_are_refused(tmp_path):
    path = write_vlm("gemma3", tmp_path / "model")
    model = NeMoAutoModelForImageTextToText.from_pretrained(str(path), dtype="float32")
    with pytest.raises(ModelError, match=r"cp_size.* images are not shared out .*write cp_size: 1"):
        require_context_parallel(model)
