"""Options of a verb that also takes a recipe's ``--section.key=value``: typer cannot know those, so they are read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_automodel.config.tree import COMMAND_LINE
from nemo_automodel.errors import ConfigError


def take(
    arguments: Sequence[str], known: Mapping[str, str], flags: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Take ``--name VALUE`` and ``--name=VALUE`` of the ``known`` names, and the ``flags``, out of ``arguments``.

    Args:
        arguments: What follows the verb.
        known: Names, with an example of a value for messages. ``--my_name`` is read as ``--my-name``.
        flags: Names without a value; those given have the value ``""``.

    Returns:
        ``(values, rest)``.

    Raises:
        ConfigError: One without a value, or given twice.
    """
    values: dict[str, str] = {}
    rest: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        written, equals, value = argument.partition("=")
        name = written.replace("_", "-")
        if argument in flags:
            values[argument] = ""
            continue
        if name not in known:
            rest.append(argument)
            continue
        if name in values:
            raise ConfigError(f"{COMMAND_LINE} {written}: given more than once; write it once")
        if not equals:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"{COMMAND_LINE} {written}: no value; write {name} {known[name]}")
            value = left.pop(0)
        values[name] = value
    return values, rest


def positive(values: Mapping[str, str], name: str) -> int | None:
    """The value of ``name`` as a number of at least one; None where it was not given.

    Raises:
        ConfigError: It is none.
    """
    return whole(values, name, 1)


def whole(values: Mapping[str, str], name: str, least: int) -> int | None:
    """The value of ``name`` as a whole number, ``least`` or more; None where it was not given.

    Raises:
        ConfigError: It is none.
    """
    text = values.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{COMMAND_LINE} {name} {text}: not a number of {least} or more; write {name} {least}, or leave it out"
        )
    return int(text)
