"""Where a model that has no memory yet is tried out: on a small copy that has the same kinds of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.meta import is_meta
from nemo_automodel._transformers.plain import without_chance
from nemo_automodel._transformers.tiny_twin import tiny_twin

_FOUND = "_automodel_"  # how the names start under which trials keep what they found
_SMALL = "_nemo_automodel_small_copy"


@contextmanager
def tried_on(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model to run trials on: ``model`` itself, or its small copy; what they find is ``model``'s afterwards."""
    if not is_meta(model):
        yield model
        return
    small = small_copy(model)
    before = {key for key in vars(small) if key.startswith(_FOUND)}
    yield small
    found = {key: value for key, value in vars(small).items() if key.startswith(_FOUND) and key not in before}
    model.__dict__.update(found)


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The tiny twin of ``model``, of the same class and with its attention, on the CPU and in float32.

    It is built once and stays with ``model`` until ``take_small_copy``.
    """
    small = model.__dict__.get(_SMALL)
    if small is None:
        twin = tiny_twin(model.config)
        without_chance(twin)
        small = model.__dict__[_SMALL] = build(type(model), twin)
    small.__class__ = type(model)  # which may have got our methods since
    attention = compat.attention_name(model)
    if compat.attention_name(small) != attention and compat.attention_is_pluggable(small):
        small.set_attn_implementation(attention)
    return small


def take_small_copy(model: PreTrainedModel) -> PreTrainedModel | None:
    """The small copy that ``model`` was tried on, which it then no longer holds; None where there is none."""
    return model.__dict__.pop(_SMALL, None)


def build(cls: Any, config: PretrainedConfig, device: torch.device | None = None) -> PreTrainedModel:
    """A model of ``cls`` with fresh weights in float32, the same every time; random numbers of the run stay theirs."""
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        made: PreTrainedModel = cls._from_config(config, dtype=torch.float32)
    return made
