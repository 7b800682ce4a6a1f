"""What a callable accepts, read from its source: parameters, defaults, annotations, and what ``**kwargs`` may hold."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_automodel.config.docstrings import arguments
from nemo_automodel.config.sources import Definition, Sources

_FORWARDING_DEPTH = 4

KEYWORDS_OF = {
    "nemo_automodel._transformers.auto_model._NeMoAutoModel.from_pretrained": "transformers.PreTrainedModel.from_pretrained",
    "nemo_automodel._transformers.auto_model._NeMoAutoModel.from_config": None,
}
"""Function of ours with ``**kwargs`` -> whose named arguments they take (None: nobody's, besides those it reads itself).
transformers would also take every field of the model's config there, and so swallow a typo: a recipe writes such
fields in ``config: {_target_: transformers.AutoConfig.from_pretrained, ...}`` or as the mapping ``config``."""


class _Missing:
    def __repr__(self) -> str:
        return "<required>"


REQUIRED = _Missing()
"""Default of a parameter that has none."""

COMPUTED = type("_Computed", (), {"__repr__": lambda self: "<computed>"})()
"""Default of a parameter whose default is not a literal."""


@dataclass(frozen=True)
class Parameter:
    """One named argument.

    Attributes:
        default: Its literal default, ``REQUIRED`` or ``COMPUTED``.
        annotation: Source of its annotation, if any.
        default_source: Source of its default, if any.
        module: Where the annotation was written.
    """

    name: str
    default: Any = REQUIRED
    annotation: str | None = None
    default_source: str | None = None
    module: str = ""
    positional_only: bool = False


@dataclass(frozen=True)
class Signature:
    """What a target accepts.

    Attributes:
        target: Dotted name as asked for.
        parameters: By name, in order.
        extra: Names that the body or the documentation reads from ``**kwargs``.
        open: Whether any other keyword may be accepted too.
        var_keyword: Whether it has ``**kwargs`` at all.
        known: False when nothing could be read (compiled or computed); nothing can be checked then.
        doc: Argument descriptions.
        definition: What it was read from.
    """

    target: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    extra: frozenset[str] = frozenset()
    open: bool = False
    var_keyword: bool = False
    known: bool = True
    doc: dict[str, str] = field(default_factory=dict)
    definition: Definition | None = None

    def accepts(self, name: str) -> bool:
        """Whether ``name`` is certainly accepted by keyword."""
        parameter = self.parameters.get(name)
        return (parameter is not None and not parameter.positional_only) or name in self.extra

    def names(self) -> list[str]:
        """Everything that may be written, in order."""
        return [*self.parameters, *sorted(self.extra - set(self.parameters))]

    def __str__(self) -> str:
        shown = [
            p.name + (f"={p.default_source}" if p.default is not REQUIRED else "") for p in self.parameters.values()
        ]
        return f"{self.target}({', '.join([*shown, '**kwargs'] if self.var_keyword else shown)})"


class Signatures:
    """Reads signatures through ``sources`` and remembers them."""

    def __init__(self, sources: Sources):
        self._sources = sources
        self._known: dict[str, Signature] = {}

    def of(self, target: str, definition: Definition) -> Signature:
        """The signature of ``definition``, which ``target`` resolved to."""
        if target not in self._known:
            self._known[target] = self._read(target, definition, _FORWARDING_DEPTH)
        return self._known[target]

    def _read(self, target: str, definition: Definition, depth: int) -> Signature:
        if definition.kind == "function":
            return self._of_function(target, definition, depth)
        if definition.kind == "class":
            return self._of_class(target, definition, depth)
        return Signature(target, known=False, open=True, var_keyword=True, definition=definition)

    def _of_function(
        self, target: str, definition: Definition, depth: int, doc: dict[str, str] | None = None
    ) -> Signature:
        node = definition.node
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        parameters = self._parameters(node, definition.module)
        if definition.owner is not None and not _has_decorator(node, "staticmethod"):
            parameters = dict(list(parameters.items())[1:])
        described = (doc or {}) | arguments(ast.get_docstring(node))
        signature = Signature(target, parameters, doc=described, definition=definition)
        if node.args.kwarg is None:
            return signature
        extra, is_open = self._extra(definition, node, depth)
        hidden = {node.args.kwarg.arg, node.args.vararg.arg if node.args.vararg else "", "args", "kwargs"}
        named = {n for n in extra | set(described) if not n.startswith("_")} - hidden - set(parameters)
        return replace(signature, extra=frozenset(named), open=is_open, var_keyword=True)

    def _of_class(self, target: str, definition: Definition, depth: int) -> Signature:
        lineage = self._sources.lineage(definition)
        for i, cls in enumerate(lineage):
            if cls is None:
                break
            assert isinstance(cls.node, ast.ClassDef)
            init = _method(cls.node, "__init__") or _method(cls.node, "__new__")
            if init is not None:
                found = Definition("function", cls.module, f"{cls.qualname}.{init.name}", init, definition)
                return self._of_function(target, found, depth, _class_docs(lineage[: i + 1]))
            if _is_dataclass(lineage[i:]):
                return self._of_dataclass(target, definition, lineage[i:])
            if any(ast.unparse(base).rpartition(".")[2] in ("Enum", "IntEnum", "StrEnum") for base in cls.node.bases):
                break
        else:
            return Signature(target, definition=definition)
        return Signature(target, known=False, open=True, var_keyword=True, definition=definition)

    def _of_dataclass(self, target: str, definition: Definition, lineage: list[Definition | None]) -> Signature:
        fields: dict[str, Parameter] = {}
        doc: dict[str, str] = {}
        is_open = None in lineage
        for cls in reversed([c for c in lineage if c is not None]):
            assert isinstance(cls.node, ast.ClassDef)
            doc |= arguments(ast.get_docstring(cls.node))
            is_open = is_open or _accepts_kwargs(cls.node)
            for parameter in self._fields(cls):
                fields[parameter.name] = parameter
        return Signature(target, fields, open=is_open, var_keyword=is_open, doc=doc, definition=definition)

    def _fields(self, cls: Definition) -> Iterator[Parameter]:
        for statement in getattr(cls.node, "body", ()):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            annotation = ast.unparse(statement.annotation)
            if "ClassVar" in annotation or statement.target.id.startswith("_"):
                continue
            default, source = self._field_default(statement.value, cls.module)
            if source != "field(init=False)":
                default = _as_annotated(default, annotation)
                yield Parameter(statement.target.id, default, annotation, source, cls.module)

    def _field_default(self, value: ast.expr | None, module: str) -> tuple[Any, str | None]:
        """Default of a dataclass field; a call to ``field`` is looked into."""
        is_call = isinstance(value, ast.Call)
        if not is_call or not ast.unparse(value.func).endswith("field"):  # type: ignore[union-attr]
            default_of_call = [k.value for k in value.keywords if k.arg == "default"] if is_call else []  # type: ignore[union-attr]
            return self._default(default_of_call[0] if default_of_call else value, module)
        options = {keyword.arg: keyword.value for keyword in value.keywords}  # type: ignore[union-attr]
        init = options.get("init")
        if isinstance(init, ast.Constant) and init.value is False:
            return COMPUTED, "field(init=False)"
        if "default" in options:
            return self._default(options["default"], module)
        factory = options.get("default_factory")
        if factory is None:
            return REQUIRED, None
        if isinstance(factory, ast.Name) and factory.id in ("list", "dict", "tuple", "set"):
            return {"list": [], "dict": {}, "tuple": (), "set": set()}[factory.id], f"{factory.id}()"
        if isinstance(factory, ast.Lambda):
            return self._default(factory.body, module)
        return COMPUTED, f"{ast.unparse(factory)}()"

    def _parameters(self, node: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> dict[str, Parameter]:
        spec = node.args
        positional = [*spec.posonlyargs, *spec.args]
        padded: list[ast.expr | None] = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
        found = {}
        for argument, default_node in [
            *zip(positional, padded, strict=True),
            *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
        ]:
            default, source = self._default(default_node, module)
            annotation = ast.unparse(argument.annotation) if argument.annotation else None
            default = _as_annotated(default, annotation)
            only = argument in spec.posonlyargs
            found[argument.arg] = Parameter(argument.arg, default, annotation, source, module, only)
        return found

    def _default(self, node: ast.expr | None, module: str) -> tuple[Any, str | None]:
        if node is None:
            return REQUIRED, None
        source = ast.unparse(node)
        try:
            return ast.literal_eval(node), source
        except ValueError:
            named = self._sources.in_module(module, source) if isinstance(node, ast.Name | ast.Attribute) else None
        try:
            return ast.literal_eval(named.node), source  # type: ignore[arg-type, union-attr]
        except (ValueError, AttributeError, TypeError):
            return COMPUTED, source

    def _extra(
        self, definition: Definition, node: ast.FunctionDef | ast.AsyncFunctionDef, depth: int
    ) -> tuple[set[str], bool]:
        """Names that ``node`` reads from its ``**kwargs`` or hands on to a callee, and whether others may pass too."""
        assert node.args.kwarg is not None
        kwargs = node.args.kwarg.arg
        extra = set(_names_read(node, kwargs))
        if definition.path in KEYWORDS_OF:
            declared = KEYWORDS_OF[definition.path]
            target = self._sources.resolve(declared) if declared else None
            names = self._read(declared, target, 0).names() if declared and target is not None else []
            return extra | set(names), declared is not None and target is None
        is_open = _escapes(node, kwargs)
        for call in _calls_forwarding(node, kwargs):
            callee = self._callee(definition, call) if depth else None
            signature = self._read("", callee, depth - 1) if callee is not None else None
            is_open = is_open or signature is None or signature.open
            extra |= set(signature.names()) if signature is not None else set()
        return extra, is_open

    def _callee(self, definition: Definition, call: ast.Call) -> Definition | None:
        """What ``call`` inside ``definition`` calls: a name, ``super().x`` or ``cls.x``; None if it cannot be told."""
        name = ast.unparse(call.func)
        if not definition.qualname.count("."):
            return self._sources.in_module(definition.module, name)
        class_name = definition.qualname.rpartition(".")[0]
        here = self._sources.resolve(f"{definition.module}.{class_name}")
        receiver, _, method = name.rpartition(".")
        if here is None or receiver not in ("super()", "cls", "self"):
            return self._sources.in_module(definition.module, name) if receiver not in ("cls", "self") else None
        starts = self._sources.bases(here) if receiver == "super()" else [here]
        for start in starts:
            found = self._sources.member(start, method) if start is not None else None
            if found is not None:
                return found
        return None


def _class_docs(classes: list[Definition | None]) -> dict[str, str]:
    """Argument descriptions of a class and of what it inherits from, its own first."""
    found: dict[str, str] = {}
    for cls in classes:
        if cls is not None and isinstance(cls.node, ast.ClassDef):
            found = arguments(ast.get_docstring(cls.node)) | found
    return found


def _as_annotated(default: Any, annotation: str | None) -> Any:
    """``timeout: float = 0`` is 0.0, as it would be from the YAML."""
    is_float = annotation is not None and "float" in annotation and "int" not in annotation
    return float(default) if is_float and type(default) is int else default


def _names_read(node: ast.AST, kwargs: str) -> Iterator[str]:
    """Literal keys in ``kwargs.pop("x")``, ``kwargs.get("x")``, ``kwargs["x"]``, ``"x" in kwargs``."""
    for part in ast.walk(node):
        key: ast.AST | None = None
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.args:
            of_kwargs = isinstance(part.func.value, ast.Name) and part.func.value.id == kwargs
            key = part.args[0] if of_kwargs and part.func.attr in ("pop", "get", "setdefault") else None
        elif isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id == kwargs:
            key = part.slice
        elif isinstance(part, ast.Compare) and ast.unparse(part.comparators[0]) == kwargs:
            key = part.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def _calls_forwarding(node: ast.AST, kwargs: str) -> Iterator[ast.Call]:
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and any(
            keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == kwargs
            for keyword in part.keywords
        ):
            yield part


def _escapes(node: ast.AST, kwargs: str) -> bool:
    """Whether ``kwargs`` is used as a whole (looped over, merged, stored), so that its keys cannot be told."""
    expected: set[int] = set()
    for part in ast.walk(node):
        parts: list[ast.AST] = []
        if (isinstance(part, ast.Attribute) and part.attr in ("pop", "get", "setdefault", "keys")) or isinstance(
            part, ast.Subscript
        ):
            parts = [part.value]
        elif isinstance(part, ast.Compare):
            parts = list(part.comparators)
        elif isinstance(part, ast.keyword) and part.arg is None:
            parts = [part.value]
        elif isinstance(part, ast.If | ast.IfExp):
            parts = list(ast.walk(part.test))
        elif isinstance(part, ast.Raise | ast.JoinedStr):
            parts = list(ast.walk(part))
        expected |= {id(p) for p in parts}
    names = [p for p in ast.walk(node) if isinstance(p, ast.Name) and p.id == kwargs and isinstance(p.ctx, ast.Load)]
    return any(id(name) not in expected for name in names)


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == name]
    return found[-1] if found else None


def _has_decorator(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> bool:
    return any(ast.unparse(d).partition("(")[0].rpartition(".")[2] == name for d in node.decorator_list)


def _is_dataclass(lineage: list[Definition | None]) -> bool:
    """Whether the first class of ``lineage`` gets its ``__init__`` from its fields."""
    own, *ancestors = [cls.node for cls in lineage if cls is not None]
    assert isinstance(own, ast.ClassDef)
    if _has_decorator(own, "dataclass") or any(ast.unparse(b).endswith("NamedTuple") for b in own.bases):
        return True
    return any(isinstance(node, ast.ClassDef) and _has_decorator(node, "dataclass_transform") for node in ancestors)


def _accepts_kwargs(node: ast.ClassDef) -> bool:
    after_init = _method(node, "__post_init__")
    return (after_init is not None and after_init.args.kwarg is not None) or any(
        "accept_kwargs=True" in ast.unparse(d) for d in node.decorator_list
    )


def describe(definition: Definition) -> str:
    """The first line of a definition's docstring (its class's, for ``__init__``)."""
    node = definition.node
    doc = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else None
    return inspect.cleandoc(doc).split("\n", 1)[0] if doc else ""
