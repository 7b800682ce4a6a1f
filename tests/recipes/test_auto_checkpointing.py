"""``activation_checkpointing: auto`` through the recipe: it says what it chose, and changes no number."""

from __future__ import annotations

from tests.recipes.workspace import make_workspace


def test_it_is_said_and_changes_nothing(tmp_path):
    workspace = make_workspace(tmp_path)
    four = ["--step_scheduler.max_steps=4", "--compile.enabled=false"]
    plain = workspace.run(*four, out="plain")
    result = workspace.spawn(*four, "--distributed.activation_checkpointing=auto", out="auto")
    assert "activation checkpointing: off (auto: cpu has no limit that is known)" in result.stdout + result.stderr
    assert [line["loss"] for line in workspace.metrics("auto")] == [line["loss"] for line in plain]
