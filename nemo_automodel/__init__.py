"""AutoModel: fine-tune any Hugging Face LLM or VLM, torch-native, with ordinary Hugging Face checkpoints out.

Public names are imported on first use, so that ``import nemo_automodel`` costs nothing and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "NeMoAutoModelForCausalLM": "nemo_automodel._transformers.auto_model",
    "NeMoAutoModelForImageTextToText": "nemo_automodel._transformers.auto_model",
}

__all__ = ["NeMoAutoModelForCausalLM", "NeMoAutoModelForImageTextToText", "__version__"]

if TYPE_CHECKING:
    from nemo_automodel._transformers.auto_model import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nemo_automodel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
