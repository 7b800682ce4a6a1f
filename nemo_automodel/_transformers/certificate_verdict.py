"""Which optimisations of a stack are wrong on a trial: all together first, one by one where that does not agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nemo_automodel._transformers.certificate_trial import Trial
from nemo_automodel._transformers.stack import ATTENTION, LORA, NEEDS, PACKING, Stack

_SEEDS = (0, 1)


@dataclass
class Verdict:
    """What a certificate found.

    Attributes:
        agree: the optimisations that compute what plain transformers does.
        off: those that do not, and by how much.
        unproved: what could not be tried, and why.
        worst: by stage, how far the worst was off: of the tiny twin a gradient's part of its norm, at real width the
            error of all gradients as a multiple of plain torch's own (in float32, again a gradient's part).
        tried: by stage, what it was tried on.
        seconds: what it took.
    """

    agree: list[str] = field(default_factory=list)
    off: dict[str, str] = field(default_factory=dict)
    unproved: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    tried: dict[str, str] = field(default_factory=dict)
    attention: str | None = None  # what the model attends by where ours is off
    seconds: float = 0.0


def settle(make: Callable[[int], Trial], stack: Stack, verdict: Verdict, stage: str) -> None:
    """Put what one stage finds into ``verdict``; ``make(seed)`` is its trial.

    What is wrong must be so with other tokens too: in 16 bit a router's choice may change by a hair, once.
    """
    asked = tuple(name for name in stack.optimisations if name not in verdict.off)
    off: dict[str, str] | None = None
    for seed in _SEEDS:
        trial = make(seed)
        if trial.objection(asked) is None:
            verdict.worst[stage] = trial.worst
            return
        found = _culprits(trial, asked, verdict)
        if found is None:
            verdict.unproved.append(f"{stage}: plain transformers and its own forward by us do not agree")
            return
        off = found if off is None else {name: reason for name, reason in found.items() if name in off}
        verdict.worst[stage] = trial.worst
    verdict.off |= {name: f"{reason} ({stage})" for name, reason in (off or {}).items()}


def _culprits(trial: Trial, asked: tuple[str, ...], verdict: Verdict) -> dict[str, str] | None:
    """The optimisations that do not agree, and why; None where the model does not without any of them either."""
    bare = trial.objection(())
    if bare is not None:  # adapters cannot be left out of a trial
        return {LORA: bare} if LORA in asked else None
    off: dict[str, str] = {}
    for name in asked:
        together = {name, *NEEDS.get(name, ())} & set(asked) - off.keys() | {name}
        if (reason := trial.objection(tuple(together))) is not None:
            off[name] = reason
    left = tuple(name for name in asked if name not in off)
    reason = trial.objection(left)
    if reason is not None and ATTENTION in left:  # each alone is right, and all together are not
        off[ATTENTION], left = reason, tuple(name for name in left if name != ATTENTION)
        reason = trial.objection(left)
    if reason is not None:
        off[PACKING if PACKING in left else left[0] if left else asked[0]] = reason
    if ATTENTION in off:
        own = trial.choose_attention(tuple(name for name in asked if name not in off))
        verdict.attention = "eager" if verdict.attention == "eager" else own
    return off


__all__ = ["Verdict", "settle"]
