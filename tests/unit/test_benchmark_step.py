"""The step benchmark end to end on tiny CPU shapes: equality is judged, results are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.contenders import contenders, curve_of
from benchmarks.moe import E
from benchmarks.workloads import WORKLOADS, batches, model_flops, tiny


@pytest.mark.parametrize("workload", ["A", "B", "B'", "D", pytest.param("E+", marks=pytest.mark.full)])
def test_ours_equals_transformers_and_the_table_says_so(workload, tmp_path, capfd):
    names = [curve_of("ours"), "ours"]
    arguments = ["--cpu", "--workloads", workload, "--warmup", "1", "--steps", "2", "--out", str(tmp_path)]
    assert step.main([*arguments, "--contenders", *names]) == 0, capfd.readouterr().out
    result = json.loads((tmp_path / "step-cpu.json").read_text())
    assert result["machine"]["torch"]
    assert [row["contender"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["equal"] == "yes"
        assert row["tok/s"] > 0
        assert len(row["losses"]) == 3
    assert "| ours |" in (tmp_path / "step-cpu.md").read_text()


def test_a_contender_that_computes_something_else_is_marked():
    reference = {"losses": [2.0], "grad_norm": 1.0, "norms": {"a": 1.0}}
    good = {"losses": [2.001, 1.9], "grad_norm": 1.01, "norms": {"a": 1.01}}
    assert step.judge(good, reference, [2.0, 1.9])["equal"] == "yes"
    assert step.judge(good, reference, None)["equal"] == "yes, step 0"
    for wrong in ({"losses": [2.01, 1.9]}, {"grad_norm": 1.05}, {"losses": [2.0, 1.8]}, {"norms": {}}):
        assert step.judge(good | wrong, reference, [2.0, 1.9])["equal"] == "NO"


def test_failure_of_a_contender_is_reported_not_hidden(tmp_path, capfd):
    arguments = ["--cpu", "--workloads", "B", "--warmup", "1", "--steps", "1", "--out", str(tmp_path), "--limit", "0.1"]
    assert step.main(arguments) == 1
    assert "no result within" in capfd.readouterr().out


def test_flops_follow_the_published_formula():
    # 4N + attention of an 8B model: 30.0 + 3.2 GFLOP a token at sequence length 4096 (6N: 45.0).
    assert model_flops(WORKLOADS["A"]) / WORKLOADS["A"].tokens == pytest.approx(33.8e9, rel=0.01)
    assert model_flops(WORKLOADS["B"]) / WORKLOADS["B"].tokens == pytest.approx(8.35e9, rel=0.01)
    # 3.04e9 of the weights of a 30B mixture of experts meet a token.
    assert E.flops() / E.tokens == pytest.approx(4 * 3.04e9 + 5.64e9, rel=0.01)
    # Documents of a quarter of the length: a quarter of the attention.
    attention, packed = (model_flops(WORKLOADS[name]) - 6 * 1.2358e9 * 16384 for name in ("B", "B'"))
    assert packed / attention == pytest.approx(0.25, rel=0.02)


def test_packed_documents_are_those_of_the_rows():
    workload = tiny(WORKLOADS["B'"])
    (packed,), (rows,) = batches(workload, 1), batches(replace(workload, document=None), 1)
    assert torch.equal(packed["input_ids"].view(-1, workload.seq), rows["input_ids"])
    starts = packed["cu_seq_lens_q"][:-1].long()
    assert (packed["position_ids"][0, starts] == 0).all()
    assert (packed["labels"][0, starts[1:] - 1] == -100).all()  # nobody predicts the next document
    assert packed["num_label_tokens"] == workload.tokens - len(starts)


def test_every_workload_has_ours_and_each_contender_a_plain_peer():
    for name, workload in WORKLOADS.items():
        found = contenders(name, cpu=False)
        assert "ours" in found
        assert {curve_of(contender) for contender in found} <= {peer for peer in found if "ours" not in peer}
        assert curve_of("ours") != curve_of("transformers")
        batch = batches(tiny(workload), 1)[0]
        assert batch["num_label_tokens"] == len(batch["label_indices"]) == (batch["labels"] != -100).sum()
