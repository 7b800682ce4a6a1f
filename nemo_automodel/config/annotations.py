"""Whether a value from the YAML fits a parameter's annotation, without importing what the annotation names."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nemo_automodel.config.signatures import COMPUTED, REQUIRED, Parameter
from nemo_automodel.config.sources import Definition, Sources
from nemo_automodel.config.suggest import nearest
from nemo_automodel.config.tree import Node

_ANYTHING = {"Any", "object", "Callable", "Hashable", "type", "Type"}
_LISTS = {"list", "List", "Sequence", "MutableSequence", "Iterable", "Collection", "Iterator"}
_TUPLES = {"tuple", "Tuple"}
_SETS = {"set", "Set", "frozenset", "FrozenSet"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "OrderedDict"}
_PATHS = {"Path", "PathLike", "PurePath", "StrPath"}
_BUILT = {"Tensor", "Parameter", "Module"}
_WRAPPERS = {"Optional", "Union", "Annotated", "Final", "ClassVar"}
_SCALAR_BASES = {"str", "int", "float", "bool", "dict", "list", "TypedDict", "Protocol"}
_ALIAS_DEPTH = 4


class Fit(Enum):
    """How well a value fits."""

    NO = 0
    UNKNOWN = 1
    YES = 2


@dataclass(frozen=True)
class Misfit:
    """A value of the wrong type: which node, its path below the parameter, and what to write."""

    node: Node
    path: str
    problem: str
    fix: str


class Annotations:
    """Checks values against annotations; names in these are looked up in the module that wrote them."""

    def __init__(self, sources: Sources):
        self._sources = sources

    def check(self, node: Node, parameter: Parameter) -> list[Misfit]:
        """What does not fit; where it fits, ``node.value`` becomes what the parameter takes (1 -> 1.0, none -> None)."""
        annotation = _parse(parameter.annotation) if parameter.annotation else _implied(parameter.default)
        if annotation is None:
            return list(_traps(node, ""))
        return self._check(node, "", annotation, parameter.module)

    def _check(self, node: Node, path: str, annotation: ast.expr, module: str) -> list[Misfit]:
        members = list(self._members(annotation, module, _ALIAS_DEPTH))
        if node.trap is not None and node.text in _choices(members):  # `off` where the word off is a choice
            node.value, node.trap = node.text, None
            return []
        if node.trap is not None and not (isinstance(node.value, bool) and {"bool"} == _simple(members) - {"None"}):
            return [Misfit(node, path, *_split(node.trap))]
        fit, value = self._best(node, members, module)
        names = _simple(members)
        said_none = isinstance(node.value, str) and node.value.lower() == "none"
        if said_none and fit is not Fit.YES and "None" in names and "str" not in names:
            node.value = None
            return []
        if fit is not Fit.NO:
            node.value = value
            return list(self._inside(node, path, members, module))
        items = [m for m in members if _is_container(m) and isinstance(node.value, list)]
        if len(items) == 1 and (inside := list(self._inside(node, path, items, module))):
            return inside
        return [Misfit(node, path, *self._explain(node, annotation, members))]

    def _best(self, node: Node, members: list[ast.expr], module: str) -> tuple[Fit, Any]:
        fits = [self._fit(node, member, module) for member in members]
        exact = [f for f in fits if f[0] is Fit.YES and type(f[1]) is type(node.value)]
        return max([*exact, *fits], key=lambda f: f[0].value, default=(Fit.UNKNOWN, node.value))

    def _fit(self, node: Node, annotation: ast.expr, module: str) -> tuple[Fit, Any]:
        value = node.value
        if isinstance(value, dict) and "_target_" in value:
            return Fit.UNKNOWN, value
        name = _name(annotation)
        if isinstance(annotation, ast.Subscript) and name == "Literal":
            return (Fit.YES if _is_one_of(value, _literals(annotation)) else Fit.NO), value
        if name == "float" and isinstance(value, int) and not isinstance(value, bool):
            return Fit.YES, float(value)
        if name in _SCALARS:
            return (Fit.YES if type(value) is _SCALARS[name] else Fit.NO), value
        if name in _LISTS | _TUPLES | _SETS:
            return (self._fit_items(node, annotation, module) if isinstance(value, list) else Fit.NO), value
        if name in _MAPPINGS:
            return (Fit.YES if isinstance(value, dict) else Fit.NO), value
        if name in _PATHS:
            return (Fit.YES if isinstance(value, str) else Fit.NO), value
        if name in _ANYTHING or name is None or isinstance(value, dict):
            return Fit.UNKNOWN, value
        if name in _BUILT:
            return Fit.NO, value
        found = self._sources.in_module(module, ast.unparse(annotation)) if module else None
        return (Fit.NO if self._is_plain_class(found) else Fit.UNKNOWN), value

    def _fit_items(self, node: Node, annotation: ast.expr, module: str) -> Fit:
        kinds = _item_annotations(annotation, len(node.value))
        if kinds is None:
            return Fit.NO
        fits = [
            self._best(item, list(self._members(kind, module, _ALIAS_DEPTH)), module)[0]
            for item, kind in zip(node.value, kinds, strict=False)
        ]
        return Fit.NO if Fit.NO in fits else Fit.YES

    def _inside(self, node: Node, path: str, members: list[ast.expr], module: str) -> Iterator[Misfit]:
        """Misfits of the items of a list or the values of a mapping."""
        container = next((m for m in members if _is_container(m)), None)
        if isinstance(node.value, list):
            kinds = _item_annotations(container, len(node.value)) if container is not None else None
            for i, item in enumerate(node.value):
                known = kinds is not None and i < len(kinds) and isinstance(container, ast.Subscript)
                yield from (
                    self._check(item, f"{path}.{i}", kinds[i], module)
                    if known and kinds
                    else _traps(item, f"{path}.{i}")
                )
        elif isinstance(node.value, dict) and "_target_" not in node.value:
            for key, item in node.value.items():
                yield from _traps(item, f"{path}.{key}")

    def _members(self, annotation: ast.expr, module: str, depth: int) -> Iterator[ast.expr]:
        """The alternatives of a union, aliases and quoted annotations opened."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            inner = _parse(annotation.value)
            yield from self._members(inner, module, depth) if inner is not None else [annotation]
        elif isinstance(annotation, ast.BinOp):
            yield from self._members(annotation.left, module, depth)
            yield from self._members(annotation.right, module, depth)
        elif isinstance(annotation, ast.Subscript) and _name(annotation) in _WRAPPERS:
            inner_nodes = _parameters(annotation)
            for inner in inner_nodes[:1] if _name(annotation) == "Annotated" else inner_nodes:
                yield from self._members(inner, module, depth)
            if _name(annotation) == "Optional":
                yield ast.Constant(None)
        else:
            alias = self._alias(annotation, module) if depth and isinstance(annotation, ast.Name) else None
            yield from self._members(alias, module, depth - 1) if alias is not None else [annotation]

    def _alias(self, annotation: ast.Name, module: str) -> ast.expr | None:
        if annotation.id in _SCALARS or annotation.id in _ANYTHING or not module:
            return None
        found = self._sources.in_module(module, annotation.id)
        node = found.node if found is not None and found.kind in ("value", "opaque") else None
        return node if isinstance(node, ast.BinOp | ast.Subscript) else None

    def _is_plain_class(self, found: Definition | None) -> bool:
        """Whether this is a class whose instances no YAML value is."""
        if found is None or found.kind != "class":
            return False
        lineage = self._sources.lineage(found)
        named = [ast.unparse(b) for cls in lineage if cls is not None for b in getattr(cls.node, "bases", ())]
        return None not in lineage and not any(
            n.split("[")[0].rpartition(".")[2] in _SCALAR_BASES or "Enum" in n for n in named
        )

    def _explain(self, node: Node, annotation: ast.expr, members: list[ast.expr]) -> tuple[str, str]:
        choices = [str(choice) for choice in _choices(members)]
        names = _simple(members)
        if choices and (isinstance(node.value, str) or not names - {"None", "Literal"}):
            close = nearest(str(node.value), choices)
            return f"not one of {', '.join(choices)}", f"did you mean `{close}`?" if close else "write one of them"
        lengths = [n for m in members if (n := _fixed_length(m)) is not None]
        if isinstance(node.value, list) and lengths and len(node.value) != lengths[0]:
            return f"expected a list of {lengths[0]}, not of {len(node.value)}", f"write {lengths[0]} values"
        expected = ast.unparse(annotation).strip("'\"")
        return f"expected {expected}, not {_describe(node)}", _fix(node, names, members)


