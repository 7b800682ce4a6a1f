"""Find where a dotted name is defined by reading source files, without importing anything.

``transformers.AutoTokenizer.from_pretrained`` is followed from package to package through submodules, re-exports,
star imports, ``TYPE_CHECKING`` blocks and lazy-import tables, down to the ``class`` or ``def`` that it names.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_automodel.config.modules import Module, Reference
from nemo_automodel.config.suggest import nearest

_MANY_STARS = 40
"""A package with more star imports than this (transformers.models) is searched by submodule name only."""


@dataclass(frozen=True)
class Definition:
    """What a dotted name turned out to be.

    Attributes:
        kind: ``class``, ``function``, ``module``, ``value`` (a constant), or ``opaque`` (compiled or computed: it
            exists, and nothing more can be said without running it).
        module: Dotted name of the module that defines it.
        qualname: Its name there, such as ``Class.method``; empty for a module.
        node: Its syntax, where there is one.
        owner: For a method, the class it was asked of; None otherwise.
    """

    kind: str
    module: str
    qualname: str
    node: ast.AST | None = None
    owner: Definition | None = None

    @property
    def path(self) -> str:
        """Dotted path of the definition itself."""
        return f"{self.module}.{self.qualname}" if self.qualname else self.module


@dataclass
class Trail:
    """How far a name was followed: the modules visited, and, where it ends nowhere, what is there instead."""

    modules: list[str] = field(default_factory=list)
    missing: str = ""
    nearest: str | None = None


class Sources:
    """Looks names up in the installed packages (and in single files of the user's), each file parsed once.

    Args:
        extra_path: Folders searched after ``sys.path`` for top-level packages.
    """

    def __init__(self, extra_path: Sequence[str] = ()):
        self._extra_path = list(extra_path)
        self._modules: dict[str, Module | None] = {}

    def add_file(self, name: str, file: Path) -> None:
        """Make a single file known as the top-level module ``name``."""
        self._modules[name] = Module(name, file, None)

    def module(self, name: str) -> Module | None:
        """The module of that dotted name, or None; nothing is imported."""
        if name not in self._modules:
            parent, _, leaf = name.rpartition(".")
            self._modules[name] = self._submodule(self.module(parent), leaf) if parent else self._top_level(name)
        return self._modules[name]

    def resolve(self, dotted: str, trail: Trail | None = None) -> Definition | None:
        """What ``dotted`` names, or None; ``trail`` then says how far it went."""
        trail = trail if trail is not None else Trail()
        top, *rest = dotted.split(".")
        module = self.module(top)
        if module is None:
            trail.missing = top
            return None
        trail.modules.append(top)
        found = Definition("module", top, "")
        for name in rest:
            member = self._step(found, name, trail, set())
            if member is None:
                trail.missing = name
                trail.nearest = nearest(name, self._names_in(found, name))
                return None
            found = member
        return found

    def in_module(self, module_name: str, dotted: str) -> Definition | None:
        """What the expression ``dotted`` (such as ``nn.Module``) means inside ``module_name``."""
        first, *rest = dotted.split(".")
        module = self.module(module_name)
        found = self._attribute(module, first, Trail(), set()) if module is not None else None
        for name in rest:
            found = self._step(found, name, Trail(), set()) if found is not None else None
        return found

    def bases(self, definition: Definition) -> list[Definition | None]:
        """The base classes of a class, None for one that cannot be followed."""
        node = definition.node
        if not isinstance(node, ast.ClassDef):
            return []
        names = [ast.unparse(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases]
        return [self.in_module(definition.module, name) for name in names if name not in _TRIVIAL_BASES]

    def lineage(self, definition: Definition) -> list[Definition | None]:
        """The class and its ancestors, nearest first (depth first, each once); None stands for an unknown one."""
        ordered: list[Definition | None] = []
        stack: list[Definition | None] = [definition]
        while stack:
            current = stack.pop(0)
            if current is None or current.kind == "opaque":
                ordered.append(None)
            elif all(known is None or known.path != current.path for known in ordered):
                ordered.append(current)
                stack = self.bases(current) + stack
        return ordered

    def member(self, owner: Definition, name: str) -> Definition | None:
        """A method or attribute of a class, inherited ones included."""
        for cls in self.lineage(owner):
            if cls is None:
                return Definition("opaque", owner.module, f"{owner.qualname}.{name}", owner=owner)
            for statement in getattr(cls.node, "body", ()):
                kind = _member_kind(statement, name)
                if kind:
                    return Definition(kind, cls.module, f"{cls.qualname}.{name}", statement, owner)
        return None

    def _step(self, current: Definition, name: str, trail: Trail, visiting: set[tuple[str, str]]) -> Definition | None:
        if current.kind == "module":
            module = self.module(current.module)
            return self._attribute(module, name, trail, visiting) if module is not None else None
        if current.kind == "class":
            return self.member(current, name)
        if current.kind == "opaque":
            return Definition("opaque", current.module, f"{current.qualname}.{name}")
        return None

    def _attribute(self, module: Module, name: str, trail: Trail, visiting: set[tuple[str, str]]) -> Definition | None:
        """The meaning of ``module.name``: a binding, else a submodule, else a star import."""
        if (module.name, name) in visiting:
            return None
        visiting.add((module.name, name))
        binding = module.bindings.get(name)
        if binding is not None:
            found = self._follow(module, name, binding, trail, visiting)
            if found is not None:
                return found
        if self.module(f"{module.name}.{name}") is not None:
            trail.modules.append(f"{module.name}.{name}")
            return Definition("module", f"{module.name}.{name}", "")
        if module.source_missing:
            return Definition("opaque", module.name, name)
        return self._through_stars(module, name, trail, visiting)

    def _follow(
        self, module: Module, name: str, binding: ast.AST | Reference, trail: Trail, visiting: set[tuple[str, str]]
    ) -> Definition | None:
        if isinstance(binding, Reference):
            target = self.module(binding.module)
            trail.modules.append(binding.module)
            if target is None:
                return Definition("opaque", binding.module, binding.attribute or "")
            if binding.attribute is None:
                return Definition("module", binding.module, "")
            return self._attribute(target, binding.attribute, trail, visiting)
        if isinstance(binding, ast.ClassDef):
            return Definition("class", module.name, name, binding)
        if isinstance(binding, ast.FunctionDef | ast.AsyncFunctionDef):
            return Definition("function", module.name, name, binding)
        if isinstance(binding, ast.Name | ast.Attribute):
            return self._alias(module, ast.unparse(binding), trail, visiting) or Definition("opaque", module.name, name)
        if isinstance(binding, ast.Call | ast.Subscript | ast.Lambda | ast.IfExp):
            return Definition("opaque", module.name, name, binding)
        return Definition("value", module.name, name, binding)

    def _alias(self, module: Module, dotted: str, trail: Trail, visiting: set[tuple[str, str]]) -> Definition | None:
        first, *rest = dotted.split(".")
        found = self._attribute(module, first, trail, visiting)
        for name in rest:
            found = self._step(found, name, trail, visiting) if found is not None else None
        return found

    def _through_stars(
        self, module: Module, name: str, trail: Trail, visiting: set[tuple[str, str]]
    ) -> Definition | None:
        for origin in _promising(module.stars, name):
            target = self.module(origin)
            if target is None or target.source_missing:
                if self._compiled(origin).stub_has(name):
                    return Definition("opaque", origin, name)
                continue
            if not name.startswith("_") and (name in target.text or "import *" in target.text):
                found = self._attribute(target, name, trail, visiting)
                if found is not None and not (found.kind == "module" and found.module == f"{origin}.{name}"):
                    return found
        return None

    def _compiled(self, name: str) -> Module:
        """The module ``name``, or the nearest package above it that there is a file for."""
        while (module := self.module(name)) is None and "." in name:
            name = name.rpartition(".")[0]
        return module or Module(name, None, None)

    def _names_in(self, definition: Definition, name: str) -> set[str]:
        if definition.kind == "class":
            nodes = [cls.node for cls in self.lineage(definition) if cls is not None]
            members = [s for node in nodes for s in getattr(node, "body", ())]
            return {s.name for s in members if isinstance(s, ast.FunctionDef | ast.ClassDef)}
        module = self.module(definition.module) if definition.kind == "module" else None
        return self._public_names(module, name, depth=4) if module is not None else set()

    def _public_names(self, module: Module, name: str, depth: int) -> set[str]:
        names = {
            bound for bound, value in module.bindings.items() if not bound.startswith("_") and _may_be_callable(value)
        }
        names.update(sub for sub in module.submodules() if not sub.startswith("_"))
        for origin in _promising(module.stars, name) if depth else ():
            target = self.module(origin)
            if target is not None:
                names |= self._public_names(target, name, depth - 1)
        return names

    def _top_level(self, name: str) -> Module | None:
        try:
            spec = importlib.util.find_spec(name)  # a top-level name: finding it imports nothing
        except (ValueError, ImportError):
            spec = None
        spec = spec or importlib.machinery.PathFinder.find_spec(name, self._extra_path)
        if spec is None:
            return None
        directories = list(spec.submodule_search_locations or ())
        file = Path(spec.origin) if spec.has_location and spec.origin else None
        return Module(name, file, Path(directories[0]) if directories else None)

    def _submodule(self, parent: Module | None, leaf: str) -> Module | None:
        if parent is None or parent.directory is None:
            return None
        name, base = f"{parent.name}.{leaf}", parent.directory / leaf
        if (base / "__init__.py").is_file():
            return Module(name, base / "__init__.py", base)
        for suffix in (".py", *importlib.machinery.EXTENSION_SUFFIXES):
            if Path(f"{base}{suffix}").is_file():
                return Module(name, Path(f"{base}{suffix}"), None)
        return Module(name, None, base) if base.is_dir() and leaf.isidentifier() and any(base.glob("*.py*")) else None


_TRIVIAL_BASES = {"object", "ABC", "abc.ABC", "Generic", "Protocol", "typing.Protocol", "typing.Generic"}


def _member_kind(statement: ast.stmt, name: str) -> str | None:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and statement.name == name:
        return "class" if isinstance(statement, ast.ClassDef) else "function"
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if isinstance(statement, ast.Assign | ast.AnnAssign) and any(
        isinstance(t, ast.Name) and t.id == name for t in targets
    ):
        return "opaque" if isinstance(statement.value, ast.Call | ast.Name | ast.Attribute) else "value"
    return None


def _may_be_callable(binding: ast.AST | Reference) -> bool:
    if isinstance(binding, Reference):
        return binding.module.partition(".")[0] not in sys.stdlib_module_names
    return isinstance(binding, ast.ClassDef | ast.FunctionDef)


def _promising(origins: Sequence[str], name: str) -> list[str]:
    """Star imports in the order worth trying: those whose own name begins the one looked for, longest first."""
    word = name.lower().replace("_", "")

    def affinity(origin: str) -> int:
        leaf = origin.rpartition(".")[2].replace("_", "")
        return len(leaf) if word.startswith(leaf) else 0

    ordered = sorted(origins, key=affinity, reverse=True)
    if len(ordered) <= _MANY_STARS:
        return ordered
    begins = [origin for origin in ordered if affinity(origin)]
    shared = {o: _common_prefix(word, o.rpartition(".")[2].replace("_", "")) for o in origins}
    longest = max(shared.values())
    return begins or [o for o in origins if shared[o] == longest >= 3][:4]


def _common_prefix(word: str, other: str) -> int:
    """How many letters the two begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), min(len(word), len(other)))
