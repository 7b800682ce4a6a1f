"""Failure class 2: packed documents do not see each other, in any attention back end that runs on the CPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.packing import PASSES_DOCUMENTS
from nemo_automodel._transformers.packing_trial import require_packing
from nemo_automodel.components.attention import function
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.errors import ModelError
from tests.builders import tiny_config
from tests.unit.model.models import documents, gradients, packed_inputs, pair, shifted, with_labels

LENGTHS = (24, 33, 2, 19)  # the window of gemma3 is 16: some documents are longer, some shorter
# Ways through the attention function: documents by SDPA, by windows, by the written-out formula (soft-cap, sinks).
WAYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gemma3_text": {},
    "mixtral": {"sliding_window": 16},
    "qwen3_moe": {},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "stablelm": {"partial_rotary_factor": 0.5},  # its layers keep the boundaries from its attention: a dense mask
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}


@pytest.mark.parametrize("family", WAYS)
def test_packed_equals_separate_documents(family: str) -> None:
    """Logits of every token, and the gradient of every parameter, to 1e-5."""
    ours, plain = pair(family, **WAYS[family])
    require_packing(ours)
    ids = documents(*LENGTHS)
    separate = [plain(x).logits for x in ids]
    packed = ours(**packed_inputs(ids)).logits
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-5, atol=2e-5)

    # the last token of a document predicts nothing, so its label is not the next document's first token
    inputs = packed_inputs(ids)
    labels = torch.cat([shifted(x, answers_from=0)[1] for x in ids], dim=1)
    forward_loss(ours, with_labels(inputs, labels), FusedLinearCrossEntropy())[0].backward()
    mine = gradients(ours)
    for x in ids:
        (plain(x, labels=x).loss * (x.shape[1] - 1)).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", WAYS)
def test_a_document_does_not_notice_another(family: str) -> None:
    """Change every token of A: B's logits and the gradient that reaches B's embeddings do not change at all."""
    ours, _ = pair(family, **WAYS[family])
    require_packing(ours)
    a, b = documents(24, 33)
    other = documents(24, seed=1)[0]
    seen = []
    for first in (a, other):
        inputs = packed_inputs([first, b])
        embeddings = ours.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        logits = ours(**{**inputs, "input_ids": None}, inputs_embeds=embeddings).logits[:, 24:]
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), embeddings)
        assert not gradient[:, :24].any(), "B's loss reaches A"
        seen.append((logits.detach(), gradient[:, 24:]))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)


def test_the_users_own_loop_may_pack_too() -> None:
    """Packed inputs and transformers' labels, without a recipe; and without cu_seq_lens, position_ids alone do."""
    ours, plain = pair("llama")
    ids = documents(10, 14)
    inputs = packed_inputs(ids)  # and without packed=True at loading
    labels = inputs["input_ids"].clone()
    labels[0, [0, 10]] = -100  # what the first token of each document would have been predicted from
    expected = sum(plain(x, labels=x).loss * (x.shape[1] - 1) for x in ids) / (10 + 14 - 2)
    torch.testing.assert_close(ours(**inputs, labels=labels).loss, expected, rtol=1e-5, atol=1e-5)
    by_position = {key: inputs[key] for key in ("input_ids", "position_ids")}
    torch.testing.assert_close(ours(**by_position, labels=labels, use_cache=False).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "over", "reason"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 32}, "its own attention"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "own attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "carry state from token to token"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
                        "linear_num_value_heads": 4, "linear_num_key_heads": 2}, "carry state from token to token"),
        ("llama4_text", {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
         "chunks counted from the start of the row"),
    ],
)  # fmt: skip
def test_packing_is_refused_with_the_reason(family: str, over: dict[str, Any], reason: str) -> None:
    sizes = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = {"model_type": family, **sizes, **over} if family in ("bloom", "mamba") else tiny_config(family, **over)
    with pytest.raises(ModelError, match=reason) as error:
        NeMoAutoModelForCausalLM.from_config(config, dtype="float32", packed=True)
    assert "packed_sequence_size: 0" in str(error.value)
    unasked = NeMoAutoModelForCausalLM.from_config(config, dtype="float32")
    if "position_ids" in inspect.signature(unasked.forward).parameters:
        with pytest.raises(ModelError, match=reason):
            unasked(**packed_inputs(documents(5, 6)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "stablelm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_is_allowed(family: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    model = NeMoAutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype, packed=True)
    assert model.__dict__[PASSES_DOCUMENTS] == (family != "stablelm")
    assert any("dense mask" in record.message for record in caplog.records) == (family == "stablelm")
    assert model.training


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_own_attention_packs_too(implementation: str) -> None:
    model = NeMoAutoModelForCausalLM.from_config(
        tiny_config("llama"), dtype="float32", packed=True, attn_implementation=implementation
    )
    assert model.config._attn_implementation == implementation


def test_documents_that_change_how_positions_are_encoded_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    ours, _ = pair("llama")
    ours.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    require_packing(ours)
    assert "a document of more than 64 tokens changes how positions are encoded" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention forgets boundaries and masks alike."""
    model = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), dtype=str(dtype))
    with torch.no_grad():
        for layer in model.model.layers:  # attention of some weight, as a trained model has
            layer.self_attn.v_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)

    def forgetful(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        kwargs.pop("cu_seq_lens_q", None)
        return attention(module, query, key, value, None, **kwargs)

    attention = function.attention
    monkeypatch.setattr(function, "attention", forgetful)
    with pytest.raises(ModelError, match="other logits than the same document by itself"):
        require_packing(model)
