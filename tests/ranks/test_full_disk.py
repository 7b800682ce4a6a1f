"""A disk that refuses on one rank or on all, in a save of two FSDP2 ranks: every rank raises one error, nothing old is lost."""

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.errors import CheckpointError
from tests.ranks.launch import on_ranks
from tests.unit.checkpoint.runs import train
from tests.unit.checkpoint.test_ranks import assert_equal, numbers, sharded


def two_ranks(root, disk):
    env = DistEnv()
    state = sharded(env)
    checkpointer = Checkpointer(env, f"{root}/ckpt")
    checkpointer.restore(state)
    train(state, 1)
    checkpointer.save(state)
    saved = numbers(state)
    train(state, 1)

    # A quota that only rank 1 has: it writes its slices of the tensors, and its random state.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if env.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    refused(checkpointer, state, r"on rank 1: .*\n?.*not saved; those saved before are intact")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    if disk:  # a real one, too small for two checkpoints
        small = Checkpointer(env, f"{disk}/ckpt")
        small.restore(state)
        small.save(state)
        train(state, 1)
        refused(small, state, "No space left on device")
        env.barrier()
        assert sorted(os.listdir(f"{disk}/ckpt")) == [".lock", "LATEST", "epoch_0_step_2"]
        small._directory.release()  # a file that is open for writing keeps a disk writable
        if env.is_main:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        env.barrier()
        refused(small, state, "Read-only file system")

    assert checkpointer.save(state)  # the quota is gone
    again = sharded(env, seed=9)
    again.fingerprint = state.fingerprint
    assert Checkpointer(env, f"{root}/ckpt", restore_from="epoch_0_step_1").restore(again)
    assert_equal(numbers(again), saved)
    env.shutdown()


def refused(checkpointer, state, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        checkpointer.save(state)


@pytest.fixture
def disk(tmp_path):
    """A file system of 1000 KiB: one and a half checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_16_to_19_a_disk_that_refuses_on_one_rank_or_all(tmp_path, disk):
    on_ranks("tests.ranks.test_full_disk:two_ranks", 2, tmp_path, disk or "")
    found = publish.find_checkpoints(Path(tmp_path, "ckpt"))
    assert len(found) == 2
    assert all(publish.damage(checkpoint.path, Ranks(None)) == [] for checkpoint in found)
    if disk:
        assert publish.damage(disk / "ckpt/epoch_0_step_2", Ranks(None)) == []
