"""The forward of a training step against plain transformers: logits, losses, gradients, auxiliary losses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.head import LogitTransform, infer_transform, probe_logits
from nemo_automodel._transformers.inputs import is_right_padded, to_device
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.errors import ConfigError
from tests.builders import tiny_config
from tests.unit.model.models import FAMILIES, documents, gradients, padded_inputs, pair, shifted, with_labels

MOE = {"mixtral", "qwen3_moe"}
LOSSES = {"fused": FusedLinearCrossEntropy(), "masked": MaskedCrossEntropy()}


def close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_logits_are_those_of_transformers(family: str) -> None:
    """Failure class 11."""
    ours, plain = pair(family)
    ids = documents(40)[0]
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    padded = padded_inputs(documents(40, 21))
    real = padded["attention_mask"].bool()
    torch.testing.assert_close(ours(**padded).logits[real], plain(**padded).logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_recipe_forward_equals_transformers_loss(family: str, loss: str) -> None:
    over: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.3} if family in MOE else {}
    ours, plain = pair(family, **over)
    inputs = padded_inputs(documents(40, 21))
    labels, pre_shifted = shifted(inputs["input_ids"], inputs["attention_mask"])
    batch = to_device(with_labels(inputs, pre_shifted), torch.device("cpu"))
    for _ in range(2):  # the first forward also measures the head
        ce_sum, aux = forward_loss(ours, batch, LOSSES[loss])
        loss_value = ce_sum / batch["num_label_tokens"] + aux
        loss_value.backward()
        ours_gradients = gradients(ours)
        expected = plain(**inputs, labels=labels)
        expected.loss.backward()
        assert ce_sum.dtype == aux.dtype == torch.float32
        torch.testing.assert_close(loss_value, expected.loss, rtol=1e-5, atol=1e-5)
        assert (aux.item() > 0) == (family in MOE)
        close(ours_gradients, gradients(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_follow_transformers_convention(family: str) -> None:
    over: dict[str, Any] = {"output_router_logits": True} if family in MOE else {}
    ours, plain = pair(family, **over)
    inputs = padded_inputs(documents(30, 18))
    labels, _ = shifted(inputs["input_ids"], inputs["attention_mask"])
    for extra in ({}, {"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 17}):
        mine = ours(**inputs, labels=labels, **extra)
        theirs = plain(**inputs, labels=labels, **extra)
        torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-5, atol=1e-5)
        assert mine.logits is None
        mine.loss.backward()
        theirs.loss.backward()
        close(gradients(ours), gradients(plain))
    assert ours(**inputs).loss is None


def test_other_outputs_keep_working() -> None:
    ours, plain = pair("llama")
    ids = documents(12)[0]
    mine = ours(ids, labels=ids, output_hidden_states=True)
    theirs = plain(ids, labels=ids, output_hidden_states=True)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert mine.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 12
    loss = ours(ids, labels=ids, return_dict=False)[0]
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)


def test_an_all_masked_batch_keeps_its_graph() -> None:
    ours, _ = pair("llama")
    ids = documents(12)[0]
    for loss in LOSSES.values():
        ce_sum, _ = forward_loss(ours, with_labels({"input_ids": ids}, torch.full_like(ids, -100)), loss)
        ce_sum.backward()
        assert ce_sum.item() == 0
        assert all(not g.any() for g in gradients(ours).values())


@pytest.mark.parametrize(
    ("family", "over", "expected"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}, LogitTransform(1.0, 3.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(0.125)),
        ("llama", {}, LogitTransform()),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured(
    family: str, over: dict[str, Any], expected: LogitTransform
) -> None:
    ours, plain = pair(family, **over)
    ids = documents(20)[0]
    mine, theirs = ours(ids, labels=ids), plain(ids, labels=ids)
    assert mine.logits is None
    assert ours.__dict__["_automodel_head"].transform == expected
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    mine.loss.backward()
    theirs.loss.backward()
    close(gradients(ours), gradients(plain))


@pytest.mark.parametrize("scale", [1.0, 0.0625, -2.0, 13.7])
@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
def test_scale_and_softcap_are_told_apart(scale: float, softcap: float | None) -> None:
    probe = probe_logits(1000, torch.device("cpu"))
    transform = LogitTransform(scale, softcap)
    assert infer_transform(probe, transform(probe).expand(2, 1, -1)) == transform


def test_any_other_change_of_the_logits_is_noticed() -> None:
    probe = probe_logits(1000, torch.device("cpu"))
    suppressed = probe.clone()
    suppressed[7] = -torch.inf
    for seen in (suppressed, probe + 1, probe.roll(1), probe.clamp(-50, 50), probe[:10], probe.relu()):
        assert infer_transform(probe, seen[None]) is None


class BiasedLogits(torch.nn.Module):
    """Stands behind a model's head and adds a constant to one token's logit."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        return logits + F.one_hot(torch.tensor(5), logits.shape[-1]) * 3.0


def test_a_head_that_cannot_be_taken_over_gets_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    """The loss is then that of the whole logits, and it is said once, by name."""
    ours, plain = pair("llama")
    for model in (ours, plain):
        model.set_output_embeddings(BiasedLogits(model.get_output_embeddings()))
    ids = documents(20)[0]
    labels, pre_shifted = shifted(ids)
    with caplog.at_level(logging.WARNING):
        losses = [forward_loss(ours, with_labels({"input_ids": ids}, pre_shifted), LOSSES["fused"])[0] for _ in "12"]
        expected = plain(ids, labels=labels).loss * (pre_shifted != -100).sum()
        torch.testing.assert_close(torch.stack(losses), expected.expand(2), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours(ids, labels=labels).loss, plain(ids, labels=labels).loss)
    said = [record.message for record in caplog.records if "LlamaForCausalLM" in record.message]
    assert len(said) == 1
    assert "not a plain linear layer" in said[0]


