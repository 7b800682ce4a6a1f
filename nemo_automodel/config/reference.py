"""The config reference, from the signatures and docstrings of what the sections call.

``python -m nemo_automodel.config.reference`` prints it as Markdown (``docs/config-reference.md``).
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_automodel.config.sections import RECIPES, Presence, Section, default_arguments
from nemo_automodel.config.signatures import COMPUTED, REQUIRED, Parameter, Signature, Signatures, describe
from nemo_automodel.config.targets import DANGEROUS, ENV_ALLOW, TRUSTED_ROOTS, TargetPolicy
from nemo_automodel.errors import ConfigError

ALTERNATIVES = {
    "model": ("nemo_automodel.NeMoAutoModelForCausalLM.from_config",),
    "dataset": (
        "nemo_automodel.components.datasets.llm.squad.make_squad_dataset",
        "nemo_automodel.components.datasets.llm.hellaswag.make_hellaswag_dataset",
        "nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset",
        "nemo_automodel.components.datasets.llm.chat.make_chat_dataset",
    ),
    "distributed": ("nemo_automodel.components.distributed.ddp.DDPManager",),
    "loss_fn": ("nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy",),
    "optimizer": ("nemo_automodel.components.training.adamw.AdamW",),
}
"""Other targets of ours for a section, described in full."""

VISION_ALTERNATIVES = {
    "model": ("nemo_automodel.NeMoAutoModelForImageTextToText.from_config",),
    "dataset": (
        "nemo_automodel.components.datasets.vlm.conversation.make_vlm_chat_dataset",
        "nemo_automodel.components.datasets.vlm.cord_v2.make_cord_v2_dataset",
        "nemo_automodel.components.datasets.vlm.medpix.make_medpix_dataset",
        "nemo_automodel.components.datasets.vlm.rdr.make_rdr_dataset",
    ),
}
"""Those of a vision-language recipe, where they are others."""

_OPTIONS = """usage: automodel finetune {domain} -c recipe.yaml [--section.key=value ...] [options]

options:
  -c, --config FILE          the recipe
  --section.key=value        overwrite or add one value (also: --section.key value, --section.list.0.key=value)
  --certificate MODE         warn, strict or off: what happens where the run does not compute what transformers does
  --print-config             print the recipe with every default filled in, and stop
  --allow-target NAME        let _target_ name this package or this .py file (relative to the recipe); runs its code
  -h, --help                 this text

sections{which} (docs/config-reference.md describes them):
"""


def help_text(domain: str | None = None) -> str:
    """What ``--help`` prints: the options, and every section with its keys, their types and defaults.

    Without ``domain`` the sections are those of the first kind of recipe, and how to see the others' is said.
    """
    first, *others = RECIPES
    which = " and their keys"
    if domain is None:
        which = f" of {first} and their keys; for {others[0]} see automodel finetune {others[0]} --help"
    lines = [_OPTIONS.format(domain=domain or f"{{{','.join(RECIPES)}}}", which=which)]
    domain = domain or first
    for name, section in RECIPES[domain].items():
        lines.append(f"{name}:  {section.doc}")
        for signature in _signatures(name, section, domain):
            lines.append(f"  _target_: {signature.target}")
            rows = [
                (f"    {p.name}", _type(p), _default(name, section, signature, p))
                for p in _settable(section, signature)
            ]
            width = max((len(row[0]) for row in rows), default=0)
            lines += [
                f"{key:<{width}}  {kind}  {'= ' + default if default else '(required)'}" for key, kind, default in rows
            ]
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """The reference of all recipes' sections, as Markdown; of a vision-language recipe, those that are its own."""
    lines = [
        _INTRODUCTION.format(
            roots=", ".join(f"`{root}`" for root in TRUSTED_ROOTS), env=ENV_ALLOW, denied=len(DANGEROUS)
        )
    ]
    for domain, sections in RECIPES.items():
        own = {n: s for n, s in sections.items() if domain == "llm" or s is not RECIPES["llm"].get(n)}
        where = "" if domain == "llm" else " in `automodel finetune vlm`"
        for name, section in own.items():
            lines += [f"## `{name}`{where}", "", section.doc, "", _presence(section), ""]
            for signature in _signatures(name, section, domain):
                lines += list(_table(name, section, signature))
    return "\n".join(lines).rstrip() + "\n"


