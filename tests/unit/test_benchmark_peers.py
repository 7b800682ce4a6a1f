"""Peers with classes or loops of their own take the same steps as the rest: equal losses and gradients, a time for every step.

They are not among what `make test` needs; without them there is nothing to compare with.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks import step
from benchmarks.contenders import TRL


@pytest.mark.parametrize(
    ("package", "name", "workload"),
    [("trl", TRL, "A"), pytest.param("trl", TRL, "B", marks=pytest.mark.full), ("torchtitan", "torchtitan", "B")],
)
def test_a_peer_equals_transformers(package, name, workload, tmp_path, capfd):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    arguments = ["--cpu", "--workloads", workload, "--warmup", "2", "--steps", "3", "--out", str(tmp_path)]
    assert step.main([*arguments, "--contenders", "transformers", name]) == 0, capfd.readouterr().out
    plain, peer = json.loads((tmp_path / "step-cpu.json").read_text())["rows"]
    assert (peer["contender"], peer["equal"], len(peer["losses"])) == (name, "yes", 5)
    assert peer["trainable"] == plain["trainable"]
    assert peer["tok/s"] > 0
