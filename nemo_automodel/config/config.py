"""A loaded recipe: sections that can be read and called, every key of which something must have read."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_automodel.config.checks import CONFLICTS, check_values
from nemo_automodel.config.overrides import apply_override, parse_overrides
from nemo_automodel.config.secrets import written_secrets
from nemo_automodel.config.sections import RECIPES, Presence, Section
from nemo_automodel.config.signatures import COMPUTED, REQUIRED
from nemo_automodel.config.targets import TargetPolicy
from nemo_automodel.config.tree import Node, load_yaml
from nemo_automodel.config.validate import Call, Validator, takes_anything
from nemo_automodel.errors import ConfigError, DataError, ModelError

_KEY_FIRST = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)(?==|:)")
_OWN_FRAMES = 3
"""How many calls below ours an error may have been raised for the arguments to be its likely cause."""


class SectionConfig:
    """One section: ``section.key`` reads a value (its default where the YAML has none), ``instantiate`` calls it."""

    def __init__(self, name: str, spec: Section, call: Call | None, policy: TargetPolicy):
        self._name = name
        self._spec = spec
        self._call = call
        self._policy = policy
        self._read: set[str] = set()

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        call = self._call
        if call is None:
            raise AttributeError(f"section `{self._name}` is absent from the recipe; it has no `{key}`")
        if key not in call.arguments and key not in call.signature.parameters and key not in call.defaults:
            raise AttributeError(f"{call.target} takes no `{key}`: {call.signature}")
        self._read.add(key)
        return call.value(key)

    def __bool__(self) -> bool:
        """Whether there is something to call."""
        return self._call is not None

    def instantiate(self, **offered: Any) -> Any:
        """Call the section's target with what the YAML says, and with those of ``offered`` that it takes.

        Args:
            **offered: Arguments known at run time only. A value in the YAML goes before an offered one, except for
                the arguments that the section table calls fixed.

        Returns:
            What the target returns; None for an optional section that is absent.

        Raises:
            ConfigError: The target refuses its arguments.
            DataError, ModelError: What the target raised, with the place in the recipe in front.
        """
        call = self._call
        if call is None:
            return None
        target = self._load(call.target, call.section, call.where)
        arguments = {key: self._build(node, f"{call.section}.{key}") for key, node in call.arguments.items()}
        taken = self._taken(target, offered)
        fixed = {key: value for key, value in taken.items() if key in self._spec.fixed}
        self._read |= set(call.arguments)
        return self._invoke(target, {**call.defaults, **taken, **arguments, **fixed}, call.section, call.where)

    def _taken(self, target: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``offered`` that the target names; all of them where it is the user's own and has ``**kwargs``."""
        signature = self._call.signature  # type: ignore[union-attr]
        if signature.known:
            takes_all = takes_anything(signature)
            return {key: value for key, value in offered.items() if takes_all or signature.accepts(key)}
        try:
            parameters = inspect.signature(target).parameters  # made at run time: its source did not say
        except (TypeError, ValueError):
            return {}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {key: value for key, value in offered.items() if takes_all or key in parameters}

    def _build(self, node: Node, path: str) -> Any:
        """The value of ``node``, every nested ``_target_`` called."""
        if isinstance(node.value, list):
            return [self._build(item, f"{path}.{i}") for i, item in enumerate(node.value)]
        if not isinstance(node.value, dict):
            return node.value
        built = {key: self._build(child, f"{path}.{key}") for key, child in node.value.items() if key != "_target_"}
        if "_target_" not in node.value:
            return built
        where = node.value["_target_"].where
        return self._invoke(self._load(node.value["_target_"].value, path, where), built, path, where)

    def _load(self, target: str, path: str, where: Any) -> Any:
        try:
            return self._policy.load(target)
        except ConfigError as error:
            raise ConfigError(f"{where} {path}._target_={target}: {error}") from error

    def _invoke(self, target: Any, arguments: dict[str, Any], path: str, where: Any) -> Any:
        try:
            return target(**arguments)
        except ConfigError as error:
            raise self._located(error) from error
        except (DataError, ModelError) as error:
            if not str(where):  # a section that the recipe leaves to its default
                raise
            raise type(error)(f"{where} {path}: {error}") from error
        except (TypeError, ValueError) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]
            if len(frames) > _OWN_FRAMES:
                raise
            name = getattr(target, "__qualname__", repr(target))
            at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
            raise ConfigError(
                f"{where} {path}: {name} refuses its arguments: {error}{at}; correct them in `{path}`"
            ) from error

    def _located(self, error: ConfigError) -> ConfigError:
        """Put file and line before a component's message that starts with one of this section's keys."""
        match = _KEY_FIRST.match(str(error))
        keys = match[1].split(".")[1:] if match and match[1].split(".")[0] == self._name else []
        node = self._call.arguments.get(keys[0]) if keys and self._call is not None else None
        return ConfigError(f"{node.where} {error}") if node is not None else error


