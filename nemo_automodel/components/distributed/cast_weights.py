"""Weights stored in one dtype and computed with in another, on one rank: each is cast in the forward that uses it.

FSDP2 does so as a by-product of gathering, by five copies of every weight and its gradient in a step (28 bytes a weight for
fp32 and bf16). Where there is nothing to gather, autograd's own cast takes 12: fp32 read and bf16 written, and the same back
for the gradient. Gradients arrive at the stored weights, so those of micro-batches add up in the stored dtype.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

_Names = list[list[tuple[dict[str, Any], str]]]  # of each weight: the ``_parameters`` that it is in, and its name there


def cast_in_forward(module: nn.Module, weights: Collection[nn.Parameter], dtype: torch.dtype) -> None:
    """Let the forward of ``module`` find those of its ``weights`` as tensors of ``dtype``, in place.

    Outside of its forward they are what they were. Works on the forward of its class, below whatever replaces that of the
    object (activation checkpointing does), and inside of what is compiled.
    """
    names = _names(module.modules(), weights)
    if names:
        module._weights_cast = (names, dtype)  # type: ignore[assignment]
        module.__class__ = _casting(type(module))  # type: ignore[arg-type]


def cast_in_call(
    model: nn.Module, weights: Collection[nn.Parameter], dtype: torch.dtype, besides: Iterable[nn.Module]
) -> None:
    """The same for the call of a whole ``model``, and for what is in none of the modules ``besides``, which cast their own."""
    inside = {inner for module in besides for inner in module.modules()}
    names = _names((module for module in model.modules() if module not in inside), weights)
    kept: list[list[nn.Parameter]] = []

    def before(*_: Any) -> None:
        kept.append(_swap(names, dtype))

    def after(*_: Any) -> None:
        _put_back(names, kept.pop())

    if names:
        model.register_forward_pre_hook(before)
        model.register_forward_hook(after, always_call=True)


def casts(module: nn.Module) -> set[nn.Parameter]:
    """The weights that ``module`` casts in its own forward."""
    names, _ = module.__dict__.get("_weights_cast", ([], None))
    return {parameters[name] for ((parameters, name), *_) in names}


def can_be_cast(module: nn.Module) -> bool:
    """Whether ``module`` reads its weights where they are registered; torch's recurrent layers keep a list besides."""
    return type(module).__setattr__ is nn.Module.__setattr__


def _names(modules: Iterable[nn.Module], weights: Collection[nn.Parameter]) -> _Names:
    found: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in weights:
                found.setdefault(parameter, []).append((module._parameters, name))
    return list(found.values())


def _swap(names: _Names, dtype: torch.dtype) -> list[nn.Parameter]:
    kept = [parameters[name] for ((parameters, name), *_) in names]
    values = [parameter.to(dtype) for parameter in kept]  # all of them first: memory may run out
    for places, value in zip(names, values, strict=True):
        for parameters, name in places:  # of a tied weight one tensor, whose gradients add up before they are cast
            parameters[name] = value
    return kept


def _put_back(names: _Names, kept: list[nn.Parameter]) -> None:
    for places, parameter in zip(names, kept, strict=True):
        for parameters, name in places:
            parameters[name] = parameter


@functools.cache
def _casting(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls``, under its own name, with weights cast in its forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names, dtype = self._weights_cast
        kept = _swap(names, dtype)
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            _put_back(names, kept)

    forward = functools.wraps(cls.forward)(_apart(forward))
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with code of its own: torch.compile counts how often it compiled by code, whatever the class."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
