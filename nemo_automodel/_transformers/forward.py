"""The forward of a training step: any transformers model and any loss, logits made only where the loss wants them.

The model's own forward runs whole, with its own auxiliary losses. Only two things are replaced while it runs: its
output head (``head.HeadTap``) and its ``loss_function``, through which transformers models compute the main loss
(``loss_forward.LossForward``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.cp_check import context_layout
from nemo_automodel._transformers.head import head_of, head_state
from nemo_automodel._transformers.inputs import accepted, prepare_padded
from nemo_automodel._transformers.loss_forward import LossForward, LossRequest
from nemo_automodel._transformers.packed_rows import prepare_packed, towers_apart
from nemo_automodel.components.attention.layout import Layout, announce
from nemo_automodel.types import IGNORE_INDEX, Batch, LossFunction

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
        return _run_with_labels(partial(base_forward, model, *args), model, kwargs)


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
        layout = prepare_packed(model, inputs) or prepare_padded(model, inputs, request.right_padded)
    inputs["use_cache"] = False
    inputs = accepted(base_forward, inputs)
    forward = LossForward(partial(base_forward, model, *args), model, inputs, request, request.labels, _zero)
    with announce(layout), towers_apart(model, "cu_seq_lens_q" in inputs):
        outputs = forward.run()
        if _hides_its_parameters(model, forward.ce_sum):
            model.enable_input_require_grads()  # type: ignore[operator]
            outputs = forward.run()
    assert forward.ce_sum is not None
    return forward.ce_sum, outputs.loss


def _zero(ce_sum: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=ce_sum.device)


def _hides_its_parameters(model: nn.Module, ce_sum: Tensor | None) -> bool:
    """Whether layers with a backward of their own (reversible ones) got no gradient to pass: the input is frozen."""
    lost = model.training and torch.is_grad_enabled() and ce_sum is not None and not ce_sum.requires_grad
    return lost and hasattr(model, "enable_input_require_grads") and any(p.requires_grad for p in model.parameters())


def _run_with_labels(forward: Callable[..., Any], model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """transformers' own convention: unshifted ``labels``, the mean over label tokens in ``outputs.loss``."""
    from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

    head, state = head_of(model), head_state(model)
    by_hand = not compat.calls_loss_function(compat.base_class(model))  # and so perhaps by another convention
    if head is None or by_hand or state.reason is not None:
        return forward(**kwargs)
    labels = kwargs.pop("labels")
    shifted = kwargs.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    shifted = shifted.contiguous().to(head.weight.device)
    indices = (shifted.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    count = kwargs.get("num_items_in_batch")
    divisor = max(indices.numel(), 1) if count is None else count

    def mean(ce_sum: Tensor) -> Tensor:
        return ce_sum / (divisor.to(ce_sum.device) if isinstance(divisor, Tensor) else divisor)

    request = LossRequest(FusedLinearCrossEntropy(), shifted, indices)
    outputs = LossForward(forward, model, kwargs, request, labels, mean).run()
    if state.reason is None and isinstance(outputs, Mapping):  # what stands for logits is none
        build: Any = type(outputs)
        outputs = build(**{k: v for k, v in outputs.items() if k != "logits"})
    return outputs


__all__ = ["forward_loss", "run", "run_with_request"]
