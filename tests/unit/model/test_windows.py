"""Sliding windows are those of plain transformers, padded and packed, whether or not a model's layers pass them on."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.packing_trial import require_packing
from nemo_automodel._transformers.window_trial import passes_window
from nemo_automodel.components.attention import function
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ModelError
from tests.builders import tiny_config
from tests.unit.model.models import documents, gradients, packed_inputs, padded_inputs, shifted, with_labels

WINDOW = 4
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
KINDS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"use_sliding_window": True, "layer_types": KINDS, "num_experts": 4, **EXPERTS},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"layer_types": KINDS},
    "mistral": {},
}
PASS_IT_ON = {"gemma3_text", "mistral"}


def windowed(family: str) -> tuple[Any, Any]:
    """(ours, plain transformers) with a window of 4, in float32 with the same weights, attention of some size."""
    config = tiny_config(family, sliding_window=WINDOW, **FAMILIES.get(family, {}))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "attn" in name and parameter.ndim == 2:
                parameter.mul_(5)
    plain.eval()
    ours = NeMoAutoModelForCausalLM.from_config(config, dtype="float32").eval()
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def loss_of(plain: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(plain(**inputs, use_cache=False).logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(24, 24), (24, 15)])
def test_padded_rows_have_the_window(family: str, lengths: tuple[int, int]) -> None:
    ours, plain = windowed(family)
    inputs = padded_inputs(documents(*lengths))
    _, labels = shifted(inputs["input_ids"], inputs["attention_mask"])
    ce_sum, _ = forward_loss(ours, with_labels(inputs, labels), MaskedCrossEntropy())
    expected = loss_of(plain, inputs, labels)
    torch.testing.assert_close(ce_sum, expected, rtol=1e-6, atol=1e-4)
    ce_sum.backward()
    expected.backward()
    theirs = gradients(plain)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    # the oracle can tell: without a window the loss is another
    plain.config.sliding_window = 64
    assert (loss_of(plain, inputs, labels) - expected).abs() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tried", [True, False])
def test_packed_documents_have_the_window(family: str, tried: bool) -> None:
    ours, plain = windowed(family)
    if tried:
        require_packing(ours)
    ids = documents(10, 24, 3)
    labels = torch.cat([shifted(x, answers_from=0)[1] for x in ids], dim=1)
    ce_sum, _ = forward_loss(ours, with_labels(packed_inputs(ids), labels), MaskedCrossEntropy())
    expected = sum(loss_of(plain, {"input_ids": x}, shifted(x, answers_from=0)[1]) for x in ids)
    torch.testing.assert_close(ce_sum, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_layers_pass_on_is_found(family: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = windowed(family)
    assert passes_window(ours) == (family in PASS_IT_ON)
    assert any("sliding windows are kept by a dense mask" in r.message for r in caplog.records) == (
        family not in PASS_IT_ON
    )
    assert AttentionInterface()["automodel"] is function.attention


def test_a_model_without_windows_is_not_tried() -> None:
    assert not passes_window(NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), dtype="float32"))


@pytest.mark.parametrize("family", sorted(PASS_IT_ON))
def test_a_window_lost_by_packing_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's documents are longer than its window, whatever the model's own is."""
    ours, _ = windowed(family)
    for module in ours.modules():
        if isinstance(getattr(module, "sliding_window", None), int):
            module.sliding_window = 1024
    attention = function.attention

    def windowless(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attention(*args, sliding_window=None, **kwargs)

    monkeypatch.setattr(function, "attention", windowless)
    with pytest.raises(ModelError, match="other logits than the same document by itself"):
        require_packing(ours)


def window_keepers() -> list[str]:
    """Causal LM types of this transformers that make windowed masks and have an attention call without the window."""
    root = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        path = root / model_type / f"modeling_{model_type}.py"
        source = path.read_text() if path.exists() else ""
        calls = re.findall(r"attention_interface\(\n(.*?)\n        \)", source, re.DOTALL)
        if "create_sliding_window_causal_mask" in source and any("sliding_window" not in call for call in calls):
            found.append(model_type)
    return found


@pytest.mark.parametrize("family", window_keepers() or ["phimoe"])
def test_every_type_that_keeps_its_window_to_itself_is_right(family: str) -> None:
    try:
        with torch.device("meta"):
            config = tiny_config(family, sliding_window=WINDOW, **FAMILIES.get(family, {}))
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:
        pytest.skip(f"{family}: no tiny model of it ({type(error).__name__})")
    if size > 3_000_000:
        pytest.skip(f"{family}: its smallest model has {size:,} parameters")
    ours, plain = windowed(family)
    inputs = padded_inputs(documents(24, 15))
    _, labels = shifted(inputs["input_ids"], inputs["attention_mask"])
    with torch.no_grad():
        ce_sum, _ = forward_loss(ours, with_labels(inputs, labels), MaskedCrossEntropy())
        torch.testing.assert_close(ce_sum, loss_of(plain, inputs, labels), rtol=1e-5, atol=1e-4)
