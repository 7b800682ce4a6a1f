"""The coverage checks, on architectures of many kinds; and that they catch what is wrong.

Unmarked: a sample. All registered architectures: ``-m full``, or ``automodel coverage``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_automodel._transformers import coverage, coverage_packing, coverage_ranks, coverage_run, coverage_steps
from nemo_automodel._transformers.compat import registered_types
from nemo_automodel._transformers.coverage import check
from nemo_automodel._transformers.coverage_cells import COLUMNS, REQUIRED, YES, Row
from nemo_automodel._transformers.coverage_report import read_rows, write_report
from nemo_automodel._transformers.coverage_run import sweep
from nemo_automodel.cli.app import main

# Dense, soft-capped, chunked, windowed and sink attention; routed, shared and fused experts; latent and sparse attention;
# state space, linear attention, recurrence and convolutions; tied, scaled and biased heads; towers of several kinds.
CAUSAL = (
    "afmoe", "bloom", "cohere2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "falcon", "falcon_h1", "gemma2", "gpt2",
    "gpt_oss", "granite", "lfm2", "llama", "llama4_text", "mamba", "mixtral", "opt", "phi3", "qwen3_moe", "rwkv", "smollm3",
)  # fmt: skip
SEEING = ("gemma3", "idefics3", "internvl", "llava", "paligemma", "qwen2_vl")
SAMPLE = [("causal", t) for t in CAUSAL] + [("vlm", t) for t in SEEING]
REST = [(k, t) for k in ("causal", "vlm") for t in registered_types(k) if (k, t) not in SAMPLE]


CUT = (
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "llama",
    "mixtral",
    "qwen2_vl",
)  # by a plan of their own, or an inferred one


def in_its_own_process(kind: str, model_type: str) -> Row:
    (row,) = sweep([(model_type, kind)], jobs=1)
    return row


_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["nemo_automodel._transformers.coverage", "peft"])
"""What forks for the command, a process that ran nothing else; this one may have run recipes, whose threads a fork loses."""


@pytest.fixture
def measured(kind: str, model_type: str, record_property: Any) -> Row:
    """The row of one architecture, which is also in the report of the run (``--junitxml``)."""
    with ProcessPoolExecutor(1, mp_context=_FRESH) as pool:
        row = pool.submit(in_its_own_process, kind, model_type).result()
    record_property("coverage", json.dumps(asdict(row)))
    return row


@pytest.mark.parametrize(("kind", "model_type"), SAMPLE, ids=[f"{k}-{t}" for k, t in SAMPLE])
def test_an_architecture_trains_and_round_trips(kind: str, model_type: str, measured: Row) -> None:
    wanted = (*REQUIRED, "fsdp2", "tp2") if model_type in CUT else (*REQUIRED, "fsdp2")
    wanted = (*wanted, "packing") if kind == "vlm" else wanted  # with images
    assert {column: measured.cells[column] for column in wanted} == dict.fromkeys(wanted, YES)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "model_type"), REST, ids=[f"{k}-{t}" for k, t in REST])
def test_whatever_transformers_trains_trains_here(measured: Row) -> None:
    if not measured.trains_plainly:
        pytest.skip(measured.cells["twin"])
    assert not measured.wrong


def test_a_wrong_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = coverage_steps.forward_loss

    def off_by_a_little(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ce_sum, aux = right(*args)
        return ce_sum * 1.0002, aux

    for module in (coverage_packing, coverage_steps):
        monkeypatch.setattr(module, "forward_loss", off_by_a_little)
    row = check("llama", "causal")
    assert row.cells["twin"] == row.cells["load"] == YES
    assert row.cells["sft"].startswith("loss of step 0")
    assert row.cells["lora"].startswith("loss of step 0")
    assert row.cells["packing"].startswith("loss of step 0")


def test_a_weight_that_is_not_saved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = coverage.gather_weights

    def forgetful(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        weights = right(*args, **kwargs)
        weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
        return weights

    monkeypatch.setattr(coverage, "gather_weights", forgetful)
    assert "model.norm.weight is not bit for bit" in check("llama", "causal").cells["save"]


def test_gradients_that_are_not_summed_over_ranks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone(coverage_ranks.FSDP2Manager):
        def sync_gradients(self, model: torch.nn.Module, last_micro_batch: bool) -> None:
            super().sync_gradients(model, False)

    monkeypatch.setattr(coverage_ranks, "FSDP2Manager", Alone)
    row = in_its_own_process("causal", "llama")
    assert row.cells["sft"] == YES
    assert "gradient of" in row.cells["fsdp2"]


def test_a_second_rank_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = coverage_ranks.prepared

    def dies(*args: Any) -> Any:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise SystemExit(3)
        return right(*args)

    monkeypatch.setattr(coverage_ranks, "prepared", dies)
    monkeypatch.setattr(coverage_ranks, "_TIMEOUT", timedelta(seconds=5))
    row = in_its_own_process("causal", "llama")
    assert row.cells["packing"] == YES
    assert row.cells["fsdp2"] not in (YES, "")


def exits(*_: Any, **__: Any) -> Row:
    raise SystemExit(3)


def is_killed(*_: Any, **__: Any) -> Row:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives on")


def hangs(*_: Any, **__: Any) -> Row:
    while True:
        pass


@pytest.mark.parametrize(
    ("check_of_it", "said"),
    [
        (exits, r"its process ended by itself \(status 256\)"),
        (is_killed, "its process was ended by SIGKILL"),
        (hangs, r"not done in 1 s \(test_coverage.py:\d+ in hangs, below coverage_run.py:\d+ in _fork\)"),
    ],
)
def test_a_process_that_does_not_end_well_is_a_row(
    check_of_it: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage_run, "check", check_of_it)
    monkeypatch.setattr(coverage_run, "SECONDS", 1)
    (row,) = sweep([("llama", "causal")], jobs=2)
    assert not row.trains_plainly
    assert re.fullmatch(said, row.cells["twin"])


def test_the_report_is_a_page_and_the_same_as_json(tmp_path: Path) -> None:
    cells = dict.fromkeys(COLUMNS, YES)
    rows = [Row("b", "causal", {**cells, "packing": "no | way"}), Row("a", "causal", cells)]
    rows += [Row("gemma3", "vlm", cells), Row("qwen2_vl", "vlm", cells), Row("llama4", "vlm", cells)]
    page = tmp_path / "docs" / "coverage.md"
    write_report(rows, page, "2026-01-02")
    assert "1. no &#124; way" in page.read_text()
    assert page.read_text().index("| a |") < page.read_text().index("| b |")
    lines = {line.split(" | ")[0]: line for line in page.read_text().splitlines()}
    assert lines["| gemma3"].endswith("| yes | PIL |")
    assert lines["| qwen2_vl"].endswith("| yes | PIL, images only |")
    assert lines["| llama4"].endswith("| yes | torchvision |")
    assert lines["| a"].endswith("| yes | yes |")
    data = json.loads(page.with_suffix(".json").read_text())
    assert data["date"] == "2026-01-02"
    assert read_rows(page) == [rows[1], rows[0], rows[2], rows[4], rows[3]]


def test_the_command_names_the_nearest_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "lama"]) == 2
    assert "did you mean llama?" in capsys.readouterr().err
    assert main(["coverage", "--kind", "audio"]) == 2
