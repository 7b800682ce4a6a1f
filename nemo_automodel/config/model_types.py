"""The config class behind a ``model_type``, read from the tables of the installed transformers."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nemo_automodel.config.sources import Sources

_TABLES = ("transformers.models.auto.auto_mappings", "transformers.models.auto.configuration_auto")


def config_classes(sources: Sources) -> dict[str, str]:
    """``model_type`` -> dotted name of its config class; empty where transformers keeps its tables elsewhere."""
    found: dict[str, str] = {}
    for name in _TABLES:
        module = sources.module(name)
        for model_type, class_name in _pairs(module.tree) if module is not None else ():
            found.setdefault(model_type, f"transformers.{class_name}")
    return found


def _pairs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every literal ``("llama", "LlamaConfig")`` and ``{"llama": "LlamaConfig"}``."""
    for node in ast.walk(tree):
        entries: list[tuple[ast.expr | None, ast.expr]] = []
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            entries = [(node.elts[0], node.elts[1])]
        elif isinstance(node, ast.Dict):
            entries = list(zip(node.keys, node.values, strict=True))
        for key, value in entries:
            if not (isinstance(key, ast.Constant) and isinstance(value, ast.Constant)):
                continue
            if isinstance(key.value, str) and isinstance(value.value, str) and value.value.endswith("Config"):
                yield key.value, value.value
