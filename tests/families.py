"""The models that the examples name, small: each Hub ID's own config class and structural switches, as they are published.

What makes a family itself (scaled rotary embeddings, soft-caps, multipliers, tied heads, experts, kinds of layers) is
written here or is its class's default; ``tiny_twin`` makes the rest narrow.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from tests.builders import make_tokenizer
from tests.hub import LocalHub

VOCABULARY = 384

_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3 = {"max_position_embeddings": 131072, "rope_parameters": _LLAMA3_ROPE, "num_key_value_heads": 8}
_WIDE_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
_LONGROPE |= {"short_factor": [1.0] * 48, "long_factor": [1.5] * 48, "original_max_position_embeddings": 4096}
_FALCON3 = {"hidden_size": 3072, "head_dim": 256, "num_attention_heads": 12, "num_key_value_heads": 4}

# Hub ID -> model type, kind of tokenizer, what its config.json says beside the defaults (None: its class's defaults, completed)
FAMILIES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "meta-llama/Llama-3.1-8B": ("llama", "llama3", _LLAMA3),
    "meta-llama/Llama-3.2-1B": (
        "llama",
        "llama3",
        _LLAMA3 | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}},
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        "llama3",
        _LLAMA3 | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE | {"factor": 32.0}},
    ),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", "llama3", _LLAMA3),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", "chatml", {"num_key_value_heads": 4, "rope_parameters": _WIDE_ROPE}),
    "Qwen/Qwen3-0.6B": ("qwen3", "reasoning", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "Qwen/Qwen3-8B": ("qwen3", "reasoning", {"num_key_value_heads": 8, "rope_parameters": _WIDE_ROPE}),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", "reasoning", {"norm_topk_prob": True, "head_dim": 128}),
    "Qwen/Qwen3.5-4B": ("qwen3_5", "reasoning", None),
    "google/gemma-2-9b-it": ("gemma2", "gemma", {"query_pre_attn_scalar": 256, "num_key_value_heads": 8}),
    "google/gemma-3-1b-it": ("gemma3_text", "gemma", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "google/gemma-3-4b-it": ("gemma3", "gemma", None),
    "google/gemma-4-E2B-it": ("gemma4", "gemma", None),
    "mistralai/Mistral-7B-v0.3": ("mistral", "mistral", {"sliding_window": None, "rope_parameters": _WIDE_ROPE}),
    "mistralai/Ministral-8B-Instruct-2410": ("ministral", "mistral", None),
    "mistralai/Ministral-3-8B-Base-2512": ("mistral3", "mistral", {"text_config": {"model_type": "ministral3"}}),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", "mistral", {"sliding_window": None, "rope_parameters": _WIDE_ROPE}),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", "chatml", {"sliding_window": 2047}),
    "microsoft/phi-4": ("phi3", "chatml", {"num_key_value_heads": 10, "num_attention_heads": 40, "hidden_size": 5120}),
    "microsoft/Phi-4-mini-instruct": (
        "phi3",
        "chatml",
        {
            "tie_word_embeddings": True,
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "rope_parameters": _LONGROPE,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
    ),
    "unsloth/gpt-oss-20b-BF16": ("gpt_oss", "chatml", None),
    "unsloth/DeepSeek-V3-bf16": ("deepseek_v3", "chatml", None),
    "ibm-granite/granite-3.3-8b-instruct": (
        "granite",
        "chatml",
        {
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "residual_multiplier": 0.22,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "ibm-granite/granite-4.0-h-tiny": (
        "granitemoehybrid",
        "chatml",
        {
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "position_embedding_type": "nope",
            "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
            "num_hidden_layers": 40,
            "tie_word_embeddings": True,
        },
    ),
    "allenai/OLMo-2-1124-7B": ("olmo2", "bos", {}),
    "allenai/Olmo-3-7B-Instruct": ("olmo3", "chatml", {}),
    "tiiuae/Falcon3-7B-Base": ("llama", "plain", _FALCON3),
    "tiiuae/Falcon-H1-1.5B-Instruct": ("falcon_h1", "chatml", None),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": ("nemotron_h", "chatml", None),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("nemotron_h", "chatml", None),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", "reasoning", {}),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": ("seed_oss", "chatml", {}),
    "zai-org/GLM-4-9B-0414": ("glm4", "chatml", {}),
    "zai-org/GLM-4.5-Air": ("glm4_moe", "chatml", {}),
}

ROW = {
    "id": "0",
    "title": "France",
    "context": "Paris is the capital of France, and people like it there.",
    "question": "What is the capital of France?",
    "answers": {"text": ["Paris"], "answer_start": [0]},
    "ctx": "The quick brown fox",
    "endings": ["jumps over the dog", "does not", "two", "four"],
    "label": 0,
    "messages": [
        {"role": "user", "content": "Hello, who are you?"},
        {"role": "assistant", "content": "my name is Ada"},
    ],
    "instruction": "name a colour",
    "response": "blue, like the sky",
}
"""One row that has every example's columns."""


def twin_of(name: str) -> PretrainedConfig:
    """The config of Hub ID ``name``, small."""
    model_type, _, published = FAMILIES[name]
    if published is None:
        config = start_config(model_type, causal=model_type != "mistral3")
    else:
        config = CONFIG_MAPPING[model_type](**published)
    return tiny_twin(config, vocab_size=VOCABULARY)


@cache
def model_files(name: str) -> dict[str, bytes]:
    """The files of Hub ID ``name``, small, fp32 and far enough from nought that every part of it shows in the loss."""
    torch.manual_seed(0)
    config = twin_of(name)
    auto_class: Any = AutoModelForImageTextToText if config.model_type == "mistral3" else AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        make_tokenizer(FAMILIES[name][1], VOCABULARY).save_pretrained(directory)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def data_files(split: str, rows: int) -> dict[str, bytes]:
    """A dataset repository whose ``split`` is ``ROW`` so many times."""
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n---\n"
    return {"README.md": card.encode(), "rows.jsonl": (json.dumps(ROW) + "\n").encode() * rows}


def add_datasets(hub: LocalHub, rows: int) -> None:
    """Serve every dataset that the examples name, of so many rows."""
    for name, split in (
        ("rajpurkar/squad", "train"),
        ("HuggingFaceH4/ultrachat_200k", "train_sft"),
        ("databricks/databricks-dolly-15k", "train"),
        ("Rowan/hellaswag", "train"),
    ):
        hub.add("datasets", name, data_files(split, rows))
