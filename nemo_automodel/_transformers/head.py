"""Standing in for the output head during a forward, so that a loss gets hidden states and no logits are made.

How the model goes on from its head's output (scale, soft-cap) is measured, not looked up: the first forward with a
loss gets known numbers for logits, and what arrives at the loss says what the model does to them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_automodel._transformers import compat
from nemo_automodel.components.distributed.tp_layers import Column

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: ``softcap(scale * logits)``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it to ``logits`` of any shape."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadTap:
    """Context in which ``head`` is called with no rows; its real input is kept in ``inputs``, one entry a call.

    With ``probe`` [V] the head's output is the probe instead, one row of it for each batch row.
    """

    def __init__(self, head: nn.Linear, probe: Tensor | None = None) -> None:
        self.head = head
        self.probe = probe
        self.inputs: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> HeadTap:
        self._handles.append(self.head.register_forward_pre_hook(self._keep_input))
        if self.probe is not None:
            self._handles.append(self.head.register_forward_hook(self._give_probe))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep_input(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.inputs.append(args[0])
        return (args[0].narrow(-2, 0, 0), *args[1:])

    def _give_probe(self, head: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.probe is not None
        return self.probe.expand(*output.shape[:-2], 1, -1).clone()  # some models write into their logits


def head_of(model: nn.Module) -> nn.Linear | None:
    """The model's output head where its weight and bias are all there is to it, else None.

    None: no head, a head of another class (LoRA on the head, quantised), or one sharded by itself.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if not isinstance(head, nn.Linear) or head._forward_hooks:
        return None
    own = super(Column, head).forward.__func__ if isinstance(head, Column) else type(head).forward  # type: ignore[misc]
    return head if own is nn.Linear.forward else None


def vocabulary_group(head: nn.Module) -> Any:
    """The process group whose ranks share the head's rows in its forward, None where each has them all."""
    return head.tp_ranks.group if isinstance(head, Column) else None


def is_whole(head: nn.Linear) -> bool:
    """Whether the head's weight is here in one piece (inside the forward of the unit it is sharded with)."""
    return not isinstance(head.weight, DTensor)


def probe_logits(vocab_size: int, device: torch.device) -> Tensor:
    """Known logits [V] in fp32: a small one, a huge one, and a range between that a soft-cap would bend."""
    probe = torch.linspace(-120.0, 120.0, vocab_size, device=device)
    probe[0], probe[-1] = 1e-5, 1e6
    return probe


def infer_transform(probe: Tensor, seen: Tensor) -> LogitTransform | None:
    """The transform that maps ``probe`` [V] to ``seen`` [..., V] at every entry; None where no scale and cap do."""
    if seen.numel() == 0 or seen.shape[-1] != probe.shape[-1]:
        return None
    rows = seen.detach().reshape(-1, probe.shape[-1]).double().cpu()
    expected = probe.double().cpu()
    if not torch.isfinite(rows).all():
        return None
    scale = (rows[0, 0] / expected[0]).item()
    if not 1e-6 < abs(scale) < 1e6:
        return None
    huge = rows[0, -1].item()
    capped = abs(huge) < 0.5 * abs(scale * expected[-1].item())
    transform = LogitTransform(_tidy(scale), _tidy(abs(huge)) if capped else None)
    return transform if torch.allclose(transform(expected).expand_as(rows), rows, rtol=1e-4, atol=1e-9) else None


def _tidy(number: float) -> float:
    """The short decimal that fp32 rounding hid, if there is one (0.0625000018 is 0.0625)."""
    for digits in range(1, 8):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= 1e-6 * abs(number):
            return short
    return number


@dataclass
class HeadState:
    """What is known of a model's head; kept on the model."""

    transform: LogitTransform | None = None  # None: not measured yet
    reason: str | None = None  # why the fused path is off
    cuts: bool = False  # it cuts logits and labels itself, so labels go in unshifted and are used as they come out

    def give_up(self, model: nn.Module, reason: str) -> None:
        """Turn the fused path off for this model and say so, once."""
        self.transform, self.reason = None, reason
        name = compat.base_class(model).__name__
        logger.warning("%s: loss computed from whole logits, because %s", name, reason)


def head_state(model: nn.Module) -> HeadState:
    """What is known of the head of ``model`` by now."""
    return model.__dict__.setdefault("_automodel_head", HeadState())


def keeps_logits(model: nn.Module) -> bool:
    """Whether a loss over hidden states is known not to fit ``model``, so that it gets whole logits."""
    return head_state(model).reason is not None or head_of(model) is None


def give_up_fusing(model: nn.Module) -> None:
    """Let ``model`` make whole logits for every loss from now on."""
    state = head_state(model)
    state.transform, state.reason = None, "its certificate says so"


def forget_head(model: nn.Module) -> None:
    """Have the next forward find out anew what ``model`` does to its logits."""
    model.__dict__.pop("_automodel_head", None)