def _choices(members: list[ast.expr]) -> list[Any]:
    return [v for m in members if _name(m) == "Literal" and isinstance(m, ast.Subscript) for v in _literals(m)]


_SCALARS: dict[str | None, type] = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


def _fix(node: Node, names: set[str], members: list[ast.expr]) -> str:
    value = node.value
    if "str" in names and isinstance(value, int | float):
        return f"put it in quotes: '{node.text}'"
    if isinstance(value, str) and names & {"int", "float"}:
        try:
            if math.isfinite(float(value)):
                return f"remove the quotes: {value}"
        except ValueError:
            pass
    if "int" in names and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if any(_name(m) in _LISTS | _TUPLES for m in members) and not isinstance(value, list | dict):
        return f"write a list: [{node.text}]"
    examples = {"int": "a whole number", "float": "a number such as 1e-4", "bool": "true or false", "str": "a word"}
    wanted = [examples[n] for n in examples if n in names]
    if any(_name(m) in _MAPPINGS for m in members):
        wanted.append("a mapping (indented `key: value` lines)")
    if not wanted:
        return "write a mapping with `_target_:` that builds it"
    return f"write {' or '.join(wanted)}" + (", or null" if "None" in names else "")


def _describe(node: Node) -> str:
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
    }
    return kinds.get(type(node.value), "null")


