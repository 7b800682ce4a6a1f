"""Checkpoints of any size that take no disk: headers are real, the weights are holes in a file (zeros)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion


def write_hollow(path: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, files: int = 3) -> int:
    """Write a checkpoint of ``config`` into ``path``, all zeros; returns the bytes of its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        tensors = revert_weight_conversion(model, model.state_dict())
    config.save_pretrained(path)
    names = sorted(tensors)
    weight_map, total = {}, 0
    for number in range(files):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        file, at = f"model-{number + 1:05d}-of-{files:05d}.safetensors", 0
        for name in names[number::files]:
            size = tensors[name].numel() * dtype.itemsize
            shape = list(tensors[name].shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name], at = file, at + size
        text = json.dumps(header).encode()
        with (path / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process has, or had at most."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
