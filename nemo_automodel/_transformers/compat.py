"""Every private name of transformers that this package relies on, one function each; tests run them on each version."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


def unsplittable_class_names(model: nn.Module) -> set[str]:
    """Class names of the blocks that must stay whole (``_no_split_modules`` of the model and its parts)."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def attention_is_pluggable(model: nn.Module) -> bool:
    """Whether every text part of ``model`` takes its attention from the registry and knows a kernel-style one.

    A model that transformers itself can only run with its eager attention may put things into the scores that a
    kernel knows nothing of, so it counts as not pluggable.
    """
    return (
        isinstance(model, PreTrainedModel)
        and model._can_set_attn_implementation()
        and bool(model._supports_sdpa or model._supports_flash_attn)
    )


def attention_name(model: nn.Module) -> str:
    """The attention implementation in use, as transformers names it."""
    config = getattr(model, "config", None)
    return str(getattr(config and config.get_text_config(), "_attn_implementation", None))


def calls_loss_function(model_class: type) -> bool:
    """Whether the class's forward computes its loss by ``self.loss_function`` (nearly all do; the rest by hand)."""
    try:
        return "self.loss_function(" in inspect.getsource(inspect.unwrap(model_class.forward))  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False


def window_size(model: nn.Module) -> int | None:
    """The sliding window that the config names, None where it names none or attention is cut into chunks instead."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    return None if text is None or chunk_size(model) is not None else getattr(text, "sliding_window", None)


def chunk_size(model: nn.Module) -> int | None:
    """The size of the chunks that chunked attention is cut into, None where there is none."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    kinds = getattr(text, "layer_types", None) or ("chunked_attention",)
    return getattr(text, "attention_chunk_size", None) if "chunked_attention" in kinds else None


def model_class_for(auto_class: Any, config: PretrainedConfig) -> type | None:
    """The class that ``auto_class`` would build for ``config``, None where transformers has none."""
    mapping = auto_class._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def registered_types(kind: str) -> list[str]:
    """The model types that this transformers registers for ``kind``: causal, or vlm (image and text to text)."""
    names = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "vlm": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"}
    return sorted(getattr(modeling_auto, names[kind]))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether labels are what a decoder of its own puts out, beside an encoder's input."""
    return (
        bool(getattr(model.config, "is_encoder_decoder", False))
        and hasattr(model, "get_encoder")
        and ("decoder_input_ids" in inspect.signature(type(model).forward).parameters)
    )
