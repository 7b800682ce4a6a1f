"""The parity matrix on two GPUs with NCCL, through the recipe's own ``main``.

Claims, per cell, against plain transformers in fp32 on one process: (1) in fp32 every gradient of the first step is
within 2e-5 and the logged loss and gradient norm of five steps within 2e-5; (2) in bf16 with fp32 master weights, the
gradients' error is at most twice that of plain transformers in bf16, over all parameters and, in a looser sense (four
times the larger of its own and the mean error), for each; losses within 1%.
"""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ranks.launch import torchrun
from tests.ranks.parity import LAYOUTS, MODELS, Cell, _sharpen, oracle
from tests.recipes.workspace import make_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TWO = [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2]


def cells_of(layout):
    models = ["MoE"] if "EP" in layout else ["Llama", "Qwen3", "Gemma-3", "MoE"]
    return [
        Cell(layout, peft, model, packed, dtype)
        for model in models
        for peft in (False, True)
        for packed in (False, True)
        for dtype in ("float32", "bfloat16")
        if dtype == "bfloat16" or model in ("Llama", "MoE")
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    for model, (kind, config) in MODELS.items():
        if model != "GPT-2":
            make_workspace(root / model, kind, **(SIZES | config))
            _sharpen(root / model / "model")
    return root


@pytest.mark.parametrize("layout", TWO)
def test_two_gpus_train_as_one_process(root, layout):
    cells = cells_of(layout)
    for cell in cells:
        path = root / f"oracle_{cell.oracle}.pt"
        if not path.exists():
            torch.save(oracle(cell, root), path)
    (root / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    torchrun("tests.ranks.parity:main", 2, root, root / "cells.json", root / "results.json", timeout=400)
    found = json.loads((root / "results.json").read_text())
    print(
        json.dumps({name: (f.get("error") or (f["gradient"], f["loss"], f["grad_norm"])) for name, f in found.items()})
    )
    problems = {cell.name: problem for cell in cells if (problem := wrong(cell, found[cell.name]))}
    assert not problems, problems


def wrong(cell, found):
    if "error" in found or found["missing"]:
        return found.get("error") or found["missing"]
    if cell.dtype == "float32":
        worst = max(found["gradient"], found["loss"], found["grad_norm"])
        return None if worst <= 2e-5 else {k: found[k] for k in ("gradient", "worst", "loss", "grad_norm")}
    plain = found["plain"]
    if found["total"] > 2 * plain["total"] or found["loss"] > 1e-2:
        return {"total": (found["total"], plain["total"]), "loss": found["loss"]}
    mean = sum(plain["each"].values()) / len(plain["each"])
    bad = {n: (e, plain["each"][n]) for n, e in found["each"].items() if e > 4 * max(plain["each"][n], mean)}
    return bad or None


def test_the_saved_model_of_two_gpus_loads_on_one(root):
    workspace = make_workspace(root / "saved", **SIZES)
    target = "nemo_automodel/recipes/llm/finetune.py"
    from tests.ranks.launch import ROOT

    torchrun(str(ROOT / target), 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={root}/saved/out",
             "--step_scheduler.max_steps=4", "--model.dtype=bfloat16", "--distributed.tp_size=2")  # fmt: skip
    saved = next((root / "saved" / "out").glob("epoch_*_step_4")) / "model"
    assert AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
