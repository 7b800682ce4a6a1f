"""``kill -9`` at any moment: the newest complete checkpoint loads, and the loss trace is the uninterrupted run's."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks.launch import ROOT


def drive(*args, **env):
    command = [sys.executable, "-m", "tests.unit.checkpoint.kills", *map(str, args)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.sample), pytest.param(40, marks=pytest.mark.full)])
def test_1_class_16_random_kills(kills, tmp_path):
    result = json.loads(drive(tmp_path, "random", kills, 0).splitlines()[-1])
    assert result["steps"] > 3
    assert result["in_a_save"] >= kills // 10


@pytest.mark.parametrize("kills", [pytest.param(4, marks=pytest.mark.sample), pytest.param(20, marks=pytest.mark.full)])
def test_11_random_kills_while_a_save_is_written_in_the_background(kills, tmp_path):
    result = json.loads(drive(tmp_path, "random", kills, 1, ASYNC_SAVES="1").splitlines()[-1])
    assert result["steps"] > 3
    assert result["in_a_save"] >= kills // 4


def test_3_to_9_killed_at_every_stage_of_a_save(tmp_path):
    assert drive(tmp_path, "stages").count(" ok") == 11