def test_a_model_that_rewrites_its_logits_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What no scale and cap explain is found at the first forward, whose loss is already right."""
    from transformers.models.llama import modeling_llama

    class Suppressing(modeling_llama.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):  # type: ignore[no-untyped-def,override]
            outputs = super().forward(input_ids, **kwargs)
            outputs.logits = outputs.logits + F.one_hot(torch.tensor(5), outputs.logits.shape[-1]) * -4.0
            if labels is not None:
                outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
            return outputs

    from nemo_automodel._transformers.mixin import adopt

    torch.manual_seed(0)
    plain = Suppressing(tiny_config("llama"))
    ours = adopt(Suppressing(tiny_config("llama")))
    ours.load_state_dict(plain.state_dict())
    ids = documents(20)[0]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(ours(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    assert [r.message for r in caplog.records if "scale and a soft-cap" in r.message]


class Doubled:
    """A user's loss over hidden states, twice the cross-entropy."""

    takes_hidden_states = True

    def __call__(self, hidden: Any, labels: Any, weight: Any, bias: Any = None, **options: Any) -> torch.Tensor:
        return self.of(F.linear(hidden, weight, bias), labels)

    @staticmethod
    def of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")


class DoubledFromLogits(Doubled):
    def from_logits(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.of(logits, labels)


def test_a_users_fused_loss_is_never_replaced() -> None:
    ours, plain = pair("llama")
    ids = documents(20)[0]
    labels, pre_shifted = shifted(ids)
    batch = with_labels({"input_ids": ids}, pre_shifted)
    expected = 2 * plain(ids, labels=labels).loss * (pre_shifted != -100).sum()
    torch.testing.assert_close(forward_loss(ours, batch, Doubled())[0], expected, rtol=1e-5, atol=1e-4)

    for model in (ours, plain):
        model.set_output_embeddings(BiasedLogits(model.get_output_embeddings()))
    expected = 2 * plain(ids, labels=labels).loss * (pre_shifted != -100).sum()
    torch.testing.assert_close(forward_loss(ours, batch, DoubledFromLogits())[0], expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match=r"loss_fn: Doubled .* not a plain linear layer; .*from_logits"):
        forward_loss(ours, batch, Doubled())


def test_the_fused_loss_ignores_the_same_labels_without_fusing() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=3, reduction="sum")
    torch.testing.assert_close(FusedLinearCrossEntropy(ignore_index=3).from_logits(logits, labels), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moved", [True, False])
def test_left_padding_is_masked(family: str, moved: bool) -> None:
    ours, plain = pair(family)
    inputs = padded_inputs(documents(40, 21), left=True)
    first = inputs["attention_mask"].cumsum(1) <= 1  # padding and the first token: nothing real to predict it from
    labels, pre_shifted = shifted(inputs["input_ids"], (~first).long())
    batch = with_labels(inputs, pre_shifted)
    if moved:
        batch = to_device(batch, torch.device("cpu"))
        assert batch["right_padded"] is False
    ce_sum, _ = forward_loss(ours, batch, LOSSES["fused"])
    expected = plain(**inputs, labels=labels).loss * (pre_shifted != -100).sum()
    torch.testing.assert_close(ce_sum, expected, rtol=1e-5, atol=1e-4)


def test_right_padding_is_known_before_the_batch_moves() -> None:
    """On the device nobody looks: what is not known to be right padded gets a mask."""
    batch = with_labels(padded_inputs(documents(9, 5)), torch.zeros(2, 9, dtype=torch.int64))
    assert to_device(batch, torch.device("meta"))["right_padded"] is True
    assert "right_padded" not in to_device({"input_ids": batch["input_ids"]}, torch.device("cpu"))
    for rows, expected in (
        ([[1, 1, 0], [1, 1, 1]], True),
        ([[1, 0, 1]], False),
        ([[0, 1, 1]], False),
        ([[0, 0]], True),
    ):
        assert is_right_padded(torch.tensor(rows)) is expected


def test_keys_that_a_forward_does_not_take_are_left_out() -> None:
    """bloom's forward has neither position_ids nor use_cache=... for packed batches, and its own attention."""
    config = tiny_config("bloom", n_layer=2, n_head=4, hidden_size=32)
    torch.manual_seed(0)
    ours = NeMoAutoModelForCausalLM.from_config(config, dtype="float32").eval()
    inputs = padded_inputs(documents(20, 11))
    labels, pre_shifted = shifted(inputs["input_ids"], inputs["attention_mask"])
    batch = with_labels({**inputs, "position_ids": torch.arange(20)[None]}, pre_shifted)
    ce_sum, _ = forward_loss(ours, batch, LOSSES["fused"])
    plain = type(ours).automodel_base(ours.config).eval()
    plain.load_state_dict(ours.state_dict())
    expected = plain(**inputs, labels=labels).loss * batch["num_label_tokens"]
    torch.testing.assert_close(ce_sum, expected, rtol=1e-5, atol=1e-4)
