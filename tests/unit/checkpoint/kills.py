"""Kill runs at chosen or random moments. A driver process: imports once, then forks a fresh run for every kill.

python -m tests.unit.checkpoint.kills DIRECTORY random KILLS SEED
python -m tests.unit.checkpoint.kills DIRECTORY stages
With ASYNC_SAVES=1 in the environment, saves are written in the background.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from nemo_automodel._transformers.mixin import adopt
from nemo_automodel.components.checkpoint import checkpointer as module
from nemo_automodel.components.checkpoint import hf, publish, resume
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.ranks import Ranks
from tests.unit.checkpoint.runs import make_state, train

ASYNC = os.environ.get("ASYNC_SAVES") == "1"


def start():
    state = make_state()
    if ASYNC:
        adopt(state.model)  # so that its weights are streamed, too
    return state


def run(root, steps):
    """Resume, then train and save every step, noting each loss on the disk at once."""
    state = start()
    checkpointer = Checkpointer(None, str(root / "ckpt"), restore_from="latest", keep_last=2, async_save=ASYNC)
    checkpointer.restore(state)
    with (root / "trace").open("a", buffering=1) as log:
        while state.schedule.step < steps:
            (loss,) = train(state, 1)
            log.write(json.dumps([state.schedule.step, loss]) + "\n")
            checkpointer.offer_best(1.0 / state.schedule.step)
            checkpointer.save(state)
    if ASYNC:
        checkpointer.finish(state)


def in_child(function, kill_after=None):
    """Run ``function`` in a fork; returns its exit status, negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print("child:", type(error).__name__, error, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(root, must_exist):
    """Whatever has a checkpoint's name is sound, or was superseded; what was complete before is still there."""
    names = {path.name for path in (root / "ckpt").glob("epoch_*")} if (root / "ckpt").exists() else set()
    for path in (root / "ckpt").glob("epoch_*"):
        assert publish.damage(path, Ranks(None)) == [], path
    assert names or not must_exist, "every checkpoint is gone"
    return bool(names)


def compare_traces(root):
    lines = [json.loads(line) for line in (root / "trace").read_text().splitlines()]
    last = max(step for step, _ in lines)
    expected = train(start(), last)
    wrong = [(step, loss) for step, loss in lines if loss != expected[step - 1]]
    assert not wrong, wrong
    return last


def warm(root):
    """Import here, once, what every fork would import; returns the seconds of a resume, a step and a save."""
    root.mkdir()
    run(root, 1)
    start = time.monotonic()
    run(root, 2)
    return time.monotonic() - start


def random_kills(root, kills, seed):
    rng, hit, exist = random.Random(seed), 0, False
    cycle = warm(root / "warm")
    for _ in range(kills):
        status = in_child(lambda: run(root, 10**6), kill_after=rng.uniform(0.3, 5) * cycle)
        assert status == -signal.SIGKILL, status
        hit += any((root / "ckpt").glob(".*"))
        exist = check(root, exist)
    assert in_child(lambda: run(root, 3 + max(f.step for f in publish.find_checkpoints(root / "ckpt")))) == 0
    print(json.dumps({"kills": kills, "in_a_save": hit, "steps": compare_traces(root)}))


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dying(owner, name, call, after=False):
    """Make the ``call``-th call of ``owner.name`` the last thing that the process does (before or after it)."""
    original, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            die()
        result = original(*args, **kwargs)
        if count[0] == call:
            die()
        return result

    setattr(owner, name, wrapped)


# name -> (where the process dies in its third save, the step it must resume from)
STAGES = {
    "3 before the tensors": ((resume, "save_tensors", 3), 2),
    "3 after the tensors": ((resume, "save_tensors", 3, True), 2),
    "8 before the config": ((hf, "complete_config", 3), 2),
    "9 before the card": ((hf, "write_card", 3), 2),
    "before the manifest": ((publish, "_write_manifest", 3), 2),
    "4 before the rename": ((publish, "publish", 3), 2),
    "5 before the pointer": ((publish, "publish", 3, True), 3),
    "5 between the pointers": ((publish, "write_pointer", 5, True), 3),
    "6 during pruning": ((publish, "remove", 1), 3),
    "6 while removing": ((publish.shutil, "rmtree", -1), 3),
    "15 while loading": ((module, "load_resume", 1), None),
}


def die_in_trash():
    original = publish.shutil.rmtree

    def wrapped(path, *args, **kwargs):
        if Path(path).name.startswith(".trash-") and Path(path).exists():
            next(Path(path).rglob("*.safetensors")).unlink()
            die()
        return original(path, *args, **kwargs)

    publish.shutil.rmtree = wrapped


def stages(root):
    warm(root / "warm")
    for name, (where, step) in STAGES.items():
        here = root / name.replace(" ", "_")
        here.mkdir()
        if step is None:
            assert in_child(lambda here=here: run(here, 2)) == 0
            step = 2

        def fatal(where=where, here=here):
            die_in_trash() if where[2] == -1 else dying(*where)
            run(here, 3)

        assert in_child(fatal) == -signal.SIGKILL, name
        check(here, True)
        newest = publish.find_checkpoints(here / "ckpt")[0].step
        assert newest == step, (name, newest)
        assert in_child(lambda here=here: run(here, 5)) == 0, name
        compare_traces(here)
        left = sorted(path.name for path in (here / "ckpt").iterdir())
        assert left == [".lock", "BEST", "LATEST", "epoch_0_step_4", "epoch_0_step_5"], (name, left)
        print(name, "ok", flush=True)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    if sys.argv[2] == "stages":
        stages(root)
    else:
        random_kills(root, int(sys.argv[3]), int(sys.argv[4]))
