"""Which parameters of a model are stacked experts that ranks can share out: by the expert-parallel plan it brings."""

from __future__ import annotations

import re

from torch import nn

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.experts import require_factors
from nemo_automodel.components._peft.experts import expert_adapters
from nemo_automodel.errors import ModelError

_SHARED_OUT = "grouped_gemm"  # transformers' word for a parameter [E, ...] of which each rank holds some experts


def ep_plan_for(model: nn.Module) -> dict[str, list[str]]:
    """Full name of each module of experts -> its parameters to share out, those of its adapters too.

    Raises ModelError, with what to do instead, for a model that brings no such plan.
    """
    styles = compat.own_ep_plan(model)
    patterns = [pattern for pattern, style in styles.items() if style == _SHARED_OUT]
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if any(_matches(name, pattern) for pattern in patterns):
            module, _, key = name.rpartition(".")
            found.setdefault(module, []).append(key)
    for module in found:
        require_factors(model.get_submodule(module), module)
        found[module] += expert_adapters(model.get_submodule(module))
    if not found:
        name = getattr(type(model), "automodel_base", type(model)).__name__
        raise ModelError(
            f"distributed.ep_size: {name} brings no plan for sharing out experts; write ep_size: 1 (FSDP2 shards its "
            "weights all the same)"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    """``*`` stands for a layer's number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