class Config:
    """A recipe, checked: one attribute a section.

    Attributes:
        path: The YAML it came from.
    """

    def __init__(
        self, path: Path, sections: Mapping[str, Section], calls: dict[str, Call | None], policy: TargetPolicy
    ):
        self.path = path
        self._calls = calls
        self._sections = {name: SectionConfig(name, spec, calls[name], policy) for name, spec in sections.items()}

    def __getattr__(self, name: str) -> SectionConfig:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._sections[name]
        except KeyError:
            raise AttributeError(f"no section `{name}`; there are {', '.join(self._sections)}") from None

    @property
    def model_name(self) -> str | None:
        """Hub ID or path that names the model (or, without weights, its config); None where nothing does."""
        call = self._calls["model"]
        written = call.arguments if call is not None else {}
        node = written.get("pretrained_model_name_or_path") or written.get("config")
        if node is not None and node.is_mapping:
            node = node.value.get("pretrained_model_name_or_path")
        return node.value if node is not None and isinstance(node.value, str) else None

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain data, with every default that is known: itself a recipe that runs the same.

        ``${VAR}`` stays as it was written, so that no secret leaves the environment.
        """
        return {name: self._resolved_section(name) for name, call in self._calls.items() if call is not None}

    def raise_on_unread(self) -> None:
        """Fail on a key that nothing has read.

        Raises:
            ConfigError: Names each such key and where it is written.
        """
        problems = []
        for name, section in self._sections.items():
            call = self._calls[name]
            unread = {key: node for key, node in call.arguments.items() if key not in section._read} if call else {}
            problems += [
                f"{node.where} {name}.{key}={node.shown()}: nothing has read this; remove it"
                for key, node in unread.items()
            ]
        if problems:
            raise ConfigError("\n".join(problems))

    def _resolved_section(self, name: str) -> dict[str, Any]:
        call = self._calls[name]
        assert call is not None
        offered = self._sections[name]._spec.offered
        excluded = {one for section, one, other, _ in CONFLICTS if section == name and other in call.arguments}
        found: dict[str, Any] = {"_target_": call.target}
        for key, parameter in call.signature.parameters.items():
            written = key in call.arguments or key in call.defaults
            known = parameter.default is not REQUIRED and parameter.default is not COMPUTED
            known = known and key not in offered and key not in excluded
            if written or known:
                node = call.arguments.get(key)
                found[key] = _as_yaml(call.value(key) if node is None else node.as_written())
        return found | {key: node.as_written() for key, node in call.arguments.items() if key not in found}


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    allow_targets: Sequence[str] = (),
    recipe: str = "llm",
    extra_sections: Mapping[str, Section] | None = None,
) -> Config:
    """Read a recipe and check all of it, importing nothing that it names.

    Args:
        path: The YAML file.
        overrides: As on the command line (``--section.key=value``), applied in order.
        allow_targets: Packages or ``.py`` files (relative to the YAML) that ``_target_`` may name besides the trusted.
        recipe: Which table of sections applies.
        extra_sections: More sections, for a recipe of one's own.

    Raises:
        ConfigError: Everything that is wrong, one line each: ``file:line key=value: problem; fix``.
    """
    sections = {**RECIPES[recipe], **(extra_sections or {})}
    root = load_yaml(path)
    for override in parse_overrides(overrides):
        apply_override(root, override)
    policy = TargetPolicy(allow_targets, Path(path).parent)
    validator = Validator(sections, policy, str(path))
    calls = validator.check(root)
    problems = list(written_secrets(root)) or validator.problems or check_values(calls, str(path))
    if problems:
        raise ConfigError("\n".join(sorted(problems, key=_line_of)))
    return Config(Path(path), sections, calls, policy)


def _line_of(problem: str) -> int:
    match = re.match(r".*?:(\d+) ", problem)
    return int(match[1]) if match else 0


def _as_yaml(value: Any) -> Any:
    """Tuples and sets as the lists that YAML has."""
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_yaml(item) for item in value]
    return {key: _as_yaml(item) for key, item in value.items()} if isinstance(value, dict) else value


__all__ = ["Config", "Presence", "SectionConfig", "load"]
