"""The vision-language recipe, run as a user runs it: what it saves is what plain transformers reads, what is frozen stays, and
it is the language recipe where there is nothing to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from nemo_automodel._transformers.processor import load_processor
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.components.datasets.vlm.conversation import make_vlm_chat_dataset
from nemo_automodel.config import load
from tests.ranks.launch import ROOT, automodel, on_ranks
from tests.vlm_builders import write_vlm

RECIPE = str(ROOT / "nemo_automodel/recipes/vlm/finetune.py")
OURS = ("labels", "label_indices", "num_label_tokens", "num_tokens", "sample_ids", "num_images", "image_rows")


class VisionWorkspace:
    """A folder with a tiny model, its processor, rows with one, two and no images, and a recipe of 4 steps."""

    def __init__(self, path: Path, family: str = "gemma3", **sections: Any):
        self.path, self.model = path, write_vlm(family, path / "model")
        rng = np.random.default_rng(0)
        rows = []
        for i in range(12):
            pixels = rng.integers(0, 255, (40 + 10 * (i % 3), 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"{i}.png")
            parts = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "What does the fox do?"}]
            parts = [*parts, {"type": "image", "path": "0.png"}] if i % 4 == 1 else parts[1:] if i % 4 == 3 else parts
            answer = {"role": "assistant", "content": "It jumps over the dog."[: 8 + i]}
            rows.append({"messages": [{"role": "user", "content": parts}, answer]})
        (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        recipe: dict[str, Any] = {
            "model": {"pretrained_model_name_or_path": str(self.model), "dtype": "float32"},
            "dataset": {
                "_target_": "nemo_automodel.components.datasets.vlm.conversation.make_vlm_chat_dataset",
                "path_or_dataset_id": str(path / "data.jsonl"),
            },
            "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 4},
            "optimizer": {"lr": 0.003},
            "loggers": {"progress": False},
        }
        recipe["validation_dataset"] = recipe["dataset"]
        (path / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections, sort_keys=False))

    def run(self, *overrides: str, out: str = "out") -> list[dict[str, Any]]:
        """Run in this process, on one thread as ``spawn`` does; returns the training lines of metrics.jsonl."""
        from nemo_automodel.recipes.vlm.finetune import main

        options = [f"--checkpoint.checkpoint_dir={self.path / out}", *overrides]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # an update's last bit depends on where a tensor is cut among them
        try:
            main(load(self.path / "recipe.yaml", options, recipe="vlm"))
        finally:
            torch.set_num_threads(threads)
        return self.lines("metrics.jsonl", out)

    def spawn(self, *overrides: str, out: str = "out") -> list[dict[str, Any]]:
        """Run by the command in a process of its own."""
        target = f"--checkpoint.checkpoint_dir={self.path / out}"
        result = automodel("finetune", "vlm", "-c", "recipe.yaml", *overrides, target, cwd=self.path)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return self.lines("metrics.jsonl", out)

    def lines(self, name: str, out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / out / name).read_text().splitlines()]

    def saved(self, out: str = "out") -> Path:
        return max((self.path / out).glob("epoch_*"), key=lambda path: int(path.name.rsplit("_", 1)[1])) / "model"

    @torch.no_grad()
    def plain_loss(self, model: Any, processor: Any) -> float:
        """Mean loss of plain transformers over all rows, one by one."""
        data = make_vlm_chat_dataset(processor, str(self.path / "data.jsonl"))
        total = count = 0.0
        loader = DataLoader(data, global_batch_size=1, local_batch_size=1, shuffle=False, pad_to_multiple_of=1)
        for (batch,) in loader.steps(0):
            logits = model(**{k: v for k, v in batch.items() if k not in OURS}).logits.flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum"))
            count += batch["num_label_tokens"]
        return total / count


def hexes(lines: list[dict[str, Any]]) -> list[str]:
    return [line["loss_hex"] for line in lines]


@pytest.mark.parametrize("family", ["gemma3", pytest.param("qwen3_vl", marks=pytest.mark.full), pytest.param("smolvlm", marks=pytest.mark.full)])  # fmt: skip
def test_what_is_saved_is_what_was_trained_and_what_is_frozen_stays(tmp_path, family):
    workspace = VisionWorkspace(tmp_path, family)
    lines = workspace.spawn("--step_scheduler.val_every_steps=4")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] > lines[3]["loss"]
    assert (
        sum(line["num_images"] for line in lines[:3]) == 12
    )  # an epoch: nine rows with images, three of them with two
    saved = workspace.saved()
    processor = load_processor(str(saved))
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32).train()
    assert workspace.plain_loss(model, processor) == pytest.approx(
        workspace.lines("validation.jsonl")[-1]["val_loss"], rel=2e-6
    )
    before, after = load_file(workspace.model / "model.safetensors"), load_file(saved / "model.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if ("vision" in name or ".visual." in name) and "merger" not in name}
    still = tower | {name for name in before if "embed_tokens" in name}
    assert tower
    # what is added to image tokens after the last of two layers: no label's logits depend on it
    still |= {name for name in before if "deepstack_merger_list.1." in name}
    assert moved == set(before) - still
    assert moved & {name for name in before if "project" in name or "connector" in name or "merger" in name}


def test_a_pixel_changes_the_loss(tmp_path):
    workspace = VisionWorkspace(tmp_path)
    first = workspace.run("--step_scheduler.max_steps=1", "--dataloader.shuffle=false")
    image = np.array(Image.open(tmp_path / "0.png"))
    image[20, 30] = 255 - image[20, 30]
    Image.fromarray(image).save(tmp_path / "0.png")
    second = workspace.run("--step_scheduler.max_steps=1", "--dataloader.shuffle=false", out="changed")
    assert first[0]["loss_hex"] != second[0]["loss_hex"]
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=0.02)


def test_the_chosen_parts_are_frozen_and_said(tmp_path, caplog):
    workspace = VisionWorkspace(tmp_path)
    caplog.set_level("INFO")
    workspace.run("--freeze.language_model=true", "--freeze.vision_tower=false", "--step_scheduler.max_steps=2")
    assert "language_model 887,040 (frozen), embeddings 49,536 (frozen)" in caplog.text
    before, after = load_file(workspace.model / "model.safetensors"), load_file(workspace.saved() / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in moved)


PARTS = {
    "language_model": ("language_model",),
    "vision_tower": ("vision_tower",),
    "all": ("language_model", "vision_tower"),
}


def merge(adapter: Path, target: Path) -> Path:
    """``automodel merge``."""
    command = [sys.executable, "-m", "nemo_automodel.cli.app", "merge", str(adapter), "--output", str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return target


@pytest.mark.parametrize(
    "part",
    [
        "language_model",
        pytest.param("all", marks=pytest.mark.full),
        pytest.param("vision_tower", marks=pytest.mark.full),
    ],
)
def test_lora_adapts_the_chosen_parts_and_peft_reads_it(tmp_path, part):
    from peft import PeftModel

    peft = {"match_all_linear": True, "dim": 4, **({} if part == "language_model" else {"parts": part})}
    workspace = VisionWorkspace(tmp_path, peft=peft)
    workspace.run("--step_scheduler.val_every_steps=4", "--optimizer.lr=0.02")
    adapter = load_file(workspace.saved() / "adapter_model.safetensors")
    for name in ("language_model", "vision_tower"):
        assert any(name in key for key in adapter) == (name in PARTS[part]), name
    base = AutoModelForImageTextToText.from_pretrained(workspace.model, dtype=torch.float32)
    processor = load_processor(str(workspace.saved()))
    untrained = workspace.plain_loss(base, processor)
    model = PeftModel.from_pretrained(base, workspace.saved())
    trained = workspace.plain_loss(model, processor)
    assert trained == pytest.approx(workspace.lines("validation.jsonl")[-1]["val_loss"], rel=2e-6)
    assert trained != pytest.approx(untrained, rel=1e-4)
    if part == "language_model":
        merged = merge(workspace.saved().parent, tmp_path / "merged")
        model = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
        assert workspace.plain_loss(model, load_processor(str(merged))) == pytest.approx(trained, rel=1e-5)


def test_a_layer_outside_the_chosen_parts_is_refused(tmp_path):
    from nemo_automodel.errors import ModelError

    workspace = VisionWorkspace(tmp_path, peft={"target_modules": ["fc1"]})
    with pytest.raises(ModelError, match=r"'fc1' matches .*vision_tower.* add its part to peft\.parts"):
        workspace.run()


def test_resuming_is_bitwise(tmp_path):
    workspace = VisionWorkspace(tmp_path)
    whole = workspace.run()
    workspace.run("--step_scheduler.ckpt_every_steps=2", out="stopped")
    half = tmp_path / "stopped/epoch_0_step_2"
    resumed = workspace.run(f"--checkpoint.restore_from={half}", out="resumed")
    assert hexes(resumed) == hexes(whole)[2:]
    names = [workspace.saved(out) / "model.safetensors" for out in ("out", "resumed")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_without_images_it_is_the_language_recipe(tmp_path):
    """The recipes repeat each other and import nothing of each other: here is what holds them together."""
    from nemo_automodel.recipes.llm.finetune import main

    workspace = VisionWorkspace(tmp_path, freeze={"vision_tower": False, "embeddings": False})
    rows = [{"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "my name is Ada" [: 5 + i]}]} for i in range(9)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seeing = workspace.run("--validation_dataset=null")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del recipe["freeze"], recipe["validation_dataset"]
    recipe["model"]["_target_"] = "nemo_automodel.NeMoAutoModelForImageTextToText.from_pretrained"
    recipe["dataset"]["_target_"] = "nemo_automodel.components.datasets.llm.chat.make_chat_dataset"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(load(tmp_path / "recipe.yaml", [f"--checkpoint.checkpoint_dir={tmp_path / 'blind'}"]))
    assert hexes(workspace.lines("metrics.jsonl", "blind")) == hexes(seeing)
    assert all(line["num_images"] == 0 for line in seeing)


PACKED = ("--packed_sequence.packed_sequence_size=128", "--step_scheduler.global_batch_size=1", "--step_scheduler.local_batch_size=1", "--step_scheduler.max_steps=8")  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.full), pytest.param("smolvlm", marks=pytest.mark.full)])  # fmt: skip
def test_packed_rows_train_and_resume_bitwise(tmp_path, family):
    """Through the command: the loss falls, every image and token is counted, a pack is worth its rows, what is left of
    a run that was stopped repeats every bit."""
    size = 512 if family == "smolvlm" else 128
    options = (*PACKED, f"--packed_sequence.packed_sequence_size={size}")
    workspace = VisionWorkspace(tmp_path, family)
    whole = workspace.spawn(*options, "--step_scheduler.val_every_steps=8")
    assert whole[-1]["loss"] < 0.9 * whole[0]["loss"]
    processor = load_processor(str(workspace.model))
    data = make_vlm_chat_dataset(processor, str(tmp_path / "data.jsonl"))
    loader = DataLoader(data, packing=PackedSequence(size))
    epoch = loader.steps_per_epoch(0)
    assert epoch < len(data) / 2
    assert sum(line["num_images"] for line in whole[:epoch]) == 12
    assert sum(line["num_label_tokens"] for line in whole[:epoch]) == data.stats.label_tokens
    saved = AutoModelForImageTextToText.from_pretrained(workspace.saved(), dtype=torch.float32).train()
    assert workspace.plain_loss(saved, processor) == pytest.approx(
        workspace.lines("validation.jsonl")[-1]["val_loss"], rel=1e-5
    )
    workspace.run(*options, "--step_scheduler.ckpt_every_steps=5", "--step_scheduler.max_steps=8", out="stopped")
    half = next((tmp_path / "stopped").glob("epoch_*_step_5"))
    resumed = workspace.run(*options, f"--checkpoint.restore_from={half}", out="resumed")
    assert hexes(resumed) == hexes(whole)[5:]
    names = [workspace.saved(out) / "model.safetensors" for out in ("out", "resumed")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_packing_is_refused_with_the_reason(tmp_path):
    """A row that no pack holds; a model whose packed documents would not be what they are alone."""
    from nemo_automodel.errors import DataError, ModelError

    workspace = VisionWorkspace(tmp_path, "qwen3_vl")
    with pytest.raises(DataError, match=r"rows are longer than packed_sequence\.packed_sequence_size=20"):
        workspace.run("--packed_sequence.packed_sequence_size=20")
    with pytest.raises(
        ModelError, match=r"other logits than .* by itself; write packed_sequence.packed_sequence_size: 0"
    ):
        workspace.run(*PACKED, "--model.attn_implementation=sdpa")  # which finds documents by ordinary positions only


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("gemma3", 0),
        pytest.param("qwen3_vl", 0, marks=pytest.mark.full),
        pytest.param("gemma3", 64, marks=pytest.mark.full),
        pytest.param("qwen3_vl", 48, marks=pytest.mark.full),
    ],
)
def test_two_ranks_equal_one(tmp_path, family, packed):
    """Also where a micro-batch (a pack) of one rank has no image; tower trained, so that its gradients cross ranks."""
    workspace = VisionWorkspace(tmp_path, family, freeze={"vision_tower": False, "embeddings": False})
    options = ("--step_scheduler.local_batch_size=1", "--validation_dataset=null", "--optimizer.lr=0.0005")
    options = (*options, f"--packed_sequence.packed_sequence_size={packed}")
    one = workspace.run(*options)
    if packed:
        target = f"--checkpoint.checkpoint_dir={tmp_path / 'two'}"
        on_ranks(RECIPE, 2, "-c", tmp_path / "recipe.yaml", *options, target)
        two = workspace.lines("metrics.jsonl", "two")
    else:
        two = workspace.spawn(*options, "--nproc-per-node=2", out="two")
    assert [line["num_images"] for line in two] == [line["num_images"] for line in one]
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=2e-4)
    weights = [load_file(workspace.saved(out) / "model.safetensors") for out in ("out", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4, msg=name)


def test_features_of_the_tower_are_kept_and_a_resumed_run_repeats_every_bit(tmp_path):
    """Through the real command: twelve rows, two epochs, validation whose rows have the training rows' numbers."""
    workspace = VisionWorkspace(tmp_path)
    epochs = (
        "--step_scheduler.max_steps=6",
        "--step_scheduler.val_every_steps=3",
        "--step_scheduler.local_batch_size=1",
    )
    kept = (*epochs, "--freeze.cache_features_gb=1")
    plain, cached = workspace.spawn(*epochs), workspace.spawn(*kept, "--step_scheduler.ckpt_every_steps=4", out="kept")
    assert hexes(cached) == hexes(plain)
    validated = {
        out: {line["step"]: line["val_loss"] for line in workspace.lines("validation.jsonl", out)}
        for out in ("out", "kept")
    }
    assert set(validated["kept"]) == {3, 4, 6}  # what is saved is validated
    assert validated["out"].items() <= validated["kept"].items()
    (half,) = (tmp_path / "kept").glob("epoch_*_step_4")
    resumed = workspace.spawn(*kept, f"--checkpoint.restore_from={half}", out="resumed")
    assert hexes(resumed) == hexes(cached)[4:]
    weights = [(workspace.saved(out) / "model.safetensors").read_bytes() for out in ("out", "kept", "resumed")]
    assert weights[0] == weights[1] == weights[2]
