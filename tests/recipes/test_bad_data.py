"""Data that does not fit the model, through the real command: exit 2, one message, no traceback."""

import json

import pytest

from tests.recipes.workspace import make_workspace


def refused(result):
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr[-2000:]
    return errors[0]


def long_rows(workspace, words):
    rows = [{"question": "What is it?", "answer": "fox " * words} for _ in range(16)]
    (workspace.path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_longer_than_learned_positions(tmp_path):
    workspace = make_workspace(tmp_path, "gpt2")
    long_rows(workspace, 300)
    message = refused(workspace.spawn(check=False))
    assert "dataset: 16 of 16 rows are longer than the 256 positions of GPT2LMHeadModel" in message
    assert "dataset.seq_length: 256" in message


def test_rows_longer_than_rotary_positions_are_a_warning(tmp_path):
    workspace = make_workspace(tmp_path)
    long_rows(workspace, 300)
    result = workspace.spawn("--step_scheduler.max_steps=1")
    assert "16 of 16 rows are longer than the 256 positions" in result.stderr


def test_a_loader_of_another_kind_is_named(tmp_path):
    workspace = make_workspace(tmp_path)
    target = "torchdata.stateful_dataloader.StatefulDataLoader"
    message = refused(workspace.spawn(f"--dataloader._target_={target}", check=False))
    assert "StatefulDataLoader is not a nemo_automodel.types.Loader" in message


@pytest.mark.parametrize("key", ["dataset", "validation_dataset"])
def test_the_message_names_the_recipe_line_and_section(tmp_path, key):
    target = "nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset"
    mapping = {"question": "quest", "answer": "answer"}
    section = {"_target_": target, "path_or_dataset_id": str(tmp_path / "data.jsonl"), "column_mapping": mapping}
    workspace = make_workspace(tmp_path, sections={key: section})
    message = refused(workspace.spawn(check=False))
    assert "recipe.yaml:" in message
    assert f" {key}: " in message
    assert "quest" in message
