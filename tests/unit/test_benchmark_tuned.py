"""The default beside the tuned contender: both run, agree at step 0, and every workload says what tuned means."""

from __future__ import annotations

import json

import pytest

from benchmarks import tuned
from benchmarks.contenders import TUNED, contenders
from benchmarks.step import WORKLOADS


@pytest.mark.parametrize("workload", ["A", pytest.param("B", marks=pytest.mark.full)])
def test_default_and_tuned_run_and_agree(workload, tmp_path, capfd):
    arguments = ["--cpu", "--workloads", workload, "--warmup", "1", "--steps", "2", "--out", str(tmp_path)]
    assert tuned.main(arguments) == 0, capfd.readouterr().out
    (row,) = json.loads((tmp_path / "tuned-cpu.json").read_text())["rows"]
    expected = 100 * row["default tok/s"] / row["tuned tok/s"]
    assert row["default / tuned %"] == pytest.approx(expected, abs=0.1)
    assert row["loss difference"] < 2e-3
    assert row["tuned by"] == TUNED[workload][1]


@pytest.mark.parametrize(("share", "met"), [(0.96, "yes"), (0.94, "NO")])
def test_a_default_that_is_too_slow_is_said(share, met, tmp_path, monkeypatch):
    def run(name, workload, arguments):
        return {"tok/s": 1000 * share if name == "ours" else 1000, "losses": [2.0]}

    monkeypatch.setattr(tuned, "run_contender", run)
    assert tuned.main(["--workloads", "A", "--out", str(tmp_path)]) == (met == "NO")
    (row,) = json.loads((tmp_path / "tuned.json").read_text())["rows"]
    assert row["met"] == met


def test_what_tuned_means_is_said_of_every_workload():
    assert set(TUNED) == set(WORKLOADS) - {"E", "E+"}  # for mixtures of experts no option is faster than none
    for workload, (name, _) in TUNED.items():
        assert name in contenders(workload, cpu=False)
