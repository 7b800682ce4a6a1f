"""A PEFT adapter directory: ``adapter_model.safetensors``, ``adapter_config.json``, tokenizer and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_automodel.components.checkpoint.card import write_card
from nemo_automodel.components.checkpoint.hf import write_tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(
    directory: Path,
    weights: dict[str, torch.Tensor],
    adapter_config: Mapping[str, Any],
    tokenizer: Any | None,
    model_config: Any,
    datasets: tuple[str, ...] = (),
) -> None:
    """Write an adapter directory that PEFT and vLLM load as it is; called on one rank only.

    Args:
        directory: Is created.
        weights: Whole CPU tensors under PEFT's names (``base_model.model.<module>.lora_A.weight``).
        adapter_config: PEFT's config as plain values; ``base_model_name_or_path`` says what it applies to.
        tokenizer: Saved beside it, or None.
        model_config: The base model's config, for the card.
        datasets: Hub IDs for the card.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in weights.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(dict(adapter_config), indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        write_tokenizer(directory, tokenizer)
    write_card(directory, model_config, datasets, adapter_of=str(adapter_config["base_model_name_or_path"]))
