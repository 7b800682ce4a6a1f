"""``--a.b=c`` on the command line: overwrite or append one value of the tree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_automodel.config.suggest import did_you_mean
from nemo_automodel.config.tree import COMMAND_LINE, Node, parse_value
from nemo_automodel.errors import ConfigError

_DASHLESS = re.compile(r"-?[A-Za-z_][\w.]*=.*", re.DOTALL)
_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


@dataclass(frozen=True)
class Override:
    """One ``--path=text``; ``path`` is dotted, list items by number."""

    path: str
    text: str


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Read ``--a.b=c`` and ``--a.b c``.

    Raises:
        ConfigError: An argument without its dashes, an option without a value, a path that is none.
    """
    found: list[Override] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            fix = f"write --{argument.lstrip('-')}" if _DASHLESS.fullmatch(argument) else "write --section.key=value"
            raise ConfigError(f"{COMMAND_LINE} {argument}: not an option; {fix}")
        path, equals, text = argument[2:].partition("=")
        if not _PATH.fullmatch(path):
            raise ConfigError(f"{COMMAND_LINE} {argument}: not a key; write --section.key=value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{COMMAND_LINE} {argument}: no value; write {argument}=value")
            text = rest.pop(0)
        found.append(Override(path, text))
    return found


def apply_override(root: Node, override: Override) -> None:
    """Set one value in the tree, making the mappings on its way; whether anything reads it is validation's to say.

    Raises:
        ConfigError: The path goes through a plain value, or through a list at a place it does not have.
    """
    *parents, last = override.path.split(".")
    node, walked = root, ""
    for name in parents:
        node = _child(node, name, walked, override)
        walked = f"{walked}.{name}" if walked else name
    value = parse_value(override.text, COMMAND_LINE, override.path)
    if isinstance(node.value, list):
        index = _index(node, last, walked, override, appending=True)
        node.value[index : index + 1] = [value]
    else:
        _require_mapping(node, walked, override)
        node.value[last] = value


def _child(node: Node, name: str, walked: str, override: Override) -> Node:
    if isinstance(node.value, list):
        return node.value[_index(node, name, walked, override)]
    _require_mapping(node, walked, override)
    child = node.value.get(name)
    if child is None or child.value is None:
        child = node.value[name] = Node({}, COMMAND_LINE)
    return child


def _index(node: Node, name: str, walked: str, override: Override, appending: bool = False) -> int:
    length = len(node.value)
    if name.isdecimal() and int(name) < length + appending:
        return int(name)
    there = f"it has items 0 to {length - 1}" if length else "it is empty"
    fix = f"{length} appends" if appending else "use one of those numbers"
    raise ConfigError(f"{COMMAND_LINE} {override.path}={override.text}: {walked} is a list and {there}; {fix}")


def _require_mapping(node: Node, walked: str, override: Override) -> None:
    if not node.is_mapping:
        raise ConfigError(
            f"{COMMAND_LINE} {override.path}={override.text}: {walked} is the value {node.shown()} ({node.where}), "
            f"not a mapping; write --{walked}=value"
        )


def split_options(
    argv: Sequence[str], flags: Sequence[str], valued: Mapping[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Take the command's own options out of ``argv``; what is left are overrides.

    Args:
        argv: Arguments after the verb.
        flags: Options without a value, such as ``--help``.
        valued: Options with one, and an example of it for messages (``{"--config": "recipe.yaml"}``).

    Returns:
        ``(options, rest)``: the values of every option given, in order (none for a flag), and the rest.

    Raises:
        ConfigError: An option without its value, or one that there is not.
    """
    options: dict[str, list[str]] = {}
    left: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        has_next = bool(rest) and not rest[0].startswith("--")
        if argument in flags:
            options.setdefault(argument, [])
        elif name in valued:
            if not equals and not has_next:
                raise ConfigError(f"{COMMAND_LINE} {name}: no value; write {name} {valued[name]}")
            options.setdefault(name, []).append(value if equals else rest.pop(0))
        elif argument.startswith("-") and "." not in name and not equals and not has_next:
            hint = did_you_mean(name, [*flags, *valued]) or "overrides are written --section.key=value"
            raise ConfigError(f"{COMMAND_LINE} {argument}: unknown option; {hint}")
        else:
            left.append(argument)
            if argument.startswith("--") and not equals and has_next:
                left.append(rest.pop(0))
    return options, left
