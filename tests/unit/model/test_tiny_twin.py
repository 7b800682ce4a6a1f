"""A tiny twin is narrow and shallow and otherwise the model: over every architecture that transformers registers."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2VLConfig,
)

from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.compat import registered_types
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_batch import image_batch, text_batch
from nemo_automodel._transformers.twin_layers import keep_layers
from nemo_automodel._transformers.twin_start import start_config

NO_DEFAULT = {"gemma4_assistant"}  # transformers' own default is refused by its own validation
TYPES = [(kind, t) for kind in ("causal", "vlm") for t in registered_types(kind) if t not in NO_DEFAULT]
HOLES = {"vlm-apertus1p5": "ranges of image and audio tokens that must tile its vocabulary are not shrunk with it yet"}


def types_and_holes() -> list[Any]:
    """Every type; the twins that are known not to build must fail, so that a hole that is filled is noticed."""
    marks = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in HOLES.items()}
    return [pytest.param(k, t, id=f"{k}-{t}", marks=marks.get(f"{k}-{t}", [])) for k, t in TYPES]


def reloads_its_default(model_type: str) -> bool:
    try:
        config = CONFIG_MAPPING[model_type]()
        type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError):
        return False
    return True


def parts(config: Any) -> list[Any]:
    return names.parts_of(config)


@pytest.mark.parametrize(("kind", "model_type"), types_and_holes())
def test_a_twin_keeps_the_structure(kind: str, model_type: str) -> None:
    if not reloads_its_default(model_type):
        pytest.skip("this transformers does not read back its own default of the class")
    config = start_config(model_type, causal=kind == "causal")
    before = copy.deepcopy(config.to_dict())
    twin = tiny_twin(config)
    assert config.to_dict() == before
    assert type(twin) is type(config)
    assert len(parts(twin)) == len(parts(config))
    assert type(twin).from_dict(twin.to_dict()).to_dict() == twin.to_dict()  # what is saved says the same
    for old, new in zip(parts(config), parts(twin), strict=True):
        assert type(old) is type(new)
        check_part(names.fields_of(old), names.fields_of(new), old)


def check_part(old: dict[str, Any], new: dict[str, Any], part: Any) -> None:
    for name, value in old.items():
        derived = name == "transformers_version" or name.endswith("vocab_size")
        if not derived and (isinstance(value, (bool, str)) or value is None):
            assert new[name] == value, name
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        if isinstance(old.get(name), list):
            assert set(new[name]) == set(old[name]), name
    layers = names.find(part, old, "num_hidden_layers")
    if layers and isinstance(old.get("layer_types"), list):
        assert len(new["layer_types"]) == new[layers] <= 12
    queries = names.find(part, old, "num_attention_heads")
    keys = names.find(part, old, "num_key_value_heads")
    if queries and keys and old[queries] >= 4 and old[queries] % old[keys] == 0:
        assert new[queries] % 2 == 0
        assert new[queries] % new[keys] == 0
        assert (new[keys] > 1) == (old[keys] > 1)
        assert (new[queries] > new[keys]) == (old[queries] > old[keys])
    if names.is_int(old.get("vocab_size")) and old["vocab_size"] > 128:
        assert new["vocab_size"] == 128
    ids = [v for name, v in new.items() if names.is_token(name) and names.is_int(v)]
    assert all(v < 128 for v in ids)
    hidden = names.find(part, old, "hidden_size", "d_model")
    if hidden:
        assert new[hidden] <= 512


def test_what_was_equal_stays_equal() -> None:
    config = DeepseekV3Config(first_k_dense_replace=3)
    twin = tiny_twin(config)
    assert twin.qk_head_dim == twin.qk_nope_head_dim + twin.qk_rope_head_dim
    assert twin.v_head_dim == twin.qk_nope_head_dim  # 128 both
    assert (twin.n_group, twin.n_routed_experts, twin.num_experts_per_tok) == (2, 4, 2)
    assert (twin.num_hidden_layers, twin.first_k_dense_replace) == (4, 2)


def test_grouped_heads_widths_and_tokens_of_a_dense_model() -> None:
    config = LlamaConfig(
        num_key_value_heads=8, eos_token_id=[31998, 31999], pad_token_id=31999, intermediate_size=16384
    )
    twin = tiny_twin(config, layers=3, heads=8, vocab_size=256)
    assert (twin.num_hidden_layers, twin.num_attention_heads, twin.num_key_value_heads) == (3, 8, 4)
    assert twin.head_dim * 8 == twin.hidden_size
    assert twin.intermediate_size == 4 * twin.hidden_size
    assert twin.vocab_size == 256
    assert twin.eos_token_id == [254, 255]
    assert twin.pad_token_id == 255
    assert twin.bos_token_id == config.bos_token_id == 1


def test_rotary_sections_fit_the_smaller_head() -> None:
    config = Qwen2VLConfig()
    text = config.get_text_config()
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    twin = tiny_twin(config).get_text_config()
    sections = twin.rope_parameters["mrope_section"]
    assert sum(sections) == twin.hidden_size // twin.num_attention_heads // 2
    assert sections[1] == sections[2]


def test_layers_are_kept_by_kind() -> None:
    fields = {"layer_types": ["full"] * 2 + ["sliding", "sliding", "sliding", "full"] * 3, "first_k_dense_replace": 1}
    assert keep_layers(fields, 14, 2) == [0, 1, 2, 3, 5]  # dense full; full, full; sliding, sliding
    assert keep_layers({}, 32, 2) == [0, 1]


SAMPLE = ("deepseek_v3", "gemma3_text", "gpt2", "jamba", "llama", "mamba2", "qwen3_5_moe_text", "qwen3_next")
SEEING = ("gemma3", "llava", "mllama", "qwen3_vl")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_twin_trains_in_seconds(model_type: str) -> None:
    start = time.process_time()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_twin(start_config(model_type, causal=True)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(3):
        loss = model(**text_batch(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0] - 0.01
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert time.process_time() - start < 10


@pytest.mark.parametrize("model_type", SEEING)
def test_a_twin_sees(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_twin(start_config(model_type, causal=False))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gates that start closed
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = image_batch(model)
    pixels = next(k for k, v in batch.items() if v.is_floating_point())
    with torch.no_grad():
        loss = model(**batch).loss
        batch[pixels].view(-1)[: batch[pixels].numel() // 2] += 1.0
        assert abs(float(model(**batch).loss - loss)) > 1e-6


def test_names_of_codes_keep_to_their_quarter_of_the_vocabulary() -> None:
    twin = tiny_twin(start_config("chameleon", causal=False))
    codes = {name: token for name, token in twin.vocabulary_map.items() if name.startswith("IMGIMG")}
    assert sorted(codes.values()) == list(range(64, 96))
    assert twin.vq_config.num_embeddings == len(codes) == 32
    assert twin.vocabulary_map["<image>"] >= 96


def test_outputs_of_a_tower_are_added_to_layers_that_are_there() -> None:
    config = start_config("granite4_vision", causal=False)
    config.deepstack_layer_map = [(-19, 9), (-13, 6), (-7, 3), (-1, 0)]
    twin = tiny_twin(config)
    layers = twin.vision_config.num_hidden_layers
    assert all(-layers <= output < 0 and 0 <= layer < 2 for output, layer in twin.deepstack_layer_map)
