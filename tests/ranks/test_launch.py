"""Forked ranks are what torchrun starts: the same variables, order of sets, random state, and end of the others."""

import json
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.ranks.launch import on_ranks, torchrun

NAMES = {"acme", "base", "cell", "dora", "expert", "fsdp", "gloo", "head"}


def report(folder: str) -> None:
    seen = {
        "variables": dict(os.environ),
        "arguments": sys.argv[1:],
        "directory": os.getcwd(),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "order": list(NAMES),
        "random": [random.random(), np.random.rand(), torch.rand(1, dtype=torch.float64).item()],
    }
    with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
        json.dump(seen, file)


def reports(start, folder):
    folder.mkdir()
    start("tests.ranks.test_launch:report", 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_rank_sees_what_it_sees_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMETHING_NEW", "1")
    real, forked, again = (
        reports(start, tmp_path / name) for name, start in (("a", torchrun), ("b", on_ranks), ("c", on_ranks))
    )
    own = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}  # of each start
    of_the_agent = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    for rank in range(2):
        variables = real[rank]["variables"]
        assert forked[rank]["variables"].keys() == variables.keys() - of_the_agent
        for name in variables.keys() - own - of_the_agent:
            assert forked[rank]["variables"][name] == variables[name], name
        assert forked[rank]["directory"] == real[rank]["directory"]
        assert forked[rank]["threads"] == real[rank]["threads"]
        assert not set(forked[rank]["random"]) & set(again[rank]["random"]), "a process of its own has its own seeds"
    assert not set(forked[0]["random"]) & set(forked[1]["random"])
    assert forked[0]["order"] != forked[1]["order"], "strings are hashed differently"


def fail_on_rank_1(how: str) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(600)
    if how == "exception":
        raise ValueError("this went wrong")
    sys.exit(how)


@pytest.mark.parametrize("how", ["exception", "this went wrong"])
def test_a_rank_that_fails_ends_the_others_and_is_told(how):
    begun = time.monotonic()
    result = on_ranks("tests.ranks.test_launch:fail_on_rank_1", 2, how, check=False)
    assert time.monotonic() - begun < 60
    assert result.returncode == 1
    assert "this went wrong" in result.stderr
    with pytest.raises(AssertionError, match="this went wrong"):
        on_ranks("tests.ranks.test_launch:fail_on_rank_1", 2, how)


def sleep() -> None:
    print("asleep", flush=True)
    time.sleep(600)


def test_ranks_that_do_not_end_are_killed():
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        on_ranks("tests.ranks.test_launch:sleep", 2, timeout=2)
    assert "asleep" in caught.value.output
    on_ranks("os:getpid", 2)
