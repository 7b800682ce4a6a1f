"""``automodel finetune --nproc-per-node``: torchrun started by the command itself.

Claims: (1) two ranks train as one process does; (2) a signal to the command reaches the ranks, which save, and its exit
code is theirs; (3) so is that of a user's mistake, told once and without a traceback of torchrun's; (4) a killed rank is
named; (5) on a terminal rank 0's display is live.
"""

import os
import pty
import select
import signal
import subprocess
import time

import pytest

from tests.recipes.workspace import make_workspace

TWO = ["--nproc-per-node=2", "--step_scheduler.local_batch_size=2"]


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


def start(workspace, *arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        workspace.command(*TWO, *arguments), cwd=workspace.path, env=environment, stderr=subprocess.PIPE, text=True, **options
    )  # fmt: skip


def finish(process, seconds=120):
    try:
        _, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, stderr


def wait_for_steps(workspace, process, steps=3):
    path, deadline = workspace.path / "out/metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.05)


def ranks_of(process):
    """Process ids of the ranks: children of the command."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in children.stdout.split()]


def test_two_ranks_train_as_one_process(workspace):
    one = workspace.run("--step_scheduler.local_batch_size=2", out="one")
    code, stderr = finish(start(workspace))
    assert code == 0, stderr
    assert [line["loss"] for line in workspace.metrics()] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert "OMP_NUM_THREADS" not in stderr, "torchrun's own remarks are not the run's"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full), signal.SIGINT]
)
def test_a_signal_reaches_the_ranks_which_save_and_the_code_says_so(workspace, number):
    process = start(workspace, "--step_scheduler.max_steps=4000")
    wait_for_steps(workspace, process)
    process.send_signal(number)
    code, stderr = finish(process)
    assert code == 75, stderr
    assert "Traceback" not in stderr
    assert (workspace.path / "out" / (workspace.path / "out/LATEST").read_text().strip()).is_dir()


def test_a_mistake_is_told_once_with_its_own_code(workspace):
    code, stderr = finish(start(workspace, "--dataset.column_mapping={question: quest, answer: answer}"))
    assert code == 2
    assert stderr.count("no column 'quest'") == 1
    assert "Traceback" not in stderr
    assert "ChildFailedError" not in stderr


def test_a_killed_rank_is_named_and_ends_the_run(workspace):
    process = start(workspace, "--step_scheduler.max_steps=4000")
    wait_for_steps(workspace, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    code, stderr = finish(process, seconds=60)
    assert code not in (0, 2, 75)
    assert "rank 1" in stderr
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)


def test_the_display_is_live_on_a_terminal(workspace):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = workspace.command(*TWO, "--loggers.progress=null")
    process = subprocess.Popen(command, cwd=workspace.path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    assert process.wait(timeout=30) == 0, shown.decode(errors="replace")[-3000:]
    assert b"12/12" in shown
    assert b"\x1b[2K" in shown, "one line, written again and again"