def _traps(node: Node, path: str) -> Iterator[Misfit]:
    if node.trap is not None:
        yield Misfit(node, path, *_split(node.trap))
    items = (
        node.value.items()
        if isinstance(node.value, dict)
        else enumerate(node.value)
        if isinstance(node.value, list)
        else ()
    )
    if not (isinstance(node.value, dict) and "_target_" in node.value):
        for key, child in items:
            yield from _traps(child, f"{path}.{key}")


def _split(trap: str) -> tuple[str, str]:
    problem, _, fix = trap.partition("; ")
    return problem, fix


def _implied(default: Any) -> ast.expr | None:
    """An annotation guessed from a default, where the parameter has none."""
    if default is REQUIRED or default is COMPUTED:
        return None
    if isinstance(default, bool):
        return _parse("bool | None")
    return _parse("int | float | None") if isinstance(default, int | float) else None


def _parse(source: str) -> ast.expr | None:
    try:
        return ast.parse(source, mode="eval").body
    except SyntaxError:
        return None


def _name(annotation: ast.expr) -> str | None:
    node = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _simple(members: list[ast.expr]) -> set[str]:
    return {name for name in map(_name, members) if name is not None}


def _parameters(annotation: ast.Subscript) -> list[ast.expr]:
    """What stands between the brackets."""
    return annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]


def _literals(annotation: ast.Subscript) -> list[Any]:
    return [node.value for node in _parameters(annotation) if isinstance(node, ast.Constant)]


def _is_one_of(value: Any, choices: list[Any]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_container(annotation: ast.expr) -> bool:
    return _name(annotation) in _LISTS | _TUPLES | _SETS


def _fixed_length(annotation: ast.expr) -> int | None:
    """How many items a tuple of fixed length has; None for anything else."""
    if not isinstance(annotation, ast.Subscript) or _name(annotation) not in _TUPLES:
        return None
    parts = _parameters(annotation)
    return None if any(isinstance(p, ast.Constant) and p.value is Ellipsis for p in parts) else len(parts)


def _item_annotations(annotation: ast.expr, length: int) -> list[ast.expr] | None:
    """The annotation of each of ``length`` items; None where a fixed-length tuple has another length."""
    if not isinstance(annotation, ast.Subscript):
        return [ast.Name("Any")] * length
    parts = _parameters(annotation)
    fixed = _fixed_length(annotation)
    if fixed is None:
        return [parts[0]] * length
    return list(parts) if fixed == length else None
