"""``benchmarks.fp8_learning``: its language, and that its curves are those of the contenders it names."""

from __future__ import annotations

import json

import torch

from benchmarks import fp8_learning
from benchmarks.contenders import FP32_MASTERS
from benchmarks.workloads import WORKLOADS, chain_batches, tiny


def test_the_language_has_four_followers_a_token_and_others_the_same_tokens():
    workload = tiny(WORKLOADS["A"])
    one, again, other = (chain_batches(workload, 40, seed) for seed in (2, 2, 3))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, again, strict=True))
    ids = torch.cat([batch["input_ids"] for batch in one])
    followers: dict[int, set[int]] = {}
    for before, after in zip(ids[:, :-1].flatten().tolist(), ids[:, 1:].flatten().tolist(), strict=True):
        followers.setdefault(before, set()).add(after)
    assert max(map(len, followers.values())) == 4
    assert not torch.equal(ids, torch.cat([batch["input_ids"] for batch in other]))
    assert len({tuple(row.tolist()) for row in ids}) == len(ids), "every row is another"


def test_fp8_adapters_learn_as_transformers_does_over_a_trained_base(tmp_path):
    base = tmp_path / "base.pt"
    options = ["--cpu", "--parts", "adapters", "--base", str(base), "--out", str(tmp_path)]
    assert fp8_learning.main([*options, "--steps", "12", "--base-steps", "40"]) == 0
    first = json.loads((tmp_path / "fp8-learning.json").read_text())["rows"]
    assert first[0]["losses"][-1] < first[0]["losses"][0], "the base learns"
    rows = {row["what"]: row for row in first[1:]}
    assert rows[FP32_MASTERS]["largest difference"] < 1e-4
    assert 0 < rows["ours, fp8"]["largest difference"] < 2e-3

    assert fp8_learning.main([*options, "--steps", "12", "--contenders", "ours"]) == 0
    (again,) = json.loads((tmp_path / "fp8-learning.json").read_text())["rows"]
    assert again["losses"] == rows["ours"]["losses"], "from the same base"
