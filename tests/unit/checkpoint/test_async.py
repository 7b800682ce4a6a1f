"""Saving while training goes on: what is saved is the step it was asked for, and what goes wrong is not lost."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from nemo_automodel._transformers.mixin import adopt
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.background import HostCopies
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.contents import Contents
from nemo_automodel.components.checkpoint.ranks import Ranks
from tests.unit.checkpoint.runs import Average, make_state, train

KINDS = {
    "full": {},
    "lora": {"peft": PeftConfig(match_all_linear=True, dim=4)},
    "merged": {"peft": PeftConfig(match_all_linear=True, dim=4, use_dora=True)},
}


def run(kind: str, steps: int = 2):
    state = make_state(**KINDS[kind])
    adopt(state.model)
    state.extra = {"ema": Average([p for p in state.model.parameters() if p.requires_grad])}
    train(state, steps)
    state.extra["ema"].update()
    return state


def files(directory):
    found = publish.read_manifest(directory)["files"]
    assert publish.damage(directory, Ranks(None)) == []
    return {name: entry["sha256"] for name, entry in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_13_56_the_files_are_those_of_a_save_that_waits(kind, tmp_path):
    """However much is trained before anything is written."""
    state = run(kind)
    expected = files(Checkpointer(None, str(tmp_path / "sync"), save_merged=kind == "merged").save(state))

    state = run(kind)
    temporary = publish.temporary_directory(tmp_path / "late", "epoch_0_step_2")
    extra = {"best": None, "fingerprint": {}}
    contents = Contents.of(state, temporary, Ranks(None), extra, kind == "merged")
    contents.on_host(HostCopies())
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    train(state, 3)
    state.extra["ema"].update()
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    contents.write(Ranks(None))
    publish.seal(temporary, {}, Ranks(None))
    late = files(temporary)
    for name in expected.keys() - {"resume/state.json"}:  # it names the run's surroundings, left out here
        assert late[name] == expected[name], name

    state = run(kind)
    checkpointer = Checkpointer(None, str(tmp_path / "async"), save_merged=kind == "merged", async_save=True)
    path = checkpointer.save(state)
    train(state, 3)
    checkpointer.finish(state)
    assert files(path) == expected
    assert publish.read_pointer(tmp_path / "async", "LATEST") == "epoch_0_step_5"


def test_12_a_second_save_waits_for_the_first(tmp_path):
    state = run("full")
    waiting = Checkpointer(None, str(tmp_path / "sync"), keep_last=None)
    going_on = Checkpointer(None, str(tmp_path / "async"), keep_last=None, async_save=True)
    paths = []
    for _ in range(4):
        waiting.save(state)
        paths.append(going_on.save(state))
        assert going_on.stall_s > 0
        assert all(path.exists() for path in paths[:-1])
        train(state, 1)
    going_on.finish(state)
    for path in paths:
        assert files(path) == files(tmp_path / "sync" / path.name)
    assert [found.step for found in publish.find_checkpoints(tmp_path / "async")] == [6, 5, 4, 3, 2]


def test_best_never_names_what_is_not_published(tmp_path, monkeypatch):
    """Validated while it is written, and after it was."""
    written, seal = threading.Event(), publish.seal
    monkeypatch.setattr(publish, "seal", lambda *args: (written.wait(60), seal(*args)))
    state = run("full")
    checkpointer = Checkpointer(None, str(tmp_path), keep_last=1, async_save=True)
    checkpointer.save(state)
    checkpointer.offer_best(1.0)
    assert publish.read_pointer(tmp_path, "BEST") is None
    assert not (tmp_path / "BEST").exists()
    written.set()
    train(state, 1)
    checkpointer.save(state)
    assert publish.read_pointer(tmp_path, "BEST") == "epoch_0_step_2"
    checkpointer._background.wait()
    checkpointer.offer_best(0.5)
    assert publish.read_pointer(tmp_path, "BEST") == "epoch_0_step_3"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "BEST", "LATEST", "epoch_0_step_3"]


FULL_DISK = """
import resource, signal, sys, time
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint import publish
from nemo_automodel.errors import CheckpointError
from tests.unit.checkpoint.runs import train
from tests.unit.checkpoint.test_async import run
state = run("full")
checkpointer = Checkpointer(None, sys.argv[1], async_save=True)
first = checkpointer.save(state)
train(state, 1)
checkpointer.check()
checkpointer._background.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
checkpointer.save(state)
try:
    if sys.argv[2] == "check":
        for _ in range(1000):
            checkpointer.check()
            time.sleep(0.01)
    elif sys.argv[2] == "save":
        checkpointer.save(state)
    else:
        checkpointer.finish(state)
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert publish.damage(first, Ranks(None)) == []
    checkpointer.check()  # it was raised once
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("where", ["check", "save", "finish"])
def test_17_a_full_disk_is_an_error_of_the_next_step_save_or_end(where, tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "ckpt"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stdout
    assert "epoch_0_step_3 was not saved; those saved before are intact" in done.stdout
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == [".lock", "LATEST", "epoch_0_step_2"]


def test_host_memory_is_used_again():
    copies = HostCopies()
    tensors = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(5)]
    copies.begin()
    first = [copies.copy(tensor) for tensor in tensors]
    assert copies.copy(tensors[0]) is first[0]
    copies.end()
    tensors[0].add_(1)
    copies.begin()
    second = [copies.copy(tensor) for tensor in tensors]
    copies.end()
    assert {tensor.data_ptr() for tensor in first} == {tensor.data_ptr() for tensor in second}
    assert all(torch.equal(a, b) for a, b in zip(second, tensors, strict=True))
