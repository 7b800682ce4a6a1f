"""Models whose code comes with them: refused in one message until they are trusted, then trained like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub import LocalHub
from tests.recipes.workspace import ROOT
from tests.remote_code import AUTO_MAP, STYLES, modeling, write_remote_model

ROW = {"question": "What is the capital of France?", "answer": "Paris, of course"}
LORA = ["--peft._target_=nemo_automodel.components._peft.lora.PeftConfig", "--peft.match_all_linear=true"]
TRUST = "--model.trust_remote_code=true"


def command(folder: Path, model: str, *overrides: str) -> list[str]:
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 64)
    target = "nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset"
    rows = {"_target_": target, "path_or_dataset_id": "rows.jsonl"}
    recipe = {
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": model,
            "dtype": "float32",
        },
        "dataset": rows,
        "validation_dataset": rows,
        "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 4},
        "optimizer": {"lr": 0.02},
        "loggers": {"progress": False},
        "checkpoint": {"checkpoint_dir": "out"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "llm", "-c", "recipe.yaml", *overrides]


def run(hub: LocalHub, folder: Path, model: str, *overrides: str) -> subprocess.CompletedProcess:
    env = hub.env(folder, PYTHONPATH=str(ROOT))
    return subprocess.run(
        command(folder, model, *overrides), cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def succeed(hub: LocalHub, folder: Path, model: str, *overrides: str) -> None:
    result = run(hub, folder, model, *overrides)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]


def losses(folder: Path, out: str = "out") -> list[str]:
    return [json.loads(line)["loss_hex"] for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def validation_loss(folder: Path) -> float:
    return json.loads((folder / "out/validation.jsonl").read_text().splitlines()[-1])["val_loss"]


@torch.no_grad()
def plain_loss(model: torch.nn.Module, directory: Path) -> float:
    """The loss of the one row by the model's own logits: an answer after its question, and EOS."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    prompt = tokenizer(ROW["question"] + "\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(ROW["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    logits = model.eval()(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :]
    return F.cross_entropy(logits.float(), torch.tensor(answer)).item()


def load_plain(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.mark.parametrize("where", ["directory", "hub"])
def test_without_trust_nothing_of_it_runs(hub, tmp_path, where):
    model = write_remote_model(tmp_path / "quill", "own")
    for file in model.glob("*.py"):
        file.write_text("open('it_ran', 'w')\n" + file.read_text())
    hub.add("models", "acme/quill-untrusted", model)
    name = str(model) if where == "directory" else "acme/quill-untrusted"
    result = run(hub, tmp_path, name)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1, result.stderr[-3000:]
    for part in (name, "model code of its own", "model.trust_remote_code: true", "recipe.yaml:"):
        assert part in message[0]
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("style", [STYLES[0], pytest.param(STYLES[1], marks=pytest.mark.full)])
def test_full_fine_tuning_keeps_the_code_beside_the_weights(hub, tmp_path, style):
    model = write_remote_model(tmp_path / "quill", style)
    succeed(hub, tmp_path, str(model), TRUST)
    before, first = plain_loss(load_plain(model), model), float.fromhex(losses(tmp_path)[0])
    assert first == pytest.approx(before, rel=1e-5)
    saved = tmp_path / "out/epoch_0_step_4/model"
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (saved / "modeling_quill.py").read_text() == modeling(style)
    assert validation_loss(tmp_path) < before
    assert plain_loss(load_plain(saved), saved) == pytest.approx(validation_loss(tmp_path), rel=1e-5)


@pytest.mark.parametrize("style", [pytest.param(STYLES[0], marks=pytest.mark.full), STYLES[1]])
def test_an_adapter_from_the_hub_reloads_through_peft(hub, tmp_path, style):
    model = write_remote_model(tmp_path / "quill", style)
    hub.add("models", f"acme/quill-{style}", model)
    succeed(hub, tmp_path, f"acme/quill-{style}", TRUST, *LORA)
    before = plain_loss(load_plain(model), model)
    assert float.fromhex(losses(tmp_path)[0]) == pytest.approx(before, rel=1e-5)
    adapted = PeftModel.from_pretrained(load_plain(model), str(tmp_path / "out/epoch_0_step_4/model"))
    assert validation_loss(tmp_path) < before
    assert plain_loss(adapted, model) == pytest.approx(validation_loss(tmp_path), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("options", [[], LORA], ids=["sft", "lora"])
def test_a_resumed_run_repeats_the_whole_one(hub, tmp_path, options):
    model = write_remote_model(tmp_path / "quill", "registry")
    succeed(hub, tmp_path, str(model), TRUST, *options, "--step_scheduler.ckpt_every_steps=2")
    whole = losses(tmp_path)
    succeed(
        hub, tmp_path, str(model), TRUST, *options,
        "--checkpoint.checkpoint_dir=again", "--checkpoint.restore_from=out/epoch_0_step_2",
    )  # fmt: skip
    assert losses(tmp_path, "again") == whole[2:]


@pytest.mark.full
@pytest.mark.parametrize("style", STYLES)
def test_two_ranks_train_as_one(hub, tmp_path, style):
    model = write_remote_model(tmp_path / "quill", style)
    succeed(hub, tmp_path, str(model), TRUST)
    succeed(hub, tmp_path, str(model), TRUST, "--nproc-per-node=2", "--checkpoint.checkpoint_dir=two")
    one, two = ([float.fromhex(loss) for loss in losses(tmp_path, out)] for out in ("out", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.full
def test_packing_is_proved_or_refused(hub, tmp_path):
    """Packed rows are those rows where attention is transformers' own to choose, and refused where it is written out."""
    for style in STYLES:
        folder = tmp_path / style
        folder.mkdir()
        model = write_remote_model(folder / "quill", style)
        result = run(hub, folder, str(model), TRUST, "--packed_sequence.packed_sequence_size=64")
        if style == "registry":
            assert result.returncode == 0, result.stderr[-3000:]
            assert float.fromhex(losses(folder)[0]) == pytest.approx(plain_loss(load_plain(model), model), rel=1e-5)
        else:
            assert result.returncode == 2
            assert "packed_sequence" in result.stderr.splitlines()[-1]
            assert "Traceback" not in result.stderr
