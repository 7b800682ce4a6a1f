"""``automodel demo`` on a machine with nothing but the package: offline, an empty home, a busy CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_automodel.cli import demo_data
from nemo_automodel.cli.demo import (
    NEXT_STEPS,
    answer,
    find_examples,
    loss_fall,
    prepare_folder,
    untrained_model,
    write_inputs,
)
from nemo_automodel.errors import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo as a user runs it, in a folder whose name YAML must quote; its folder and what it printed."""
    place = tmp_path_factory.mktemp("demo")
    home = place / "home"
    home.mkdir()
    keep = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LANG") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-m", "nemo_automodel.cli.app", "demo", "--output", "my demo: 1"],
        cwd=place,
        env={**keep, "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return place / "my demo: 1", result


def test_the_loss_falls_on_trained_and_on_unseen_wording(finished):
    folder, _ = finished
    first, last = loss_fall(folder / "checkpoints" / "metrics.jsonl")
    assert first > 6.5  # about the logarithm of the vocabulary
    assert last < 1.0
    validation = [json.loads(line) for line in (folder / "checkpoints" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation] == [50, 100, 150, 200]
    assert validation[-1]["val_loss"] < 1.0


def test_the_training_is_small_enough_for_a_minute_on_two_cores(finished):
    """Work, not wall time, which says little on a busy machine: 2.6 TFLOP are a minute at 43 GFLOP/s."""
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line["num_tokens"] for line in lines)
    parameters = sum(p.numel() for p in untrained_model(folder / "recipe.yaml").parameters())
    assert len(lines) == 200
    assert 6 * parameters * tokens < 2.6e12


def test_plain_transformers_reloads_what_was_written_and_answers(finished):
    folder, result = finished
    directory = folder / "checkpoints" / (folder / "checkpoints" / "LATEST").read_text().strip() / "model"
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    text = answer(model, directory, demo_data.PROBE)
    assert f"answer           {text}" in result.stdout
    assert text.startswith("Recursively copy a directory tree")


def test_the_reloaded_model_has_the_validation_loss_that_the_run_logged(finished):
    folder, _ = finished
    checkpoints = folder / "checkpoints"
    directory = checkpoints / (checkpoints / "LATEST").read_text().strip() / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    loss_sum, count = 0.0, 0
    for row in map(json.loads, (folder / "validation.jsonl").read_text().splitlines()):
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([encoded["input_ids"]])
        labels = torch.where(torch.tensor([encoded["assistant_masks"]]).bool(), ids, -100)
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss_sum += model(input_ids=ids, labels=labels).loss.item() * learned
        count += learned
    logged = json.loads((checkpoints / "validation.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert loss_sum / count == pytest.approx(logged, abs=1e-5)


def test_it_shows_the_recipe_the_answers_and_what_to_run_next(finished):
    folder, result = finished
    recipe = (folder / "recipe.yaml").read_text()
    assert all(f"  {line}" in result.stdout for line in recipe.splitlines())
    assert result.stdout.count(demo_data.PROBE) == 2
    assert "step 200/200  loss" in result.stderr
    assert "What to run next" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_example_that_it_names_is_there():
    text = NEXT_STEPS.format(recipe="r.yaml", model_dir="m", examples=find_examples())
    named = re.findall(r"finetune llm -c (\S+) ", text)
    assert len(named) == 2
    assert Path(named[1]).is_file()


def test_data_and_tokenizer_are_real_text_that_survives_the_round_trip(tmp_path):
    write_inputs(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    validation = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    functions = dict(demo_data.documented_functions())
    assert len(functions) > 100
    assert len(train) == 3 * len(validation) == 3 * len(functions)
    asked = {row["messages"][0]["content"] for row in train}
    assert not asked & {row["messages"][0]["content"] for row in validation}
    assert demo_data.PROBE not in asked
    for row in train[::7]:
        content = row["messages"][1]["content"]
        assert tokenizer.decode(tokenizer(content)["input_ids"]) == content
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Copy data and metadata. Return the file's destination.\n\nMore.", "Copy data and metadata."),
        ("Return the arc\n    cosine of x", "Return the arc cosine of x."),
        ("sin(x) -> sine of x, in radians", None),
        ("Short.", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert demo_data.first_sentence(docstring) == sentence


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("words")
    with pytest.raises(ConfigError, match="name another folder"):
        prepare_folder(tmp_path)
    with pytest.raises(ConfigError, match="name another folder"):
        prepare_folder(precious)
    assert precious.read_text() == "words"


def test_an_earlier_demo_is_replaced(tmp_path: Path):
    write_inputs(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
