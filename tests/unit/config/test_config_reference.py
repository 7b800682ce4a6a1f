"""The generated reference is current, and the surface of the config changes only by editing the list beside this file."""

from pathlib import Path

from nemo_automodel.config import reference
from nemo_automodel.config.sections import LLM, RECIPES
from nemo_automodel.config.suggest import ELSEWHERE
from tests.unit.config.mutations import ANNOUNCED, ROOT

SURFACE = Path(__file__).with_name("config_keys.txt")


def test_reference_in_docs_is_current():
    written = (ROOT / "docs/config-reference.md").read_text(encoding="utf-8")
    assert written == reference.markdown(), "run `make docs`"


def test_reference_describes_every_section_target_and_key():
    text = reference.markdown()
    for sections in RECIPES.values():
        for name, section in sections.items():
            assert f"## `{name}`" in text
            for target in (section.target, *reference.ALTERNATIVES.get(name, ())):
                assert target is None or f"### `{target}`" in text
    undescribed = [line for line in text.splitlines() if line.endswith("| as its documentation says |")]
    assert len(undescribed) == len(LLM["optimizer"].defaults)  # torch's; ours all have a meaning


def test_a_default_that_has_a_name_is_shown_as_what_it_is():
    assert "| `ignore_index` | `int` | `-100` |" in reference.markdown()


def test_surface_is_frozen():
    """A new option is a decision: add it to config_keys.txt in the same change."""
    assert reference.keys() == SURFACE.read_text(encoding="utf-8").split()


def test_announced_recipe_is_the_announced_text():
    text = ANNOUNCED.read_text(encoding="utf-8")
    assert text.count("_target_:") == 5
    assert "dp_size: none          # use all GPUs available" in text


def test_names_of_other_trainers_lead_to_keys_that_exist():
    keys = set(reference.keys())
    for theirs, ours in ELSEWHERE.items():
        section, _, key = ours.partition(".")
        assert section in LLM, theirs
        anyones = section == "dataset" or key in ("", "_target_", "eps")  # depends on the target; or torch's own
        assert anyones or ours in keys, theirs
