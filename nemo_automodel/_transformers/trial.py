"""Where a model that has no memory yet is tried out: on a small copy that has the same kinds of layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.meta import is_meta
from nemo_automodel._transformers.tiny_twin import tiny_twin

_FOUND = "_automodel_"  # how the names start under which trials keep what they found


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
    """A tiny twin of ``model``, of the same class and with its attention, on the CPU and in float32."""
    twin = tiny_twin(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small: PreTrainedModel = type(model)._from_config(twin, dtype=torch.float32)
    attention = compat.attention_name(model)
    if compat.attention_name(small) != attention and compat.attention_is_pluggable(small):
        small.set_attn_implementation(attention)
    return small
