"""The floors of a step: every part is in the table, and what is measured is what the workloads' own formulas say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import floor_work, floors, scale
from benchmarks.workloads import IGNORE_INDEX

PARTS = ["products", "attention", "elementwise", "loss rows", "optimizer", "sum"]
MORE_PARTS = {
    "A": ["LoRA"],
    "A8": ["LoRA", "quantising"],
    "D": ["tower: products", "tower: attention", "tower: elementwise"],
}
MEASURED = ("products", "attention")


def case_of(name, tiny):
    case = floors.CASES[name]
    if not tiny:
        return case
    return replace(case, workload=scale.SMALL if name == "C" else case.workload.tiny())


def test_every_part_of_every_workload_is_in_the_table(tmp_path, capfd):
    assert floors.main(["--cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0, capfd.readouterr().out
    result = json.loads((tmp_path / "floors-cpu.json").read_text())
    assert result["machine"]["torch"]
    copy, *rows = result["rows"]
    assert copy["part"] == "device copy"
    for name, case in floors.CASES.items():
        *parts, total = [row for row in rows if row["workload"] == name]
        assert sorted(row["part"] for row in [*parts, total]) == sorted(PARTS + MORE_PARTS.get(name, []))
        for row in parts:
            if row["part"].endswith(MEASURED):
                assert min(row["ms"], row["burst ms"], row["host ms"]) > 0
            else:  # bytes at the bandwidth of the copy, in 3 digits each
                assert row["ms"] == pytest.approx(row["GB"] * copy["ms"] / copy["GB"], rel=0.02, abs=0.05)
        assert total["ms"] == pytest.approx(sum(row["ms"] for row in parts), abs=0.01)
        assert total["tok/s"] == pytest.approx(case_of(name, True).workload.tokens / total["ms"] * 1e3, rel=0.01)
        assert total["target tok/s"] == case.target
    assert "| A8 | sum |" in (tmp_path / "floors-cpu.md").read_text()


def causal(layers, tokens, length, width):
    return 3.5 * layers * 2 * tokens * length * width


@pytest.mark.parametrize("tiny", [True, False], ids=["tiny", "whole"])
@pytest.mark.parametrize("name", ["A", "A8", "B", "B'", "C", "D"])
def test_products_are_the_workloads_flops_without_attention(name, tiny):
    case = case_of(name, tiny)
    workload, shape = case.workload, case.workload.shape
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = causal(shape["num_hidden_layers"], workload.tokens, workload.document or workload.seq, width)
    if name == "D":
        tower = workload.tower
        patches = (tower["image_size"] // tower["patch_size"]) ** 2
        attention += 4 * workload.batch * tower["num_hidden_layers"] * patches**2 * tower["hidden_size"]

    model = floor_work.on_meta(workload)
    work, seen = floor_work.products(workload, model, "cuda", case.fp8)
    head = [p for p in work if p.layer == "lm_head"]
    labelled = sum(p.rows for p in head if p.kind == "forward")
    assert labelled == int((workload.batches(1)[0]["labels"] != IGNORE_INDEX).sum())
    nominal = sum(p.flops * (workload.tokens / labelled if p in head else 1) for p in work + seen)
    assert nominal == pytest.approx(workload.flops() - attention, rel=1e-12)

    layers, tower_layers = floor_work.attentions(workload, model)
    assert sum(layer.flops for layer in layers + tower_layers) == pytest.approx(attention, rel=1e-12)


def test_order_and_kinds_are_those_of_a_step():
    for name, trained in (("A", False), ("B", True)):
        workload = floors.CASES[name].workload
        work, seen = floor_work.products(workload, floor_work.on_meta(workload), "cuda")
        layers = workload.shape["num_hidden_layers"]
        assert seen == []
        assert [p.kind for p in work[: 7 * layers]] == ["forward"] * 7 * layers
        assert [p.layer.rpartition(".")[2] for p in work[:4]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert work[-1].layer == work[0].layer
        assert sum(p.kind == "dW" for p in work if p.layer != "lm_head") == 7 * layers * trained
        betas = [p.beta for p in work if p.kind == "dW" and p.layer == "lm_head"]
        assert betas == [0] * trained + [1] * (len(betas) - 1)  # our loss sums the head's gradient over its chunks
    in_fp8, _ = floor_work.products(workload.tiny(), floor_work.on_meta(workload.tiny()), "cuda", fp8=True)
    assert all(p.fp8 == (p.layer != "lm_head" and p.kind != "dW") for p in in_fp8)


def test_only_the_textual_part_of_a_vision_model_is_trained():
    workload = floors.CASES["D"].workload
    work, seen = floor_work.products(workload, floor_work.on_meta(workload), "cuda")
    assert {p.kind for p in seen} == {"forward"}
    assert {p.rows for p in seen} == {8 * 4096}
    assert {p.kind for p in work if p.layer == "lm_head"} == {"forward", "dX"}
    layers, tower = floor_work.attentions(workload, floor_work.on_meta(workload))
    assert (len(layers), len(tower)) == (34, 27)
    assert all(layer.causal and layer.backward for layer in layers)
    assert not any(layer.causal or layer.backward for layer in tower)


def test_bytes_of_the_large_shapes():
    a, b, d = (floors.CASES[name].workload for name in ("A", "B", "D"))
    models = [floor_work.on_meta(workload) for workload in (a, b, d)]
    # 19h + 4(q + g) + 8f numbers; Gemma with 4h and q + g more.
    assert floor_work.block_bytes(a, models[0]) == 2 * (19 * 4096 + 4 * (4096 + 1024) + 8 * 14336)
    assert floor_work.block_bytes(b, models[1]) == 2 * (19 * 2048 + 4 * (2048 + 512) + 8 * 8192)
    assert floor_work.block_bytes(d, models[2]) == 2 * (23 * 2560 + 5 * (2048 + 1024) + 8 * 10240)
    assert floor_work.elementwise_bytes(a, models[0]) / a.tokens == pytest.approx(13.7e6, rel=0.005)
    assert floor_work.tower_bytes(d, models[2]) == 27 * 8 * 4096 * 2 * (8 * 1152 + 2 * 4304)
    assert floor_work.adapter_bytes(a, models[0]) == 2 * 8192 * 32 * 120832
    assert floor_work.quantising_bytes(a, models[0]) == 8192 * 32 * 79872
    assert floor_work.loss_bytes(a, models[0]) == 4 * 8190 * 128256  # frozen head
    assert floor_work.loss_bytes(b, models[1]) == 4 * 16380 * 128256 + 6 * 2048 * 128256
    assert floor_work.trained_weights(a, models[0]) == 41_943_040  # rank 16 on all projections of an 8B Llama
    assert floor_work.trained_weights(b, models[1]) == 1_235_814_400


def test_a_sustained_pass_runs_every_call_in_order_and_is_timed_whole():
    calls: list[int] = []
    works = [lambda i=i: calls.append(i) for i in range(3)]
    steady, host = floors.sustained(works, 0.0, 1.0, torch.device("cpu"))
    assert calls == [0, 1, 2] * 3
    assert steady > 0 < host


def test_a_workload_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(a, b):
        raise RuntimeError("no FP8 here")

    monkeypatch.setattr(floors, "_fp8_product", broken)
    arguments = ["--cpu", "--seconds", "0.01", "--out", str(tmp_path), "--workloads", "A8", "B"]
    assert floors.main(arguments) == 1
    rows = json.loads((tmp_path / "floors-cpu.json").read_text())["rows"]
    assert [row["failed"] for row in rows if "failed" in row] == ["no FP8 here"]
    assert rows[-1]["workload"] == "B"
    assert rows[-1]["part"] == "sum"
