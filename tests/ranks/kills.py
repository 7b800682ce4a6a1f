"""Kill ranks of an FSDP2 run at random moments, saves included. Imports once, then forks two fresh ranks for every kill.

python -m tests.ranks.kills DIRECTORY KILLS SEED
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.distributed.env import DistEnv
from nemo_automodel.recipes.ending import run_to_end
from tests.unit.checkpoint.kills import check
from tests.unit.checkpoint.runs import train
from tests.unit.checkpoint.test_ranks import sharded

RANKS = 2


class Section:
    def __init__(self, checkpoint_dir):
        self.checkpoint_dir = checkpoint_dir


class Config:
    """As much of a config as the end of a run looks at."""

    def __init__(self, root):
        self.checkpoint = Section(str(root / "ckpt"))


def run(root, steps):
    """Resume, then train and save every step; rank 0 notes each loss on the disk at once."""
    env = DistEnv(stop_signals=())
    state = sharded(env)
    checkpointer = Checkpointer(env, str(root / "ckpt"), restore_from="latest", keep_last=2)
    checkpointer.restore(state)
    with (root / f"trace_{env.rank}").open("a", buffering=1) as log:
        while state.schedule.step < steps:
            (loss,) = train(state, 1)
            log.write(json.dumps([state.schedule.step, loss]) + "\n")
            env.stop_requested(state.schedule.step)
            checkpointer.save(state)
    env.shutdown()


def start(root, steps):
    """Fork the ranks; returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": RANKS,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            os.environ.update({key: str(value) for key, value in place.items()})
            descriptor = os.open(root / f"output_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            os._exit(run_to_end(lambda _: run(root, steps), Config(root)))
        pids.append(pid)
    return pids


def wait(pids, seconds):
    """Exit statuses, negative for the signal that ended a rank; a rank that lives longer is an error."""
    statuses, deadline = {}, time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"a rank is alive {seconds} s after another was killed")
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def saved(root):
    return max((found.step for found in publish.find_checkpoints(root / "ckpt")), default=0)


def main(root, kills, seed):
    rng, in_a_save, slowest = random.Random(seed), 0, 0.0
    (root / "warm").mkdir()
    begun = time.monotonic()
    assert wait(start(root / "warm", 4), 200) == [0, 0], (root / "warm/output_0").read_text()
    cycle = time.monotonic() - begun
    for _ in range(kills):
        before = saved(root)
        pids = start(root, 10**6)
        time.sleep(rng.uniform(0.3, 1.5) * cycle)
        victims = rng.choice([pids[:1], pids[1:], pids])
        killed = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        statuses = wait(pids, 30)
        slowest = max(slowest, time.monotonic() - killed)
        assert all(s == (-signal.SIGKILL if pid in victims else 1) for pid, s in zip(pids, statuses, strict=True)), (
            statuses
        )
        in_a_save += any((root / "ckpt").glob(".tmp-epoch*"))
        check(root, before > 0)
        assert saved(root) >= before, "a complete checkpoint was lost"
        if len(victims) < RANKS:
            status = json.loads((root / "ckpt/exit_status.json").read_text())
            assert (status["reason"], status["rank"]) == ("rank_died", pids.index(victims[0])), status
    last = saved(root) + 2
    assert wait(start(root, last), 100) == [0, 0]
    whole = root / "whole"
    whole.mkdir()
    assert wait(start(whole, last), 200) == [0, 0]
    for rank in range(RANKS):
        compare(root, whole, rank)
    print(json.dumps({"kills": kills, "in_a_save": in_a_save, "steps": last, "slowest": round(slowest, 1)}))


def compare(root, whole, rank):
    """Every loss ever seen, before a kill or after a resume, is the uninterrupted run's, to the last bit."""
    expected = dict(map(json.loads, (whole / f"trace_{rank}").read_text().splitlines()))
    lines = [json.loads(line) for line in (root / f"trace_{rank}").read_text().splitlines()]
    assert {step for step, _ in lines} == set(expected)
    wrong = [(step, loss) for step, loss in lines if loss != expected[step]]
    assert not wrong, wrong


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
