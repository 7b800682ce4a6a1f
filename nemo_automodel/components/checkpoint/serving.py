"""What to type to serve what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_automodel.components.checkpoint.adapters import CONFIG


def serving_advice(checkpoint: Path) -> str:
    """Lines that say where the result of a checkpoint is and how vLLM serves it.

    Args:
        checkpoint: An ``epoch_E_step_S`` directory.
    """
    model, adapter = checkpoint / "model", checkpoint / "adapter"
    adapter = adapter if adapter.is_dir() else model
    lines = [f"Checkpoint: {checkpoint}"]
    if (model / "config.json").exists():
        lines += [f"  serve the model:    vllm serve {model}"]
    if not (adapter / CONFIG).exists():
        return "\n".join(lines)
    config = json.loads((adapter / CONFIG).read_text())
    base, rank = config.get("base_model_name_or_path"), config.get("r", 0)
    if config.get("use_dora"):
        lines += [f"  vLLM has no DoRA; merge it first:  automodel merge {checkpoint}"]
    elif base:
        lines += [
            f"  serve the adapter:  vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(rank)} --lora-modules tuned={adapter}",
        ]
    if model == adapter:
        lines += [f"  merge it into full weights:  automodel merge {checkpoint}"]
    return "\n".join(lines)


def _vllm_rank(rank: int) -> int:
    """The smallest maximum that vLLM offers and that holds ``rank``."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