def keys() -> list[str]:
    """Every ``section.key`` of the default targets, of any recipe: the surface that a test freezes."""
    found: list[str] = []
    for domain, sections in RECIPES.items():
        for name, section in sections.items():
            signatures = [s for s in _signatures(name, section, domain) if s.target == section.target]
            found += [f"{name}.{parameter.name}" for s in signatures for parameter in _documented(section, s)]
            found += [] if signatures else [f"{name}._target_"]
    return list(dict.fromkeys(found))


def _signatures(name: str, section: Section, domain: str) -> Iterator[Signature]:
    """Of the section's default target and of our alternatives, leaving out what is not there."""
    policy = TargetPolicy()
    reader = Signatures(policy.sources)
    alternatives = ALTERNATIVES if domain == "llm" else ALTERNATIVES | VISION_ALTERNATIVES
    for target in (*([section.target] if section.target else []), *alternatives.get(name, ())):
        try:
            yield reader.of(target, policy.find(target))
        except ConfigError:
            continue


def _documented(section: Section, signature: Signature) -> list[Parameter]:
    """What the reference lists: every key of a target of ours; of a library's, those that we have a default for."""
    rows = _settable(section, signature)
    is_ours = signature.target.startswith("nemo_automodel.")
    return rows if is_ours else [parameter for parameter in rows if parameter.name in section.defaults]


def _settable(section: Section, signature: Signature) -> list[Parameter]:
    """What a YAML may set: everything but what the recipe gives."""
    return [p for p in signature.parameters.values() if p.name not in section.offered]


def _table(name: str, section: Section, signature: Signature) -> Iterator[str]:
    yield f"### `{signature.target}`"
    yield ""
    if signature.definition is not None and describe(signature.definition):
        yield describe(signature.definition).replace("``", "`")
        yield ""
    if not signature.target.startswith("nemo_automodel."):
        yield "Every other argument it has can be written too; these have a default of ours:"
        yield ""
    rows = _documented(section, signature)
    if not rows:
        yield "No keys."
        yield ""
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for parameter in rows:
        cells = (
            f"`{parameter.name}`",
            f"`{_type(parameter)}`",
            f"`{_default(name, section, signature, parameter)}`" if parameter.default is not REQUIRED else "required",
            signature.doc.get(parameter.name, "").replace("``", "`") or "as its documentation says",
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _type(parameter: Parameter) -> str:
    return (parameter.annotation or "Any").strip("'\"")


def _default(name: str, section: Section, signature: Signature, parameter: Parameter) -> str:
    ours = default_arguments(name, section, signature.target, {}, has_peft=False)
    if parameter.name not in ours and parameter.default is REQUIRED:
        return ""
    value = ours.get(parameter.name, parameter.default)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    source = parameter.default_source or ""
    is_constant = source.isidentifier() and value is not COMPUTED  # by its name: what it is, is told
    return str(value) if parameter.name in ours or is_constant else source


def _presence(section: Section) -> str:
    if section.presence is Presence.REQUIRED:
        return "Required." if section.target else "Required, with its `_target_`."
    return (
        "Optional: without it, nothing is built."
        if section.presence is Presence.OPTIONAL
        else "Optional: without it, the defaults hold."
    )


_INTRODUCTION = """# Config reference

Generated from the code by `make docs`; do not edit.

A recipe is a YAML mapping of sections. Every section is a call: `_target_` names a callable, the other keys are its
arguments. Without `_target_` the section's default target is called, which is the first one listed here. Any other
callable may take its place: its own signature then says which keys the section has.

- **Overrides**: `--section.key=value` (or `--section.key value`, `--section.list.0.key=value`) overwrites or adds one value.
- **Environment**: `${{VAR}}` and `${{VAR:default}}` are filled in; an unset variable without default is an error. They stay as written in what a run saves and prints, so secrets go there; one written out is refused. `$${{` is a literal `${{`; the forms of a shell or of Hydra (`${{VAR:-default}}`, `${{oc.env:VAR}}`) are refused.
- **Numbers and words** are those of YAML 1.2: `1e-5` is a number; `yes`, `no`, `on`, `off`, `010` and `1:30`, which YAML 1.1 reads
  as something else than written, are reported.
- **`none`** is `null` wherever a key takes `null` and no text.
- **Nested `_target_`s** are built first, at any depth.
- **Trust**: `_target_` may name {roots}, without private names and without the callables among them that
  run programs or load code. Anything else, a file `./mine.py:function` beside the recipe included, needs
  `--allow-target my_package` or `--allow-target ./mine.py` on the command line, or the variable `{env}`
  (comma-separated); never the YAML itself. Opting in is running that code.
"""


if __name__ == "__main__":
    print(markdown(), end="")
