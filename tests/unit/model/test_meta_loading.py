"""Every architecture loaded from the meta device: bit for bit what transformers' own loading gives."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.tiny_twin import tiny_twin
from tests.unit.model.test_loading import OnMeta

SAMPLE = {"deepseek_v3", "gpt_oss", "bloom", "falcon", "mamba", "opt", "glm4_moe", "phimoe", "llama4_text", "zamba2"}
TYPES = [
    pytest.param(kind, marks=[] if kind in SAMPLE else [pytest.mark.full])
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
]


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("kind", TYPES)
def test_every_architecture_loads_as_transformers_loads_it(kind, tmp_path, caplog):
    try:
        config = tiny_twin(CONFIG_MAPPING[kind]())
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    except Exception as error:
        pytest.skip(f"transformers itself does not build, save and load a twin of its defaults: {error}")
    with caplog.at_level(logging.WARNING, logger="nemo_automodel"):
        ours = NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=OnMeta())
    assert not [r.message for r in caplog.records if "every rank loads all of it" in r.message]
    expected, found = tensors(plain), tensors(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
