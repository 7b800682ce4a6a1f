"""Every key of a recipe against the signature of the callable that will read it, before anything is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_automodel.config.annotations import Annotations
from nemo_automodel.config.model_types import config_classes
from nemo_automodel.config.sections import Presence, Section, default_arguments
from nemo_automodel.config.signatures import REQUIRED, Signature, Signatures
from nemo_automodel.config.suggest import ELSEWHERE, known_elsewhere, nearest
from nemo_automodel.config.targets import TargetPolicy
from nemo_automodel.config.tree import Node, Where
from nemo_automodel.errors import ConfigError

_NEAR = 0.85
"""How alike a key and a known name must be for the key to count as a typo, where any keyword might be accepted."""


_SIMPLE = re.compile(r"\b(int|float|bool|str)\b")


@dataclass
class Call:
    """One section, checked: what will be called, and with what.

    Attributes:
        target: The ``_target_``, the section's default included.
        arguments: What the recipe's author wrote, by name.
        defaults: Ours, for what was not written.
        where: Of the section, for messages.
    """

    section: str
    target: str
    signature: Signature
    arguments: dict[str, Node] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    where: Where = Where("")  # noqa: RUF009 (frozen)

    def value(self, key: str) -> Any:
        """What ``key`` will be: as written, or its default; None where neither is known."""
        if key in self.arguments:
            return self.arguments[key].plain()
        if key in self.defaults:
            return self.defaults[key]
        parameter = self.signature.parameters.get(key)
        return parameter.default if parameter is not None and parameter.default is not REQUIRED else None


class Validator:
    """Checks a whole tree and gathers every problem before reporting any.

    Args:
        sections: The recipe's sections.
        policy: Which targets are allowed, and where they are.
        file: The YAML, for messages about what is not in it.
    """

    def __init__(self, sections: Mapping[str, Section], policy: TargetPolicy, file: str):
        self._sections = sections
        self._policy = policy
        self._file = file
        self._signatures = Signatures(policy.sources)
        self._annotations = Annotations(policy.sources)
        self.problems: list[str] = []

    def check(self, root: Node) -> dict[str, Call | None]:
        """The call of each section, None for an optional one that is absent; ``problems`` says what is wrong."""
        for key, node in root.value.items():
            if key not in self._sections:
                self._say(node, key, "unknown section", self._hint_for_section(key))
        peft = root.value.get("peft")
        has_peft = peft is not None and peft.value is not None
        return {
            name: self._section(name, spec, root.value.get(name), has_peft) for name, spec in self._sections.items()
        }

    def _section(self, name: str, spec: Section, node: Node | None, has_peft: bool) -> Call | None:
        if node is None or node.value is None:
            if spec.presence is Presence.REQUIRED:
                self._missing_section(name, spec, node)
            elif spec.presence is Presence.OPTIONAL and node is not None and not node.text:
                fix = f"indent its keys below it, or write `{name}: null` to go without"
                self._say(node, name, "nothing is written in this section", fix)
            if spec.presence is not Presence.DEFAULT or spec.target is None:
                return None
            node = Node({}, Where(self._file))
        if not node.is_mapping:
            self._say(node, name, "a section is a mapping", f"write `{name}:` and indented `key: value` lines below it")
            return None
        target = self._target_of(name, spec, node)
        if target is None:
            return None
        at = node.value.get("_target_", node)
        signature = self._signature(target, at, f"{name}._target_")
        if signature is None:
            return None
        written = {key: child for key, child in node.value.items() if key != "_target_"}
        defaults = default_arguments(name, spec, target, {k: c.value for k, c in written.items()}, has_peft)
        self._refuse_given(name, spec, signature, written)
        self._arguments(name, signature, written, set(spec.offered), at)
        self._require_needed(name, spec, signature, at, has_peft)
        return Call(name, target, signature, written, defaults, node.where)

    def _target_of(self, name: str, spec: Section, node: Node) -> str | None:
        written = node.value.get("_target_")
        if written is None and spec.target is not None:
            return spec.target
        if written is None:
            alike = nearest(
                "_target_", [key for key in node.value if "_target_" not in key or key.startswith("_")], cutoff=0.7
            )
            fix = f"write `_target_` for `{alike}`" if alike else f"add `_target_: package.callable` ({spec.doc})"
            self._say(
                node.value[alike] if alike else node,
                f"{name}.{alike}" if alike else name,
                "says not what to call: no `_target_`",
                fix,
            )
            return None
        return self._text_of_target(written, name)

    def _text_of_target(self, written: Node, path: str) -> str | None:
        if isinstance(written.value, str) and written.value:
            return written.value
        self._say(written, f"{path}._target_", "must be a dotted name", "write `_target_: package.module.callable`")
        return None

    def _signature(self, target: str, node: Node, path: str) -> Signature | None:
        try:
            return self._signatures.of(target, self._policy.find(target))
        except ConfigError as error:
            self.problems.append(f"{node.where} {path}={target}: {error}")
            return None

    def _arguments(
        self, path: str, signature: Signature, written: Mapping[str, Node], given: set[str], at: Node
    ) -> None:
        """Check one call: every key known, every required one there, every value of the right type."""
        if not signature.known:
            for key, node in written.items():
                self._nested(node, f"{path}.{key}")
            return
        for key, node in written.items():
            if not self._is_accepted(key, signature):
                self._say(
                    node,
                    f"{path}.{key}",
                    f"{signature.target} takes no such argument",
                    self._hint(path, key, signature, given),
                )
                continue
            self._value(path, key, node, signature)
        missing = [
            p.name
            for p in signature.parameters.values()
            if p.default is REQUIRED and p.name not in written and p.name not in given
        ]
        for name in missing:
            self.problems.append(
                f"{at.where} {path}.{name}: missing argument of {signature}; add `{name}:` to `{path.rpartition('.')[2]}`"
            )

    def _is_accepted(self, key: str, signature: Signature) -> bool:
        if signature.accepts(key):
            return True
        return signature.open and not key.startswith("_") and nearest(key, signature.names(), _NEAR) is None

    def _value(self, path: str, key: str, node: Node, signature: Signature) -> None:
        parameter = signature.parameters.get(key)
        full = f"{path}.{key}"
        if parameter is None:
            misfits = []
            if node.trap is not None and not isinstance(node.value, bool):
                self._say(node, full, *node.trap.split("; ", 1))
        else:
            misfits = self._annotations.check(node, parameter)
        for misfit in misfits:
            if parameter is not None and misfit.node.value is None and parameter.default is REQUIRED:
                self._say(misfit.node, full + misfit.path, "null, and it is required", misfit.fix)
            else:
                self._say(misfit.node, full + misfit.path, misfit.problem, misfit.fix)
        if full == "model.config" and isinstance(node.value, dict) and "_target_" not in node.value:
            self._model_config(node, full)
        self._nested(node, full)

    def _model_config(self, node: Node, path: str) -> None:
        """A config written out as a mapping: its fields are those of the class behind ``model_type``."""
        written = node.value.get("model_type")
        known = config_classes(self._policy.sources)
        if written is None:
            self._say(node, path, "no model_type", "add `model_type: llama`, or another that transformers knows")
        elif known and written.value not in known:
            close = nearest(str(written.value), known)
            fix = f"did you mean `{close}`?" if close else "upgrade transformers, or check the name"
            self._say(written, f"{path}.model_type", "not one that the installed transformers knows", fix)
        elif known:
            target = known[written.value]
            signature = self._signature(target, written, path)
            fields = {key: child for key, child in node.value.items() if key != "model_type"}
            if signature is not None:
                self._arguments(path, signature, fields, set(), written)

    def _nested(self, node: Node, path: str) -> None:
        """Find and check every ``_target_`` below ``node``."""
        if isinstance(node.value, list):
            for i, item in enumerate(node.value):
                self._nested(item, f"{path}.{i}")
        elif isinstance(node.value, dict) and "_target_" in node.value:
            written = node.value["_target_"]
            target = self._text_of_target(written, path)
            signature = self._signature(target, written, f"{path}._target_") if target else None
            if signature is not None:
                arguments = {key: child for key, child in node.value.items() if key != "_target_"}
                self._arguments(path, signature, arguments, set(), written)
        elif isinstance(node.value, dict):
            for key, child in node.value.items():
                if nearest(key, ["_target_"], 0.8):
                    self._say(child, f"{path}.{key}", "unknown key", "did you mean `_target_`?")
                self._nested(child, f"{path}.{key}")

    def _refuse_given(self, name: str, spec: Section, signature: Signature, written: Mapping[str, Node]) -> None:
        """A value for what the recipe builds itself (a tokenizer, a mesh) is a value in the wrong place."""
        for key in [key for key in spec.offered if key in written]:
            node, parameter = written[key], signature.parameters.get(key)
            annotation = parameter.annotation if parameter is not None else None
            is_simple = annotation is None or _SIMPLE.search(annotation) is not None
            if (node.is_mapping and "_target_" in node.value) or (
                is_simple and not isinstance(node.value, dict | list)
            ):
                continue
            fix = f"write the section `{key}:` beside `{name}:`" if key in self._sections else "remove it"
            self._say(node, f"{name}.{key}", "the recipe passes this itself", fix)

    def _require_needed(self, name: str, spec: Section, signature: Signature, at: Node, has_peft: bool) -> None:
        needed = [*spec.needed, *(["peft"] if name == "model" and has_peft else [])]
        for argument in needed:
            if signature.known and not signature.accepts(argument) and not takes_anything(signature):
                fix = f"write {spec.target}" if spec.target else f"give it a parameter `{argument}`"
                self._say(at, f"{name}._target_", f"the recipe passes `{argument}`, which it does not take", f"{fix}, or add the parameter to yours")  # fmt: skip

    def _hint(self, path: str, key: str, signature: Signature, given: set[str]) -> str:
        names = ["_target_", *(name for name in signature.names() if name not in given)]
        section = path.partition(".")[0]
        elsewhere = ELSEWHERE.get(key, "")
        if elsewhere.partition(".")[0] == section and elsewhere.partition(".")[2] in names:
            return f"did you mean `{elsewhere.partition('.')[2]}`, which other trainers call `{key}`?"
        close = nearest(key, names, 0.8)
        if close is None and elsewhere and elsewhere.partition(".")[0] in self._sections:
            return known_elsewhere(key)
        close = close or nearest(key, names)
        home = self._home_of(key, section) if close is None else None
        hint = f"did you mean `{close}`? " if close else f"`{key}` belongs to `{home}`. " if home else ""
        return f"{hint}It takes {_listed(signature, given)}"

    def _hint_for_section(self, key: str) -> str:
        close = nearest(key, self._sections, 0.75)
        if close:
            return f"did you mean `{close}`?"
        if ELSEWHERE.get(key, "").partition(".")[0] in self._sections:
            return known_elsewhere(key)
        home = self._home_of(key, "")
        if home:
            return f"did you mean `{home}.{key}`?"
        close = nearest(key, self._sections)
        return f"did you mean `{close}`?" if close else f"the sections are {', '.join(self._sections)}"

    def _home_of(self, key: str, other_than: str) -> str | None:
        """A section whose default target takes ``key``."""
        for name, spec in self._sections.items():
            if spec.target is None or name == other_than or key in spec.offered:
                continue
            try:
                signature = self._signatures.of(spec.target, self._policy.find(spec.target))
            except ConfigError:
                continue
            if key in signature.parameters:
                return name
        return None

    def _missing_section(self, name: str, spec: Section, node: Node | None) -> None:
        example = (
            "pretrained_model_name_or_path: <Hub ID or local path>" if name == "model" else "_target_: package.callable"
        )
        where = node.where if node is not None else Where(self._file)
        problem = "null, and it is required" if node is not None else "missing section"
        self.problems.append(f"{where} {name}: {problem}; add `{name}:` with `{example}` ({spec.doc})")

    def _say(self, node: Node, path: str, problem: str, fix: str) -> None:
        shown = "" if node.is_mapping else f"={node.shown()}"
        self.problems.append(f"{node.where} {path}{shown}: {problem}; {fix}")


def takes_anything(signature: Signature) -> bool:
    """A ``**kwargs`` of the user's own code is taken at its word; a library's would only pass our names on."""
    root = signature.target.partition(".")[0]
    return signature.open and root not in ("torch", "transformers", "datasets", "torchdata")


def _listed(signature: Signature, given: set[str]) -> str:
    names = [name for name in signature.parameters if name not in given] or sorted(signature.extra)
    shown = ", ".join(names[:24]) if names else "no arguments"
    return shown + (", ..." if len(names) > 24 or signature.extra - set(signature.parameters) else "")
