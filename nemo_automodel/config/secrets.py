"""Secrets stay in the environment: a recipe is copied into checkpoints, trackers and ``--print-config``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_automodel.config.tree import Node

_NAME = re.compile(
    r"token|use_auth_token|(.+_)?((auth|access|api|hf|hub|bearer)_token|password|passwd|secret|(api|access|secret|private)_key)",
    re.IGNORECASE,
)
_URL = re.compile(r"\w+://[^/\s:@]*:[^/\s@]+@")


def may_be_secret(value: str, *names: str) -> bool:
    """Whether ``value``, of a key or a variable of one of these names, is one that nothing may be told of."""
    return any(map(_NAME.fullmatch, names)) or _URL.match(value) is not None


def written_secrets(node: Node, path: str = "") -> Iterator[str]:
    """A message for every password, token or key that is written out instead of ``${VAR}``; it does not repeat it."""
    children = (
        node.value.items()
        if isinstance(node.value, dict)
        else enumerate(node.value)
        if isinstance(node.value, list)
        else ()
    )
    for key, child in children:
        yield from written_secrets(child, f"{path}.{key}" if path else str(key))
    if not isinstance(node.value, str) or not node.value or node.reference is not None:
        return
    name = path.rpartition(".")[2]
    if _NAME.fullmatch(name):
        variable = "HF_TOKEN" if name.lower() == "token" else name.upper()
        whole = f"${{{variable}}}"
    elif _URL.match(node.value):
        variable, whole = "PASSWORD", "${PASSWORD} in its place"
    else:
        return
    yield (
        f"{node.where} {path}: a secret written out would be kept in every checkpoint; "
        f"write {whole}, and run `export {variable}=...` first"
    )
