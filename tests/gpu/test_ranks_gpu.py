"""The parity matrix on two GPUs with NCCL, through the recipe's own ``main``.

Claims, per cell, against plain transformers in fp32 on one process: (1) in fp32 every gradient of the first step is
within 2e-5 and the logged loss and gradient norm of five steps within 2e-5; (2) in bf16 with fp32 master weights, the
gradients' error is at most twice that of plain transformers in bf16, over all parameters and, in a looser sense (four
times the larger of its own and the mean error), for each; losses within 1%.
"""

import json
import time
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ranks.launch import ROOT, torchrun
from tests.ranks.parity import LAYOUTS, MODELS, Cell, _sharpen, oracle
from tests.recipes.workspace import make_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TWO = [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2]


def cells_of(layout):
    models = ["MoE"] if "EP" in layout else list(MODELS)
    return [
        Cell(layout, peft, model, packed, dtype)
        for model in models
        for peft in (False, True)
        for packed in (False, True)
        for dtype in ("float32", "bfloat16")
        if model in (("Llama", "MoE", "GPT-2") if dtype == "float32" else ("Llama", "MoE", "Qwen3", "Gemma-3"))
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    for model, (kind, config) in MODELS.items():
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
    torchrun(str(ROOT / target), 2, "-c", workspace.recipe, f"--checkpoint.checkpoint_dir={root}/saved/out",
             "--step_scheduler.max_steps=4", "--model.dtype=bfloat16", "--distributed.tp_size=2")  # fmt: skip
    saved = next((root / "saved" / "out").glob("epoch_*_step_4")) / "model"
    assert AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_command_starts_the_ranks_and_trains_alike_with_offload_and_saving_in_the_background(root):
    workspace = make_workspace(root / "command", **SIZES)
    two = ["--nproc-per-node=2", "--step_scheduler.local_batch_size=2", "--step_scheduler.max_steps=4"]
    workspace.spawn(*two, out="plain")
    workspace.spawn(*two, "--distributed.offload=true", "--checkpoint.async_save=true", out="offloaded")
    plain, offloaded = ([line["loss"] for line in workspace.metrics(out)] for out in ("plain", "offloaded"))
    assert offloaded == pytest.approx(plain, rel=1e-5)
    saved = next((workspace.path / "offloaded").glob("epoch_*_step_4")) / "model"
    assert AutoModelForCausalLM.from_pretrained(saved)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("fault", ["error", "hang"])
def test_a_failing_or_hanging_rank_ends_the_other_and_is_named(root, fault):
    workspace = make_workspace(root / fault, **SIZES)
    start = time.monotonic()
    result = torchrun(
        str(ROOT / "tests" / "ranks" / "faulty.py"), 2, "-c", workspace.recipe, "--step_scheduler.local_batch_size=2",
        f"--checkpoint.checkpoint_dir={workspace.path}/out", "--dist_env.timeout_minutes=0.5",
        check=False, env={"FAULT": fault, "FAULT_RANK": "1"},
    )  # fmt: skip
    assert result.returncode
    assert time.monotonic() - start < 100
    assert "rank 1" in result.stderr, result.stderr[-3000:]
