"""YAML as a tree of nodes that know their file, line and column.

Scalars follow YAML 1.2's core rules (``1e-5`` is a number). What YAML 1.1 would read as something other than what is
written (``no``, ``010``, ``1:30``) is marked as a *trap*; validation reports it wherever the difference matters.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_automodel.config.secrets import may_be_secret
from nemo_automodel.errors import ConfigError

_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")}  # fmt: skip
_MAX_NODES = 10_000
_MAX_DEPTH = 50

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_BOOL_1_1 = {spelling: word in ("yes", "on") for word in ("yes", "no", "on", "off") for spelling in (word, word.title(), word.upper())}  # fmt: skip
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
_OCTAL_1_1 = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL_1_1 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_ENV = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}|\$\{[^}]*\}?")
_OF_THE_SHELL = ("-", "=", "?", "+")


@dataclass(frozen=True)
class Where:
    """Where a key or value was written: a place in a file (lines and columns from 1), or a command-line option."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


COMMAND_LINE = Where("command line")


class Reference(str):
    """Text with ``${VAR}`` in it, as it was written: ``dump`` writes it back so.

    Attributes:
        quoted: Whether what it becomes is text whatever it looks like.
        digest: Tells one value from another; None for what may be a secret.
    """

    quoted = False
    digest: str | None = None


