"""Forwards that are broken off and run again: how often, what is said, what is left behind; the loss is plain transformers'."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama

from nemo_automodel._transformers.forward import forward_loss
from nemo_automodel._transformers.mixin import adopt
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from tests.builders import tiny_config
from tests.unit.model.models import documents, gradients, shifted, with_labels


class Llama(modeling_llama.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> CausalLMOutput:
        logits = self.logits(self.model(input_ids).last_hidden_state)
        if labels is None:
            return CausalLMOutput(logits=logits)
        return CausalLMOutput(loss=self.loss_function(logits, labels, self.config.vocab_size), logits=logits)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class CallsItsHeadTwice(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return (self.lm_head(hidden) + self.lm_head(hidden)) / 2


class LooksAtItsLogits(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).view(*hidden.shape[:-1], self.config.vocab_size)


class Cuts(Llama):
    """Leaves out the last token ahead of its head, and the first label."""

    def forward(self, input_ids: Any = None, labels: Any = None, **_: Any) -> CausalLMOutput:
        logits = self.logits(self.model(input_ids).last_hidden_state[:, :-1])
        if labels is None:
            return CausalLMOutput(logits=logits)
        loss = self.loss_function(logits, None, self.config.vocab_size, shift_labels=labels[:, 1:].contiguous())
        return CausalLMOutput(loss=loss, logits=logits)


class Counted:
    """A model of ours and the outputs of its decoder, by weak references."""

    def __init__(self, model_class: type, state: dict[str, Tensor]) -> None:
        self.model: Any = adopt(model_class(tiny_config("llama")))
        self.model.load_state_dict(state)
        self.outputs: list[weakref.ref[Tensor]] = []
        self.model.model.norm.register_forward_hook(lambda *call: self.outputs.append(weakref.ref(call[2])))

    def forwards(self) -> int:
        """Since the last time it was asked."""
        count = len(self.outputs)
        self.outputs.clear()
        return count

    def left_behind(self) -> dict[str, Any]:
        head = self.model.lm_head
        return {
            "hooks": len(head._forward_pre_hooks) + len(head._forward_hooks),
            "loss function": "_loss_function" in self.model.__dict__,
            "activations": sum(output() is not None for output in self.outputs),
        }


NOTHING = {"hooks": 0, "loss function": False, "activations": 0}


@pytest.mark.parametrize(
    ("model_class", "loss_fn", "forwards", "said"),
    [
        (Llama, FusedLinearCrossEntropy(), 1, None),
        (Llama, MaskedCrossEntropy(), 1, None),
        (CallsItsHeadTwice, FusedLinearCrossEntropy(), 2, "its forward calls its output head 2 times"),
        (LooksAtItsLogits, FusedLinearCrossEntropy(), 2, "its forward cannot go on without logits"),
        (Cuts, FusedLinearCrossEntropy(), 3, "its output head does not get one hidden state a token"),
        (Cuts, MaskedCrossEntropy(), 2, None),
    ],
)
def test_a_forward_is_run_again_until_the_model_allows_it(
    model_class: type, loss_fn: Any, forwards: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    plain = model_class(tiny_config("llama"))
    ours = Counted(model_class, plain.state_dict())
    ids = documents(20)[0]
    labels, pre_shifted = shifted(ids)
    expected = plain(ids, labels=labels).loss * (pre_shifted != -100).sum()
    expected.backward()
    wanted = gradients(plain)
    gc.collect()
    gc.disable()
    try:
        for count in (forwards, 1):
            with caplog.at_level(logging.WARNING):
                loss, _ = forward_loss(ours.model, with_labels({"input_ids": ids}, pre_shifted), loss_fn)
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-4)
            loss.backward()
            del loss
            assert ours.left_behind() == NOTHING
            assert ours.forwards() == count
            found = gradients(ours.model)
            for name, gradient in wanted.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    finally:
        gc.enable()
    messages = [record.message for record in caplog.records if record.name.startswith("nemo_automodel")]
    assert len(messages) == (said is not None)
    assert said is None or f"{model_class.__name__}: loss computed from whole logits, because {said}" in messages[0]


class Fails(Llama):
    failure: Exception | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        if self.failure is not None:
            raise self.failure
        return super().logits(hidden)


@pytest.mark.parametrize(
    ("measured", "failure"), [(False, torch.OutOfMemoryError("full")), (True, RuntimeError("broken"))]
)
def test_a_failure_that_is_not_for_want_of_logits_is_no_reason_to_run_again(measured: bool, failure: Exception) -> None:
    torch.manual_seed(0)
    ours = Counted(Fails, Fails(tiny_config("llama")).state_dict())
    ids = documents(20)[0]
    batch = with_labels({"input_ids": ids}, shifted(ids)[1])
    if measured:
        forward_loss(ours.model, batch, FusedLinearCrossEntropy())
    ours.forwards()
    ours.model.failure = failure
    with pytest.raises(type(failure), match=str(failure)):
        forward_loss(ours.model, batch, FusedLinearCrossEntropy())
    assert ours.left_behind() | {"activations": 0} == NOTHING
    assert ours.forwards() == 1
    ours.model.failure = None
    forward_loss(ours.model, batch, FusedLinearCrossEntropy())
    assert ours.model.__dict__["_automodel_head"].reason is None
