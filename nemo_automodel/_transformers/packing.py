"""Which models cannot keep packed documents apart, and why: by what their layers are, never by their name."""

from __future__ import annotations

from typing import Any

from torch import nn

from nemo_automodel._transformers import compat
from nemo_automodel.errors import ModelError

PASSES_DOCUMENTS = "_automodel_passes_documents"
"""Set on a model that was tried for packing: whether every attention call gets to know where documents end."""
FIX = "write packed_sequence.packed_sequence_size: 0 to train it padded"

_KEEPS_DOCUMENTS_APART = {"full_attention", "sliding_attention"}


def refuse_packing(model: nn.Module) -> None:
    """Raise ModelError, with the reason, where the layers of ``model`` let packed documents leak into each other."""
    name = type(model).__name__
    if not compat.attention_is_pluggable(model):
        raise ModelError(
            f"packed_sequence: {name} runs its own attention ({compat.attention_name(model)}), which would let packed "
            f"documents attend to each other; {FIX}"
        )
    if compat.chunk_size(model) is not None:
        raise ModelError(
            f"packed_sequence: {name} attends within chunks counted from the start of the row, so packed documents "
            f"would be cut at other places than separate ones; {FIX}"
        )
    if mixing := mixing_layers(model):
        raise ModelError(
            f"packed_sequence: {name} has layers that carry state from token to token without attention ({mixing}), "
            f"so packed documents would leak into each other; {FIX}"
        )
    if not compat.takes_positions(model):
        raise ModelError(
            f"packed_sequence: {name} takes no position_ids, so positions would not restart at each packed document; {FIX}"
        )


def mixing_layers(model: nn.Module) -> str:
    """The non-attention layer kinds of ``model`` that mix tokens, as text; empty where there are none."""
    text = compat.text_config(model)
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    found = sorted(kinds - _KEEPS_DOCUMENTS_APART)
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder: nn.Module = (get_decoder and get_decoder()) or model
    for path, module in decoder.named_modules():
        if isinstance(module, nn.Conv1d) or hasattr(module, "A_log") or hasattr(module, "ssm_state_size"):
            found.append(f"{path}: {type(module).__name__}")
            break
    return ", ".join(found)
