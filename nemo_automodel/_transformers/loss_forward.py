"""One forward of a model with a loss of ours in place of its own, without logits where loss and model allow it.

What a model allows is found out by its first forwards and kept with it (``head.HeadState``): a forward that finds
something out is broken off, and run again in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.head import (
    HeadState,
    HeadTap,
    head_of,
    head_state,
    infer_transform,
    is_whole,
    probe_logits,
    vocabulary_group,
)
from nemo_automodel.errors import ConfigError
from nemo_automodel.types import IGNORE_INDEX, ContextLayout


@dataclass  # not frozen: FSDP2 copies the dataclasses among a forward's arguments field by field
class LossRequest:
    """Asks a forward for a loss instead of logits: the model returns ``(ce_sum, aux)``."""

    loss_fn: Any
    labels: Tensor  # [B, S] pre-shifted
    label_indices: Tensor | None = None
    right_padded: bool | None = None  # None: not known
    context: ContextLayout | None = None  # how the rows are sharded along the sequence


@dataclass
class LossForward:
    """A forward with the loss of ``request``; it lasts no longer than that forward, because it holds its tensors."""

    forward: Callable[..., Any]  # the model's own, without a loss of ours
    model: nn.Module
    inputs: dict[str, Any]
    request: LossRequest
    labels: Tensor  # [B, S] what the model is given as labels
    reported: Callable[[Tensor], Tensor]  # what the model is told that its main loss is, from ``ce_sum``
    ce_sum: Tensor | None = None  # the loss, once it has run

    def run(self) -> Any:
        """The model's outputs; their ``loss`` is ``reported(ce_sum)`` and what the model adds to it."""
        while True:  # three times at most: without logits, with logits, with logits that the model cuts
            try:
                return self._without_logits() if self._wants_no_logits() else self._with_logits()
            except _Again:
                continue

    @property
    def _state(self) -> HeadState:
        return head_state(self.model)

    def _give_up(self, reason: str) -> NoReturn:
        self._state.give_up(self.model, reason)
        raise _Again

    # --- without logits -----------------------------------------------------------------------------------------

    def _wants_no_logits(self) -> bool:
        return getattr(self.request.loss_fn, "takes_hidden_states", False) and self._state.reason is None

    def _without_logits(self) -> Any:
        head = head_of(self.model)
        if head is None:
            self._give_up("its output head is not a plain linear layer")
        if vocabulary_group(head) is not None and not _accepts(self.request.loss_fn, "tp_group"):
            self._give_up("the loss takes no tp_group, and the output head's vocabulary is sharded")
        first = self._state.transform is None
        probe = probe_logits(head.out_features, head.weight.device) if first else None
        try:
            with HeadTap(head, probe) as tap:
                return self._run_with(partial(self._loss_of_hidden, tap), self.labels)
        except (RuntimeError, IndexError, ValueError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(f"its forward cannot go on without logits ({error})")

    def _loss_of_hidden(self, tap: HeadTap, logits: Tensor, _: Any) -> Tensor:
        """The loss of what went into the head; ``logits`` are what the model made of the probe, if there was one."""
        state, request, head = self._state, self.request, tap.head
        if len(tap.inputs) != 1:
            self._give_up(f"its forward calls its output head {len(tap.inputs)} times")
        if not is_whole(head):
            self._give_up("its output head is sharded by itself")
        if tap.probe is not None:
            state.transform = infer_transform(tap.probe, logits)
        if state.transform is None:
            self._give_up("it changes its logits by more than a scale and a soft-cap")
        hidden = tap.inputs[0]
        if hidden.shape[:-1] != request.labels.shape:
            self._give_up("its output head does not get one hidden state a token")
        group = vocabulary_group(head)
        self.ce_sum = request.loss_fn(
            hidden,
            request.labels,
            head.weight,
            head.bias,
            label_indices=request.label_indices,
            logit_scale=state.transform.scale,
            logit_softcap=state.transform.softcap,
            **({} if group is None else {"tp_group": group}),
        )
        return self.reported(self.ce_sum)

    # --- with logits --------------------------------------------------------------------------------------------

    def _with_logits(self) -> Any:
        labels = _unshifted(self.request.labels) if self._state.cuts else self.labels
        return self._run_with(self._loss_of_logits, labels)

    def _loss_of_logits(self, logits: Tensor, arrived: Any) -> Tensor:
        """The loss of whole logits; ``arrived`` are the labels as the model handed them to its loss."""
        state, labels = self._state, self.request.labels
        if state.cuts:
            labels = arrived.reshape(logits.shape[:-1])
        elif logits.shape[:-1].numel() != labels.numel():
            state.cuts = True
            raise _Again
        self.ce_sum = _over_logits(self.request.loss_fn, state)(logits, labels)
        return self.reported(self.ce_sum)

    # --- both ---------------------------------------------------------------------------------------------------

    def _run_with(self, compute: Callable[[Any, Any], Tensor], labels: Tensor) -> Any:
        """Run the model with ``compute(logits, labels)`` as its main loss; the outputs' ``loss`` holds it."""
        if not compat.calls_loss_function(compat.base_class(self.model)):
            return self._run_by_hand(compute, labels)

        def loss_function(logits: Any = None, labels: Any = None, *_: Any, **more: Any) -> Tensor:
            return compute(logits, labels if more.get("shift_labels") is None else more["shift_labels"])

        own = self.model.__dict__
        previous = own.get("_loss_function")
        own["_loss_function"] = loss_function
        try:
            return self.forward(**self.inputs, labels=labels)
        finally:
            del own["_loss_function"]
            if previous is not None:
                own["_loss_function"] = previous

    def _run_by_hand(self, compute: Callable[[Any, Any], Tensor], labels: Tensor) -> Any:
        """For a model that computes its loss by no function that can be replaced: it is not asked for one."""
        decoder = {"labels": labels} if compat.is_encoder_decoder(self.model) else {}  # its inputs are made from them
        outputs = self.forward(**self.inputs, **decoder)
        loss = compute(outputs.logits, None) + _router_loss(self.model, outputs)
        return type(outputs)(**{**outputs, "loss": loss})


class _Again(Exception):
    """What is known of the model has changed: its forward has to run once more."""


def _router_loss(model: nn.Module, outputs: Any) -> Tensor | float:
    """Router balance of a model that adds it by hand: its ``aux_loss`` times the coefficient in its config."""
    aux = getattr(outputs, "aux_loss", None)
    if aux is None:
        return 0.0
    config: Any = model.config
    text = config.get_text_config()
    return getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", 0.0)) * aux


def _unshifted(labels: Tensor) -> Tensor:
    """Labels as transformers takes them, from those of the next token [B, S]."""
    return F.pad(labels[..., :-1], (1, 0), value=IGNORE_INDEX)


def _over_logits(loss_fn: Any, state: HeadState) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss_fn`` as a function of logits and labels."""
    if not getattr(loss_fn, "takes_hidden_states", False):
        return loss_fn
    from_logits = getattr(loss_fn, "from_logits", None)
    if from_logits is None:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ConfigError(
            f"loss_fn: {name} takes hidden states, but this model gives it whole logits, because {state.reason}; give "
            f"{name} a method from_logits(logits, labels) that returns the same sum"
        )
    return from_logits


def _accepts(loss_fn: Any, name: str) -> bool:
    parameters = inspect.signature(loss_fn).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


__all__ = ["LossForward", "LossRequest"]
