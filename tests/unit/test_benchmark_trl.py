"""TRL's own loop takes the same steps as the harness's: equal losses and gradients, a time for every step."""

from __future__ import annotations

import json

import pytest

from benchmarks import step
from benchmarks.contenders import TRL

pytest.importorskip("trl")  # a peer, not among what `make test` needs


@pytest.mark.parametrize("workload", ["A", "B"])
def test_trl_equals_transformers(workload, tmp_path, capfd):
    arguments = ["--cpu", "--workloads", workload, "--warmup", "2", "--steps", "3", "--out", str(tmp_path)]
    assert step.main([*arguments, "--contenders", "transformers", TRL]) == 0, capfd.readouterr().out
    plain, trl = json.loads((tmp_path / "step-cpu.json").read_text())["rows"]
    assert (trl["contender"], trl["equal"], len(trl["losses"])) == (TRL, "yes", 5)
    assert trl["trainable"] == plain["trainable"]
    assert trl["tok/s"] > 0
