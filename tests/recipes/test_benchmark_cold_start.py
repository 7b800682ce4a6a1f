"""The cold-start benchmark with the real command on a tiny shape: both starts are timed, the second finds the caches."""

from __future__ import annotations

import json

from benchmarks import cold_start


def test_both_starts_of_the_real_command(tmp_path, capfd):
    out = tmp_path / "out"
    assert cold_start.main(["--cpu", "--steps", "6", "--dir", str(tmp_path), "--out", str(out)]) == 0, capfd.readouterr()  # fmt: skip
    first, second = json.loads((out / "cold-start-cpu.json").read_text())["rows"]
    assert (first["start"], second["start"]) == ("first", "second")
    for row in (first, second):
        assert row["first step s"] > row["first forward to step s"] > 0
        assert any("step 1/" in line for _, line in row["lines"])
    assert first["certificate s"] > 0
    assert second["certificate s"] == 0.0  # kept from the first start
    assert 0 < second["input wait %"] < 100
    assert not [path for path in tmp_path.iterdir() if path != out]  # the checkpoint is gone


def test_a_start_that_fails_is_reported(tmp_path, capfd):
    arguments = ["--cpu", "--starts", "first", "--limit", "0.5", "--dir", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cold_start.main(arguments) == 1
    assert "not done within" in capfd.readouterr().out
