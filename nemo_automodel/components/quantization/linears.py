"""The linear layers of a model, and giving one another way to compute while it stays what it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def block_linears(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    """Every linear layer inside ``blocks``, once each."""
    return list({m: None for block in blocks for m in block.modules() if isinstance(m, nn.Linear)})


def computes_plainly(module: nn.Linear) -> bool:
    """Whether ``module`` is ``nn.Linear`` or an adapter on one, with no forward of its own."""
    plain = type(module) is nn.Linear or nn.Linear in type(module).__bases__
    return plain and "forward" not in module.__dict__


_classes: dict[tuple[type, type], type] = {}


def with_mixin(cls: type, mixin: type, what: str) -> type:
    """``cls`` with ``mixin`` before ``nn.Linear``: what stands before that, an adapter say, stays there.

    ``what`` ends the sentence that describes the class, which is called as ``cls``, with the mixin's prefix.
    """
    if (cls, mixin) not in _classes:
        bases = (nn.Linear,) if cls is nn.Linear else cls.__bases__
        at = bases.index(nn.Linear)
        name = mixin.__name__.removesuffix("Linear") + cls.__name__
        _classes[cls, mixin] = type(name, (*bases[:at], mixin, *bases[at:]), {"__doc__": f"``{cls.__name__}`` {what}."})
    return _classes[cls, mixin]
