"""Where a model that has no memory yet is tried out: on a small copy that has the same kinds of layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from nemo_automodel._transformers.meta import is_meta

logger = logging.getLogger(__name__)

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
    """A model of the same class on the CPU, in float32, of a layer of each kind and a small vocabulary."""
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    wanted = max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)
    if getattr(text, "num_hidden_layers", 0) > wanted:
        text.num_hidden_layers = wanted
        if kinds:
            text.layer_types = kinds[:wanted]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = type(model)._from_config(config, dtype=torch.float32)
    return small.eval()
