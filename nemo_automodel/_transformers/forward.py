"""The forward of a training step: any transformers model and any loss, logits made only where the loss wants them.

The model's own forward runs whole, with its own auxiliary losses. Only two things are replaced while it runs: its
output head (``head.HeadTap``) and its ``loss_function``, through which transformers models compute the main loss.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.cp_check import context_layout
from nemo_automodel._transformers.head import (
    HeadTap,
    LogitTransform,
    head_of,
    infer_transform,
    is_whole,
    probe_logits,
    vocabulary_group,
)
from nemo_automodel._transformers.inputs import is_right_padded
from nemo_automodel._transformers.packed_rows import prepare_packed, towers_apart
from nemo_automodel._transformers.window_trial import passes_window
from nemo_automodel.components.attention.layout import Layout, announce
from nemo_automodel.errors import ConfigError
from nemo_automodel.types import IGNORE_INDEX, Batch, ContextLayout, LossFunction

logger = logging.getLogger(__name__)

_NOT_FOR_THE_MODEL = (
    "labels",
    "label_indices",
    "num_label_tokens",
    "num_tokens",
    "num_images",
    "image_rows",
    "sample_ids",
    "right_padded",
    "cp_layout",
)


@dataclass
class LossRequest:
    """Asks a forward for a loss instead of logits: the model returns ``(ce_sum, aux)``."""

    loss_fn: Any
    labels: Tensor  # [B, S] pre-shifted
    label_indices: Tensor | None = None
    right_padded: bool | None = None  # None: not known
    context: ContextLayout | None = None  # how the rows are sharded along the sequence
    result: Tensor | None = field(default=None, repr=False)
    fused: bool = False  # whether the result came without logits


def forward_loss(model: nn.Module, batch: Batch, loss_fn: LossFunction) -> tuple[Tensor, Tensor]:
    """Run ``model`` on one micro-batch.

    Returns ``ce_sum``, the sum of the loss over the batch's label tokens, and ``aux``, what the model's own forward
    would have added to its loss (router balance, times its coefficient), 0 for most models. Both are fp32 scalars.
    Raises ConfigError for a loss over hidden states without ``from_logits`` where the model's head cannot be fused.
    """
    inputs = {k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL}
    request = LossRequest(loss_fn, batch["labels"], batch.get("label_indices"), batch.get("right_padded"))
    request.context = batch.get("cp_layout")
    inner = getattr(model, "module", model)
    if hasattr(type(inner), "automodel_base"):
        return model(**inputs, loss_request=request)
    return run_with_request(type(inner).forward, model, (), inputs, request)


def run(base_forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``base_forward`` of a transformers class, with our attention's layout, and our loss where one is asked for."""
    request = kwargs.pop("loss_request", None)
    if request is not None:
        return run_with_request(base_forward, model, args, kwargs, request)
    with announce(prepare_packed(model, kwargs)), towers_apart(model, "cu_seq_lens_q" in kwargs):
        if kwargs.get("labels") is None:
            return base_forward(model, *args, **kwargs)
        return _run_with_labels(base_forward, model, args, kwargs)


def run_with_request(
    base_forward: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    request: LossRequest,
) -> tuple[Tensor, Tensor]:
    """The ``(ce_sum, aux)`` of ``forward_loss``; runs inside the model's call, where sharded weights are whole."""
    inputs = dict(inputs)
    if request.context is not None:
        layout: Layout | None = context_layout(model, request.context)
    else:
        layout = prepare_packed(model, inputs) or _prepare_padded(model, inputs, request.right_padded)
    inputs["use_cache"] = False
    inputs = _accepted(base_forward, inputs)
    with announce(layout), towers_apart(model, "cu_seq_lens_q" in inputs):
        outputs = _forward_with_loss(base_forward, model, args, inputs, request, request.labels, _zero)
        if _hides_its_parameters(model, request):
            model.enable_input_require_grads()  # type: ignore[operator]
            outputs = _forward_with_loss(base_forward, model, args, inputs, request, request.labels, _zero)
    assert request.result is not None
    return request.result, outputs.loss


def _hides_its_parameters(model: nn.Module, request: LossRequest) -> bool:
    """Whether layers with a backward of their own (reversible ones) got no gradient to pass: the input is frozen."""
    lost = (
        model.training and torch.is_grad_enabled() and request.result is not None and not request.result.requires_grad
    )
    return lost and hasattr(model, "enable_input_require_grads") and any(p.requires_grad for p in model.parameters())


