"""One source file: which names it binds at its top level, read without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Reference:
    """A name bound by an import: all of ``module``, or its ``attribute``."""

    module: str
    attribute: str | None = None


@lru_cache(maxsize=64)  # some tens of megabytes; a program that loads many recipes reads the same files each time
def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


class Module:
    """One source file: the names it binds at its top level, without running it."""

    def __init__(self, name: str, file: Path | None, directory: Path | None):
        self.name = name
        self.file = file
        self.directory = directory  # where its submodules are, for a package
        self.stars: list[str] = []
        self.source_missing = file is None or file.suffix not in (".py", ".pyi")

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.directory is not None else self.name.rpartition(".")[0]

    @cached_property
    def text(self) -> str:
        """Its source; empty for a compiled module."""
        if self.source_missing or self.file is None:
            return ""
        return self.file.read_text(encoding="utf-8", errors="replace")

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree (empty where the source does not parse)."""
        tree = _parse(self.text)
        self.source_missing = self.source_missing or tree is None
        return tree or ast.Module(body=[], type_ignores=[])

    @cached_property
    def bindings(self) -> dict[str, ast.AST | Reference]:
        """Every name bound at top level; fills ``stars`` on the way."""
        found: dict[str, ast.AST | Reference] = {}
        self._bind(self.tree.body, found, override=True)
        return found

    def stub_has(self, name: str) -> bool:
        """For a compiled module: whether its ``.pyi`` stubs declare ``name`` (true where it has no stubs)."""
        folder = self.file.parent / self.name.rpartition(".")[2] if self.file else None
        stubs = sorted(folder.glob("*.pyi")) if folder is not None and folder.is_dir() else []
        declares = re.compile(rf"^(?:def|class) {re.escape(name)}\b|^{re.escape(name)}\s*[:=]", re.MULTILINE)
        return not stubs or any(declares.search(stub.read_text(encoding="utf-8")) for stub in stubs)

    def submodules(self) -> list[str]:
        """Names of the modules in this package's directory."""
        if self.directory is None:
            return []
        entries = [p for p in self.directory.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
        return [p.stem for p in entries if p.stem != "__init__"]

    def _bind(self, body: Sequence[ast.stmt], found: dict[str, ast.AST | Reference], override: bool) -> None:
        for statement in body:
            for name, binding in self._bindings_of(statement):
                if (override or name not in found) and not _wraps(binding, name, found):
                    found[name] = binding
            if isinstance(statement, ast.If):
                self._bind(statement.body, found, override)
                self._bind(statement.orelse, found, False)
            elif isinstance(statement, ast.Try):
                self._bind([*statement.body, *statement.orelse, *statement.finalbody], found, override)
                for handler in statement.handlers:
                    self._bind(handler.body, found, False)
            elif isinstance(statement, ast.With):
                self._bind(statement.body, found, override)

    def _bindings_of(self, statement: ast.stmt) -> Iterator[tuple[str, ast.AST | Reference]]:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name, statement
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                if alias.asname:
                    yield alias.asname, Reference(alias.name)
                else:
                    top = alias.name.partition(".")[0]
                    yield top, Reference(top)
        elif isinstance(statement, ast.ImportFrom):
            origin = self._origin(statement)
            for alias in statement.names:
                if alias.name == "*":
                    self.stars.append(origin)
                else:
                    yield alias.asname or alias.name, Reference(origin, alias.name)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.value
                    yield from _lazy_table(target.id, statement.value)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value
            yield from _lazy_table(statement.target.id, statement.value)

    def _origin(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        base = self.package.split(".")
        base = base[: len(base) - statement.level + 1]
        return ".".join([*base, statement.module] if statement.module else base)


def _wraps(binding: ast.AST | Reference, name: str, found: dict[str, ast.AST | Reference]) -> bool:
    """``Name = decorate(Name, ...)``: the class keeps its signature."""
    arguments = binding.args if isinstance(binding, ast.Call) else []
    return name in found and any(isinstance(argument, ast.Name) and argument.id == name for argument in arguments)


def _lazy_table(name: str, value: ast.expr) -> Iterator[tuple[str, Reference]]:
    """``_LAZY = {"Name": "package.module"}``, the table behind a module-level ``__getattr__``."""
    if name == "_LAZY" and isinstance(value, ast.Dict):
        for key, module in zip(value.keys, value.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(module, ast.Constant):
                yield str(key.value), Reference(str(module.value), str(key.value))
