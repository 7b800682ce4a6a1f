"""Finding out, before training starts, which linear layers of a module are called with the same tensor (q, k and v, say).

Adapters on such layers read that tensor once for all of them (``components/_peft/shared.py``). Seen by running a few
tokens through the model, for each class of modules: only what all its modules do in every call counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.trial import few_tokens
from nemo_automodel.components._peft.shared import share_inputs

logger = logging.getLogger(__name__)

SHARED_INPUTS = "_automodel_shared_inputs"
"""Set on a model that was tried: the items of what ``share_inputs`` takes."""

Groups = tuple[tuple[str, ...], ...]


def find_shared_inputs(model: nn.Module) -> None:
    """Run a few tokens through ``model`` and keep which linear layers share an input.

    Call it on a whole model, before it is adapted, sharded or compiled.
    """
    model.__dict__[SHARED_INPUTS] = ()
    try:
        with _recorded(model) as (calls, given):
            few_tokens(model)
    except Exception as error:  # any model may want more than token ids; layers that work alone are right for it
        logger.info("%s: adapters work layer by layer (a trial failed: %s)", type(model).__name__, error)
        return
    found: dict[type, Groups] = {}
    for owner, inputs in calls:
        groups = _groups([call for call in inputs if id(call[1]) not in given])
        before = found.get(type(owner))
        found[type(owner)] = groups if before is None else tuple(group for group in before if group in groups)
    model.__dict__[SHARED_INPUTS] = tuple(found.items())  # by pairs, which a certificate can write down


def share_found_inputs(model: nn.Module) -> None:
    """Let the adapters of ``model`` share inputs as ``find_shared_inputs`` found."""
    count = share_inputs(model, dict(model.__dict__.get(SHARED_INPUTS, ())))
    if count:
        logger.info("LoRA: %d groups of layers share an input and read it once", count)


Call = tuple[nn.Module, list[tuple[str, Tensor, int]]]


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[list[Call], dict[int, Tensor]]]:
    """Every call of a module that has linear layers, with those that it then called, their inputs and these's versions.

    Beside it what blocks were given, by identity: where a block is compiled, nothing can be left at a tensor from outside.
    """
    calls: list[Call] = []
    given: dict[int, Tensor] = {}
    under_way: dict[int, list[tuple[str, Tensor, int]]] = {}
    handles: list[Any] = []

    def begin(owner: nn.Module, *_: Any) -> None:
        under_way[id(owner)] = []
        calls.append((owner, under_way[id(owner)]))

    def note(owner: nn.Module, name: str, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and id(owner) in under_way:
            under_way[id(owner)].append((name, args[0], args[0]._version))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update({id(value): value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)})

    handles += [block.register_forward_pre_hook(enter, with_kwargs=True) for block in find_blocks(model)]
    for owner in model.modules():
        layers = [(name, child) for name, child in owner.named_children() if isinstance(child, nn.Linear)]
        if len(layers) < 2:
            continue
        handles.append(owner.register_forward_pre_hook(begin))
        for name, layer in layers:
            handles.append(
                layer.register_forward_pre_hook(lambda _, args, owner=owner, name=name: note(owner, name, args))
            )
    try:
        yield calls, given
    finally:
        for handle in handles:
            handle.remove()


def _groups(inputs: list[tuple[str, Tensor, int]]) -> Groups:
    """The layers called once each with the same tensor, in the order of their calls."""
    by_input: dict[tuple[int, int], list[str]] = {}
    for name, x, version in inputs:
        by_input.setdefault((id(x), version), []).append(name)
    names = [name for name, _, _ in inputs]
    once = [[name for name in group if names.count(name) == 1] for group in by_input.values()]
    return tuple(tuple(group) for group in once if len(group) > 1)
