"""Architectures that transformers got after the lower bound (5.17) train through the recipe: nothing here knows them.

Which they are is found out from the transformers that is installed, so a newer one brings its own cases.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_automodel._transformers import compat
from nemo_automodel._transformers import twin_fields as names
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.twin_start import start_config
from tests.builders import make_tokenizer
from tests.recipes.workspace import Workspace, make_workspace

LOWER_BOUND = Path(__file__).parents[1] / "data/causal_types_5.17.txt"
KNOWN = {line for line in LOWER_BOUND.read_text().splitlines() if not line.startswith("#")}
NEW = sorted(set(compat.registered_types("causal")) - KNOWN)
QUESTION, ANSWER = "What is the capital of France?", "Paris, of course"


def cases() -> list:
    return [pytest.param(name, marks=[] if i < 2 else [pytest.mark.full]) for i, name in enumerate(NEW)]


def make_twin(model_type: str, directory: Path) -> None:
    config = tiny_twin(start_config(model_type, causal=True), vocab_size=384)
    for part in names.parts_of(config):
        for name, value in names.fields_of(part).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    try:
        assert model.train()(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.isfinite()
    except Exception as error:
        pytest.skip(f"plain transformers does not train its twin on text: {type(error).__name__}: {error}")
    shutil.rmtree(directory)
    model.save_pretrained(directory)
    make_tokenizer("plain").save_pretrained(directory)


@torch.no_grad()
def plain_loss(directory: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer(QUESTION + "\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    logits = model.eval()(input_ids=ids[:, :-1]).logits[0, len(prompt) - 1 :]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)).item()


def same_rows(workspace: Workspace) -> Workspace:
    (workspace.path / "data.jsonl").write_text(f'{{"question": "{QUESTION}", "answer": "{ANSWER}"}}\n' * 48)
    return workspace


@pytest.mark.skipif(not NEW, reason="this transformers has no architecture that 5.17 has not")
@pytest.mark.parametrize("model_type", cases())
def test_it_trains_as_plain_transformers_and_reloads(tmp_path, model_type):
    workspace = same_rows(make_workspace(tmp_path))
    make_twin(model_type, workspace.model_dir)
    before = plain_loss(workspace.model_dir)
    validation = [f"--validation_dataset.path_or_dataset_id={tmp_path / 'data.jsonl'}"]
    target = "nemo_automodel.components.datasets.llm.column_mapped.make_instruction_dataset"
    lines = workspace.run("--step_scheduler.max_steps=4", f"--validation_dataset._target_={target}", *validation)
    assert lines[0]["loss"] == pytest.approx(before, rel=1e-4)
    after = plain_loss(tmp_path / "out/epoch_0_step_4/model")
    assert after < before
    validated = json.loads((tmp_path / "out/validation.jsonl").read_text())
    assert validated["val_loss"] == pytest.approx(after, rel=1e-4)


def test_the_list_is_of_the_lower_bound():
    assert len(KNOWN) == 178
    assert {"llama", "qwen3_5_text"} <= KNOWN