@dataclass
class Node:
    """One value of the tree.

    Attributes:
        value: ``dict[str, Node]``, ``list[Node]`` or a plain scalar.
        where: Of its key; of the value itself for an item of a list.
        text: A scalar as written, for messages: ``${VAR}``, never what the environment holds.
        trap: How YAML 1.1 reads an unquoted scalar otherwise, and what to write instead.
        reference: A scalar as written, where ``${VAR}`` was filled in.
    """

    value: Any
    where: Where
    text: str = ""
    trap: str | None = None
    reference: Reference | None = None

    @property
    def is_mapping(self) -> bool:
        """Whether ``value`` is a dict of nodes."""
        return isinstance(self.value, dict)

    def plain(self) -> Any:
        """The value as plain Python dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def as_written(self) -> Any:
        """The value as plain Python, but every ``${VAR}`` still to be filled in (a ``Reference``)."""
        if isinstance(self.value, dict):
            return {key: child.as_written() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.as_written() for child in self.value]
        return self.value if self.reference is None else self.reference

    def shown(self) -> str:
        """The value in a message: as written, shortened."""
        if isinstance(self.value, dict):
            return "{...}" if self.value else "{}"
        if isinstance(self.value, list):
            return "[...]" if self.value else "[]"
        return self.text if len(self.text) <= 60 else self.text[:57] + "..."


def load_yaml(path: str | Path) -> Node:
    """Read a YAML file whose root is a mapping.

    Raises:
        ConfigError: Missing, unreadable, empty, not YAML, or with a construct that is refused (duplicate keys,
            tags that build Python objects, aliases that expand without bound, unset ``${VAR}``).
    """
    text = _read(path)
    root = _compose(text, str(path))
    if root is None:
        raise ConfigError(f"{path}: the file is empty; write a recipe: a mapping with at least model and dataset")
    node = _Builder(str(path)).build(root, Where(str(path), 1, 1), "")
    if not node.is_mapping:
        raise ConfigError(
            f"{path}:1: the root is not a mapping; write `section:` lines such as `model:` and `dataset:`"
        )
    return node


def parse_value(text: str, where: Where, path: str) -> Node:
    """One value from the command line, read as YAML reads it (``[1, 2]`` and ``{a: 1}`` included)."""
    if text[:1] not in ("[", "{", '"', "'"):
        return plain_scalar(text, where, path)
    root = _compose(text, str(where))
    assert root is not None  # it has at least one character
    node = _Builder(str(where)).build(root, where, path)
    _relocate(node, where)
    return node


def plain_scalar(text: str, where: Where, path: str) -> Node:
    """An unquoted scalar: environment variables filled in, then its type found."""
    value, trap = resolve_plain(interpolate(text, where, path))
    return Node(value, where, text, trap, _reference(text, value, path, quoted=False))


def resolve_plain(text: str) -> tuple[Any, str | None]:
    """``(value, trap)`` of an unquoted scalar."""
    if text in _NULL:
        return None, None
    if text in _BOOL:
        return _BOOL[text], None
    if text in _BOOL_1_1:
        value = _BOOL_1_1[text]
        return value, f"YAML reads an unquoted {text} as {str(value).lower()}; write {str(value).lower()}, or '{text}' for the word"  # fmt: skip
    digits = text.replace("_", "")
    if _INT.fullmatch(text):
        return int(digits, 0), None
    if _OCTAL_1_1.fullmatch(text):
        number = digits.lstrip("+-0") or "0"
        return text, f"YAML 1.1 reads {text} as octal; write {number}, or '{text}' for the text"
    if _SEXAGESIMAL_1_1.fullmatch(text):
        return text, f"YAML 1.1 reads {text} as a number in base 60; write '{text}' for the text, or the plain number"
    if _FLOAT.fullmatch(text):
        return float(digits), None
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float((special[1] or "") + "inf") if special[2] else float("nan"), None
    return text, None


def interpolate(text: str, where: Where, path: str) -> str:
    """Fill in ``${VAR}`` and ``${VAR:default}`` from the environment; ``$${`` stands for a literal ``${``."""

    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if name is None or (default is not None and (name == "env" or "${" in default)):
            raise ConfigError(
                f"{where} {path}={text}: {match[0]} names no environment variable; write ${{VAR}} or ${{VAR:default}}, "
                "or $${ for a literal ${"
            )
        if default is not None and default.startswith(_OF_THE_SHELL):
            raise ConfigError(
                f"{where} {path}={text}: a default cannot start with `{default[0]}`, as in a shell; write "
                f"${{{name}:{default[1:]}}}, without the `{default[0]}`, or run `export {name}={default}` for that value"
            )
        value = os.environ.get(name, default)
        if value is None:
            raise ConfigError(
                f"{where} {path}={text}: the environment variable {name} is not set; "
                f"run `export {name}=...` first, or write ${{{name}:default}}"
            )
        return value

    return _ENV.sub(fill, text)


def _reference(text: str, value: Any, path: str, quoted: bool) -> Reference | None:
    variables = [match[1] for match in _ENV.finditer(text) if match[1]]
    if not variables:
        return None
    found = Reference(text)
    found.quoted = quoted
    if not may_be_secret(str(value), path.rpartition(".")[2], *variables):
        found.digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
    return found


class _Dumper(yaml.SafeDumper):
    """Writes what ``load_yaml`` reads back as the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    safe = text.replace("${", "$${")
    style = None if resolve_plain(safe) == (safe, None) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", safe, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    nested = any(isinstance(item, dict | list | Reference) for item in items)  # a flow would quote a ${VAR}
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=not nested)


_Dumper.add_representer(str, _represent_str)


def _represent_reference(dumper: yaml.SafeDumper, text: Reference) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"' if text.quoted else None)


_Dumper.add_representer(Reference, _represent_reference)
_Dumper.add_representer(list, _represent_list)


def dump(data: dict[str, Any]) -> str:
    """``data`` as YAML in the order given; reading it again gives equal values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True)


def _read(path: str | Path) -> str:
    file = Path(path)
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        there = sorted(str(p) for p in file.parent.glob("*.y*ml"))[:5] if file.parent.is_dir() else []
        hint = f"there are: {', '.join(there)}" if there else "check the path, which is relative to the current folder"
        raise ConfigError(f"{path}: no such file; {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        fix = "indent with spaces, not tabs" if "'\\t'" in str(error.problem) else "check quotes, colons and indentation there"  # fmt: skip
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{place}: not valid YAML: {error.problem}{context}; {fix}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}; remove that character") from None


def _relocate(node: Node, where: Where) -> None:
    node.where = where
    children = (
        node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    )
    for child in children:
        _relocate(child, where)


class _Builder:
    """Turns PyYAML's node graph into a tree of ours, counting what aliases expand to."""

    def __init__(self, file: str):
        self._file = file
        self._count = 0

    def build(self, node: yaml.Node, where: Where, path: str, depth: int = 0) -> Node:
        self._count += 1
        if self._count > _MAX_NODES or depth > _MAX_DEPTH:
            raise ConfigError(
                f"{self._at(node)} {path or '<root>'}: aliases expand to more than {_MAX_NODES} values or {_MAX_DEPTH} "
                "levels; write the values out instead of repeating *aliases"
            )
        if node.tag not in _CORE_TAGS:
            raise ConfigError(
                f"{self._at(node)} {path or '<root>'}: the tag {_short_tag(node.tag)} builds an object and is refused; "
                "write plain values, and `_target_: package.callable` to build something"
            )
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path, depth), where)
        if isinstance(node, yaml.SequenceNode):
            items = [self.build(item, self._at(item), f"{path}.{i}", depth + 1) for i, item in enumerate(node.value)]
            return Node(items, where)
        assert isinstance(node, yaml.ScalarNode)
        if node.style in ("'", '"', "|", ">"):
            text = interpolate(node.value, where, path)
            return Node(text, where, node.value, None, _reference(node.value, text, path, quoted=True))
        return plain_scalar(node.value, where, path)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self._at(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where} {path or '<root>'}: a key must be a word; write `name: value`")
            key = key_node.value
            child_path = f"{path}.{key}" if path else key
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._merge(merged, value_node, path, depth)
                continue
            if key in own:
                raise ConfigError(
                    f"{where} {child_path}: duplicate key, first written at {own[key].where}; keep one of the two"
                )
            own[key] = self.build(value_node, where, child_path, depth + 1)
        return merged | own

    def _merge(self, into: dict[str, Node], value_node: yaml.Node, path: str, depth: int) -> None:
        sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise ConfigError(
                    f"{self._at(value_node)} {path or '<root>'}: `<<` takes a mapping; write `<<: *anchor`"
                )
            for key, child in self.build(source, self._at(source), path, depth + 1).value.items():
                into.setdefault(key, child)

    def _at(self, node: yaml.Node) -> Where:
        return Where(self._file, node.start_mark.line + 1, node.start_mark.column + 1)


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix("tag:yaml.org,2002:") if tag.startswith("tag:yaml.org,2002:") else tag
