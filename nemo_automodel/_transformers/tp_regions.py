"""What a tensor-parallel plan needs besides its column and row layers: regions that enter once, embedding and head."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nemo_automodel.components.distributed.tensor_parallel import Layer

logger = logging.getLogger(__name__)


def find_regions(layers: Mapping[str, Layer], blocks: Iterable[str]) -> set[str]:
    """Modules (no decoder block itself) that hold column layers and one row layer, or column layers alone.

    What such a module makes of its input reaches the rest of the model through its row layer only, so that every
    gradient inside it is one rank's part, and its input can be taken in once.
    """
    blocks = set(blocks)
    members: dict[str, list[Layer]] = {}
    for name, layer in layers.items():
        while "." in name:
            name = name.rpartition(".")[0]
            members.setdefault(name, []).append(layer)
    found = {
        name
        for name, inside in members.items()
        if name not in blocks
        and not any(block.startswith(f"{name}.") for block in blocks)
        and all(layer.kind in ("column", "row") and not layer.whole for layer in inside)
        and sum(layer.kind == "row" for layer in inside) <= 1
        and any(layer.kind == "column" for layer in inside)
    }
    return {name for name in found if not any(name.startswith(f"{other}.") for other in found)}


def ends_of(model: Any, tp_size: int) -> dict[str, Layer]:
    """Embedding and output head cut along the vocabulary; nothing where that does not divide by ``tp_size``."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            layers[name] = Layer("vocabulary")
        elif module is head and isinstance(module, nn.Linear):
            layers[name] = Layer("column", whole=True)
    return {} if _odd_vocabulary(model, tp_size) else layers


def fit_ends(model: Any, layers: dict[str, Layer], tp_size: int) -> dict[str, Layer]:
    """``layers``, with embedding and head cut alike where they are one weight, and neither where none can be."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    if _odd_vocabulary(model, tp_size):
        logger.info("%s: its vocabulary is whole on each rank; %d does not divide it", type(model).__name__, tp_size)
        return {name: layer for name, layer in layers.items() if name not in names}
    tied = head is not None and embedding.weight is head.weight
    return {**layers, **ends_of(model, tp_size)} if tied and layers.keys() & set(names) else layers


def _odd_vocabulary(model: Any, tp_size: int) -> bool:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(end.weight.shape[0] % tp_size for end in ends if isinstance(getattr(end, "weight", None), nn.Parameter))