def _run_with_labels(
    base_forward: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """transformers' own convention: unshifted ``labels``, the mean over label tokens in ``outputs.loss``."""
    from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

    head = head_of(model)
    by_hand = not compat.calls_loss_function(_base_class(model))  # and so perhaps by another convention
    if head is None or by_hand or _head_state(model).reason is not None:
        return base_forward(model, *args, **kwargs)
    labels = kwargs.pop("labels")
    shifted = kwargs.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    shifted = shifted.contiguous().to(head.weight.device)
    indices = (shifted.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    count = kwargs.get("num_items_in_batch")
    divisor = max(indices.numel(), 1) if count is None else count
    request = LossRequest(FusedLinearCrossEntropy(), shifted, indices)

    def mean(ce_sum: Tensor) -> Tensor:
        return ce_sum / (divisor.to(ce_sum.device) if isinstance(divisor, Tensor) else divisor)

    outputs = _forward_with_loss(base_forward, model, args, kwargs, request, labels, mean)
    if request.fused and isinstance(outputs, Mapping):
        build: Any = type(outputs)
        outputs = build(**{k: v for k, v in outputs.items() if k != "logits"})
    return outputs


def _forward_with_loss(
    base_forward: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    request: LossRequest,
    labels: Tensor,
    reported: Callable[[Tensor], Tensor],
) -> Any:
    """One forward; ``request.result`` gets the sum, ``outputs.loss`` is ``reported(sum)`` and the model's own extras."""
    state = _head_state(model)
    if getattr(request.loss_fn, "takes_hidden_states", False) and state.reason is None:
        outputs = _forward_tapped(base_forward, model, args, inputs, request, labels, reported, state)
        if outputs is not None:
            return outputs

    def from_logits(logits: Tensor, arrived: Any = None) -> Tensor:
        if not state.cuts and logits.shape[:-1].numel() != request.labels.numel():
            raise _CutsItself
        wanted = arrived.reshape(logits.shape[:-1]) if state.cuts else request.labels
        request.result = _loss_of_logits(request, logits, wanted, state)
        return reported(request.result)

    try:
        passed = _unshifted(request.labels) if state.cuts else labels
        return _with_loss_function(base_forward, model, args, inputs, passed, from_logits)
    except _CutsItself:
        state.cuts = True
        return _with_loss_function(base_forward, model, args, inputs, _unshifted(request.labels), from_logits)


def _forward_tapped(
    base_forward: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    request: LossRequest,
    labels: Tensor,
    reported: Callable[[Tensor], Tensor],
    state: _HeadState,
) -> Any | None:
    """The fused path; None where it turns out, at the first forward, that it does not fit this model."""
    head = head_of(model)
    if head is None:
        state.give_up(model, "its output head is not a plain linear layer")
        return None
    group = vocabulary_group(head)
    if group is not None and not _accepts(request.loss_fn, "tp_group"):
        state.give_up(model, "the loss takes no tp_group, and the output head's vocabulary is sharded")
        return None
    first = state.transform is None
    probe = probe_logits(head.out_features, head.weight.device) if first else None

    def from_hidden(logits: Tensor, _: Any = None) -> Tensor:
        if len(tap.inputs) != 1:
            raise _DoesNotFit(f"its forward calls its output head {len(tap.inputs)} times")
        if not is_whole(head):
            raise _DoesNotFit("its output head is sharded by itself")
        if probe is not None:
            state.transform = infer_transform(probe, logits)
        if state.transform is None:
            raise _DoesNotFit("it changes its logits by more than a scale and a soft-cap")
        hidden = tap.inputs[0]
        if hidden.shape[:-1] != request.labels.shape:
            raise _DoesNotFit("its output head does not get one hidden state a token")
        request.result = request.loss_fn(
            hidden,
            request.labels,
            head.weight,
            head.bias,
            label_indices=request.label_indices,
            logit_scale=state.transform.scale,
            logit_softcap=state.transform.softcap,
            **({} if group is None else {"tp_group": group}),
        )
        request.fused = True
        return reported(request.result)

    with HeadTap(head, probe) as tap:
        try:
            return _with_loss_function(base_forward, model, args, inputs, labels, from_hidden)
        except _DoesNotFit as error:
            state.give_up(model, str(error))
        except (RuntimeError, IndexError, ValueError) as error:
            if not first or isinstance(error, torch.OutOfMemoryError):
                raise
            state.give_up(model, f"its forward cannot go on without logits ({error})")
    return None


class _CutsItself(Exception):
    """The model has fewer logits than labels at its loss function: it shifts both itself."""


class _DoesNotFit(Exception):
    """The fused path is not right for this model; the message says why."""


@dataclass
class _HeadState:
    """What is known of a model's head; kept on the model."""

    transform: LogitTransform | None = None
    reason: str | None = None  # why the fused path is off
    cuts: bool = False  # it cuts logits and labels itself, so labels go in unshifted and are used as they come out

    def give_up(self, model: nn.Module, reason: str) -> None:
        """Turn the fused path off for this model and say so, once."""
        self.transform, self.reason = None, reason
        logger.warning("%s: loss computed from whole logits, because %s", _name(model), reason)


def keeps_logits(model: nn.Module) -> bool:
    """Whether a loss over hidden states is known not to fit ``model``, so that it gets whole logits."""
    return _head_state(model).reason is not None or head_of(model) is None


def give_up_fusing(model: nn.Module) -> None:
    """Let ``model`` make whole logits for every loss from now on."""
    state = _head_state(model)
    state.transform, state.reason = None, "its certificate says so"


def forget_head(model: nn.Module) -> None:
    """Have the next forward find out anew what ``model`` does to its logits."""
    model.__dict__.pop("_automodel_head", None)


def _head_state(model: nn.Module) -> _HeadState:
    return model.__dict__.setdefault("_automodel_head", _HeadState())


def _with_loss_function(
    base_forward: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    labels: Tensor,
    compute: Callable[..., Tensor],
) -> Any:
    """Run the forward with ``compute(logits, labels)`` as the model's main loss; returns outputs whose ``loss`` holds it."""
    if compat.calls_loss_function(_base_class(model)):
        previous = model.__dict__.get("_loss_function")

        def loss_function(logits: Any = None, labels: Any = None, *_: Any, **more: Any) -> Tensor:
            return compute(logits, labels if more.get("shift_labels") is None else more["shift_labels"])

        model.__dict__["_loss_function"] = loss_function
        try:
            return base_forward(model, *args, **inputs, labels=labels)
        finally:
            del model.__dict__["_loss_function"]
            if previous is not None:
                model.__dict__["_loss_function"] = previous
    decoder = {"labels": labels} if compat.is_encoder_decoder(model) else {}  # its inputs are made from them
    outputs = base_forward(model, *args, **inputs, **decoder)
    loss = compute(outputs.logits) + _router_loss(model, outputs)
    return type(outputs)(**{**outputs, "loss": loss})


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


def _loss_of_logits(request: LossRequest, logits: Tensor, labels: Tensor, state: _HeadState) -> Tensor:
    loss_fn = request.loss_fn
    if not getattr(loss_fn, "takes_hidden_states", False):
        return loss_fn(logits, labels)
    from_logits = getattr(loss_fn, "from_logits", None)
    if from_logits is None:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ConfigError(
            f"loss_fn: {name} takes hidden states, but this model gives it whole logits, because {state.reason}; give "
            f"{name} a method from_logits(logits, labels) that returns the same sum"
        )
    return from_logits(logits, labels)


def _zero(ce_sum: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=ce_sum.device)


def _prepare_padded(model: nn.Module, inputs: dict[str, Any], right_padded: bool | None) -> Layout | None:
    """The layout of right-padded rows: causal attention of real tokens needs no mask, so none is built.

    The 2D mask itself stays (routers' balance leaves padding out by it). A mask on the device is not looked at: rows
    not known to be right padded get the real mask.
    """
    mask = inputs.get("attention_mask")
    if compat.attention_name(model) != "automodel" or (mask is not None and mask.ndim != 2):
        return None
    if mask is not None and right_padded is None:
        right_padded = mask.device.type == "cpu" and is_right_padded(mask)
    if mask is not None and not right_padded:
        return None
    if mask is None and "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Layout(None, passes_window(model), read_blocks=compat.read_blocks)


def _accepted(base_forward: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    names, open_ended = _parameters(base_forward)
    return inputs if open_ended else {k: v for k, v in inputs.items() if k in names}


def _accepts(loss_fn: Any, name: str) -> bool:
    parameters = inspect.signature(loss_fn).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _base_class(model: nn.Module) -> type:
    return getattr(type(model), "automodel_base", type(model))


def _name(model: nn.Module) -> str:
    return _base_class(model).__name__


__all__ = [
    "LossRequest",
    "forget_head",
    "forward_loss",
    "give_up_fusing",
    "keeps_logits",
    "run",
    "run_with_request",
]
