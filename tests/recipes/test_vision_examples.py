"""Every vision-language example through the real command, from a Hub that serves a tiny model of its family and the dataset."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from nemo_automodel._transformers.processor import load_processor
from tests.hub import LocalHub
from tests.recipes.workspace import ROOT
from tests.vlm_builders import write_vlm

EXAMPLES = sorted((ROOT / "examples/vlm_finetune").rglob("*.yaml"))
SAMPLE = {"gemma3_4b_it_cord_v2", "gemma3_4b_it_cord_v2_peft"}
"""The announcement's; the others are run by the full tests."""


def rows(content: list[bytes]) -> dict[str, tuple[dict, str]]:
    """Hub ID -> columns, and which of them holds the images."""
    parse = json.dumps({"gt_parse": {"menu": [{"nm": "Tea"}], "total": {"price": "2"}}})
    number = len(content)
    images = [{"bytes": image, "path": None} for image in content]
    return {
        "naver-clova-ix/cord-v2": ({"image": images, "ground_truth": [parse] * number}, "image"),
        "mmoukouba/MedPix-VQA": ({"image_id": images, "question": ["What is it?"] * number, "answer": ["A fox"] * number}, "image_id"),
        "quintend/rdr-items": ({"image": images, "text": ["a quick fox"] * number}, "image"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    rng = np.random.default_rng(0)
    content = []
    for i in range(16):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (48, 40 + 8 * (i % 3), 3), dtype=np.uint8)).save(buffer, "PNG")
        content.append(buffer.getvalue())
    with LocalHub() as hub:
        for name, (columns, images) in rows(content).items():
            features = {key: datasets.Value("string") for key in columns} | {images: datasets.Image()}
            path = tmp_path_factory.mktemp("data") / "train-00000-of-00001.parquet"
            datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
            hub.add("datasets", name, {f"data/{path.name}": path.read_bytes()})
        yield hub


@pytest.mark.parametrize("example", [pytest.param(path, id=path.stem, marks=[] if path.stem in SAMPLE else [pytest.mark.full]) for path in EXAMPLES])  # fmt: skip
def test_example_runs(hub, tmp_path, example):
    name = yaml.safe_load(example.read_text())["model"]["pretrained_model_name_or_path"]
    model = write_vlm(example.parent.name, tmp_path / "model")
    hub.add("models", name, model)
    small = ["--model.dtype=float32", "--step_scheduler.global_batch_size=4", "--step_scheduler.max_steps=3"]
    small += [
        "--dataloader.num_workers=1",
        "--loggers.progress=false",
        f"--checkpoint.checkpoint_dir={tmp_path / 'out'}",
    ]
    if "image_options" in example.read_text():
        small.append("--processor.image_options.size={shortest_edge: 1024, longest_edge: 4096}")
    command = [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "vlm", "-c", str(example), *small]
    environment = hub.env(tmp_path / "home", PYTHONPATH=str(ROOT))
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["num_images"] for line in lines] == [4, 4, 4]
    assert all(0 < line["loss"] < 20 for line in lines)
    check_saved(next((tmp_path / "out").glob("epoch_0_step_3")) / "model", model)


@torch.no_grad()
def check_saved(directory: Path, start: Path) -> None:
    """Plain transformers (and PEFT) reads the directory, processor included, and it has been trained."""
    processor = load_processor(str(directory))
    if (directory / "adapter_model.safetensors").exists():
        from peft import PeftModel

        base = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, directory)
        assert any(tensor.any() for key, tensor in load_file(directory / "adapter_model.safetensors").items() if "lora_B" in key)  # fmt: skip
    else:
        model = AutoModelForImageTextToText.from_pretrained(directory)
    token = processor.image_token
    inputs = processor(text=[f"{token} What is it?"], images=[[Image.new("RGB", (48, 48))]], return_tensors="pt")
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(example):
    lines = [line for line in example.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 25
