"""The growth benchmark on tiny CPU shapes: equal first losses, one row a point, failures told and not hidden."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import growth
from benchmarks.contenders import AUTO
from benchmarks.workloads import WORKLOADS


@pytest.mark.parametrize("workload", ["A", pytest.param("B", marks=pytest.mark.full)])
def test_ours_beside_transformers_at_every_point(workload, tmp_path, capfd):
    arguments = ["--cpu", "--workloads", workload, "--warmup", "1", "--steps", "2", "--out", str(tmp_path)]
    assert growth.main(arguments) == 0, capfd.readouterr()
    rows = json.loads((tmp_path / "growth-cpu.json").read_text())["rows"]
    assert [(row["contender"], row["rows"], row["sequence"]) for row in rows] == [
        (name, *shape) for name in (AUTO, "transformers") for shape in ((1, 64), (2, 32))
    ]
    for row in rows:
        assert row["tok/s"] > 0
        assert row["loss error"] < growth.LOSS_TOLERANCE
        assert row["checkpointing"] == "off"  # a CPU has no limit that is known


def test_what_does_not_fit_is_a_row_and_the_next_point_runs(monkeypatch):
    def too_large(name, workload, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    device, workload = torch.device("cpu"), growth.shaped(WORKLOADS["B"], "1x32", cpu=True)
    with monkeypatch.context() as patched:
        patched.setattr(growth, "build", too_large)
        found = growth.measure(AUTO, workload, device, 1, 1)
    assert found == {"failed": "out of memory", "wanted": "CUDA out of memory. Tried to allocate 9 GiB"}
    assert growth.measure(AUTO, workload, device, 1, 1)["tok/s"] > 0


def test_a_contender_that_dies_leaves_a_row_for_every_point(tmp_path, capfd):
    arguments = ["--cpu", "--workloads", "B", "--contenders", "nobody", "--out", str(tmp_path)]
    assert growth.main(arguments) == 1
    rows = json.loads((tmp_path / "growth-cpu.json").read_text())["rows"]
    assert [(row["contender"], row["failed"]) for row in rows] == [("nobody", "the process ended early")] * 2
    assert "KeyError: 'nobody'" in capfd.readouterr().err


@pytest.mark.parametrize(("kind", "contender"), [pytest.param("lora", "ours, checkpointed", marks=pytest.mark.full), ("sft", "ours, full SFT, small state")])  # fmt: skip
def test_lengths_are_tried_with_every_activation_computed_again(kind, contender, tmp_path, capfd):
    assert growth.main(["--cpu", "--longest", kind, "--out", str(tmp_path)]) == 0, capfd.readouterr()
    rows = json.loads((tmp_path / "longest-cpu.json").read_text())["rows"]
    assert [(row["contender"], row["sequence"], row["checkpointing"]) for row in rows] == [
        (contender, 128, "full in 2"),
        (contender, 256, "full in 2"),
    ]


@pytest.mark.parametrize(("least", "known"), [(0, [4, 8]), (30, [4, 8, 16, 32, 64])])
def test_the_longest_is_extrapolated_and_then_tried(least, known, monkeypatch):
    """A device of 100 GiB on which a sequence takes 10 GiB and 1 GiB for each 4096 tokens, or the optimizer ``least``."""
    monkeypatch.setattr(growth, "machine", lambda: {"memory": "102400 MiB"})

    def one(workload, contender, points, steps, arguments):
        length = int(points[0].split("x")[1])
        peak = max(least, 10 + length / 4096)
        yield {"sequence": length, **({"peak GiB": peak} if peak <= 99 else {"failed": "out of memory"})}

    monkeypatch.setattr(growth, "rows_of", one)
    arguments = type("Arguments", (), {"contenders": [], "cpu": False, "tries": 5})()
    rows = list(growth.longest("lora", arguments))
    assert [row["sequence"] // 4096 for row in rows] == [*known, 87, 92]
    assert [row["sequence"] // 4096 for row in rows if "failed" in row] == [92]
    assert rows[len(known)]["predicted GiB"] == 97.0
