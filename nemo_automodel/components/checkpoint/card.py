"""The model card: a README.md whose front matter says what the weights came from and how they are loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_id(name: str | None) -> str | None:
    """``name`` if it can be a Hub ID (``owner/name`` and no local path), else None."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def write_card(directory: Path, config: Any, datasets: tuple[str, ...] = (), adapter_of: str | None = None) -> None:
    """Write ``directory/README.md``, and nothing into it that is not known.

    Args:
        directory: An HF model directory or a PEFT adapter directory.
        config: The model's config (``_name_or_path`` is what it was loaded from).
        datasets: Hub IDs of the training data.
        adapter_of: For an adapter, the name of its base model.
    """
    source = adapter_of or getattr(config, "_name_or_path", "") or ""
    vision = hasattr(config, "vision_config")
    front = {
        "base_model": hub_id(source),
        "datasets": [name for name in datasets if hub_id(name)],
        "library_name": "peft" if adapter_of else "transformers",
        "license": _license(source),
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": [
            *(["base_model:adapter:" + source, "lora"] if adapter_of and hub_id(source) else []),
            "nemo-automodel",
        ],
    }
    known = {key: value for key, value in front.items() if value}
    title = Path(source).name or getattr(config, "model_type", "model")
    body = [
        "---",
        yaml.safe_dump(known, sort_keys=False).strip(),
        "---",
        "",
        f"# {title}, {'a LoRA adapter' if adapter_of else 'fine-tuned'}",
        "",
        "Trained with AutoModel (`nemo_automodel`). Loads as it is in transformers and PEFT:"
        if adapter_of
        else "Trained with AutoModel (`nemo_automodel`). Loads as it is in transformers:",
        "",
        "```python",
        *_usage(source, bool(adapter_of), vision),
        "```",
        "",
    ]
    (directory / "README.md").write_text("\n".join(body))


def _usage(source: str, adapter: bool, vision: bool) -> list[str]:
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    if not adapter:
        return [f"from transformers import {auto}", f'model = {auto}.from_pretrained("path/to/this/directory")']
    return [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{source}"), "path/to/this/directory")',
    ]


def _license(source: str) -> str | None:
    """The licence that the base model's own card declares, where that card is on this machine."""
    path: Any = Path(source) / "README.md"
    if hub_id(source):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(source, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    parts = Path(path).read_text(errors="replace").split("---")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    except yaml.YAMLError:
        return None
    return str(front["license"]) if isinstance(front, dict) and front.get("license") else None
