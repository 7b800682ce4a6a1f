"""What to type to serve what a run wrote."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from nemo_automodel.components.checkpoint.adapters import CONFIG

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of its --max-lora-rank


def serving_advice(checkpoint: Path) -> str:
    """Lines that say where the result of a checkpoint is and how vLLM serves it.

    Args:
        checkpoint: An ``epoch_E_step_S`` directory.
    """
    model, adapter = checkpoint / "model", checkpoint / "adapter"
    adapter = adapter if adapter.is_dir() else model
    lines = [f"Checkpoint: {checkpoint}"]
    if (model / "config.json").exists():
        lines += [f"  serve the model:    vllm serve {_typed(model)}"]
    if not (adapter / CONFIG).exists():
        return "\n".join(lines)
    config = json.loads((adapter / CONFIG).read_text())
    base, rank = config.get("base_model_name_or_path"), config.get("r", 0)
    largest = next(
        (size for size in _VLLM_RANKS if size >= rank), None
    )  # the smallest that vLLM offers and that holds it
    if config.get("use_dora"):
        if model == adapter:
            lines += [f"  vLLM has no DoRA; merge it first:  automodel merge {_typed(checkpoint)}"]
    elif base and largest is not None:
        lines += [
            f"  serve the adapter:  vllm serve {_typed(base)} --enable-lora --max-lora-rank {largest} --lora-modules {_typed(f'tuned={adapter}')}",
        ]
    if model == adapter:
        lines += [f"  merge it into full weights:  automodel merge {_typed(checkpoint)}"]
    return "\n".join(lines)


def _typed(what: Any) -> str:
    return shlex.quote(str(what))
