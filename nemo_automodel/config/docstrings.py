"""Argument descriptions out of docstrings, in the Google layout and in the one transformers uses."""

from __future__ import annotations

import inspect
import re

_HEADING = re.compile(
    r"^(Args|Arguments|Parameters|Keyword Args|Keyword Arguments|Attributes|Returns?|Yields|Raises|Examples?|Notes?):\s*$"
)
_TAKES_ARGUMENTS = ("Args", "Arguments", "Parameters", "Keyword Args", "Keyword Arguments")
_ENTRY = re.compile(r"^(\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}[A-Za-z_]\w*)*)\s*(?:\(.*\))?:\s*(.*)$")


def summary(docstring: str | None) -> str:
    """The first line of a docstring."""
    return inspect.cleandoc(docstring).split("\n", 1)[0].strip() if docstring else ""


def arguments(docstring: str | None) -> dict[str, str]:
    """Name -> description of each entry under ``Args:`` (or its synonyms), joined into one line."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    section_indent, entry_indent = -1, -1
    for line in inspect.cleandoc(docstring or "").splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        heading = _HEADING.match(text)
        if heading:
            section_indent = indent if heading[1] in _TAKES_ARGUMENTS else -1
            entry_indent, names = -1, []
        elif section_indent >= 0 and text and indent <= section_indent:
            section_indent = -1
        elif section_indent >= 0 and text:
            entry = _ENTRY.match(text)
            if entry and entry_indent in (-1, indent):
                entry_indent = indent
                names = [name.lstrip("*") for name in entry[1].split(", ")]
                found |= {name: [entry[2]] if entry[2] else [] for name in names}
            elif names:
                for name in names:
                    found[name].append(text)
    return {name: " ".join(lines) for name, lines in found.items()}
