"""Not only a falling loss: a tiny vision-language model trained from scratch counts shapes and names their colour.

Through the recipe, as a user runs it, and then plain transformers on the directory that was saved. Images that answer
are none of those it was trained on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.recipes.shapes import accuracy, write_recipe
from tests.recipes.workspace import ROOT


def train(folder, rows: int, steps: int, most: int) -> float:
    """Train by the command; the accuracy of what was saved."""
    recipe = write_recipe(folder, rows, steps, most)
    command = [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "vlm", "-c", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    saved = next((folder / "out").glob(f"epoch_*_step_{steps}")) / "model"
    return accuracy(AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved), most)


def test_one_or_two_shapes_in_four_colours(tmp_path):
    assert train(tmp_path, rows=1600, steps=240, most=2) > 0.95


@pytest.mark.full
def test_one_to_four_shapes_in_four_colours_within_three_minutes(tmp_path):
    start = time.process_time() + sum(os.times()[2:4])
    assert train(tmp_path, rows=3000, steps=350, most=4) > 0.95
    assert time.process_time() + sum(os.times()[2:4]) - start < 360  # of two cores, three minutes
