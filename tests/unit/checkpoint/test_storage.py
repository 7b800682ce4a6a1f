"""What happens to a checkpoint after it was written: flipped bits, missing files, lost pointers, a full disk.

P: the previous complete checkpoint is taken, with a warning that names the damage. E: one error, never a fresh start.
Numbers in test names are the rows of the fault matrix.
"""

import errno
import fcntl
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nemo_automodel.components.checkpoint import lock, publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.runs import make_state, read_json, train


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, at steps 1 and 2, and the losses of the two steps after each."""
    root = tmp_path_factory.mktemp("saved")
    state = make_state()
    checkpointer = Checkpointer(None, str(root))
    first = train(state, 1)
    checkpointer.save(state)
    first += train(state, 1)
    checkpointer.save(state)
    return root, first + train(state, 2)


@pytest.fixture
def root(saved, tmp_path):
    return Path(shutil.copytree(saved[0], tmp_path / "ckpt"))


def resumed_step(root, restore_from="latest"):
    state = make_state(seed=3)
    state.fingerprint = make_state().fingerprint
    restored = Checkpointer(None, str(root), restore_from=restore_from).restore(state)
    return state.schedule.step if restored else None, state


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * where)] ^= 0x10
    path.write_bytes(data)


FILES = [
    "model/config.json", "model/generation_config.json", "model/model.safetensors", "model/tokenizer.json",
    "model/chat_template.jinja", "model/README.md", "resume/state.json", "resume/rank_00000.json",
    "resume/rank_00000.safetensors", "resume/tensors/index.json", "resume/tensors/__0_0.safetensors", "manifest.json",
]  # fmt: skip


def damage_bit(path):
    flip(path)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_delete(path):
    path.unlink()


SAMPLE = ("model/config.json", "model/model.safetensors", "resume/tensors/index.json", "manifest.json")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        pytest.param(damage, name, marks=[] if damage is damage_bit or name in SAMPLE else pytest.mark.full)
        for damage in (damage_bit, damage_truncate, damage_delete)
        for name in FILES
    ],
)
def test_20_21_22_a_damaged_file_falls_back(name, damage, root, saved, caplog):
    assert (root / "epoch_0_step_2" / name).exists()
    damage(root / "epoch_0_step_2" / name)
    step, state = resumed_step(root)
    assert step == 1
    assert "epoch_0_step_2 is damaged" in caplog.text
    assert name in caplog.text
    assert train(state, 2) == saved[1][1:3]


def test_every_file_is_in_the_manifest(root):
    path = root / "epoch_0_step_2"
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(read_json(path / "manifest.json")["files"]) == files - {"manifest.json"}
    assert set(FILES) <= files


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": [], "sha256": "0"}', "\x00"])
def test_23_a_bad_manifest_falls_back(text, root):
    (root / "epoch_0_step_2/manifest.json").write_text(text)
    assert resumed_step(root)[0] == 1


def test_23_an_edited_manifest_falls_back(root):
    path = root / "epoch_0_step_2/manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert resumed_step(root)[0] == 1


@pytest.mark.parametrize("content", [None, "epoch_9_step_99\n", "../../etc\n", "", "epoch_0_step_1\n", b"\xff\xfe"])
def test_24_27_the_pointer_may_be_lost_or_wrong(content, root):
    (root / "LATEST").unlink()
    if content is not None:
        (root / "LATEST").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert resumed_step(root)[0] == 2
    assert (root / "LATEST").read_text() == "epoch_0_step_2\n"
    assert not any(path.is_symlink() for path in root.rglob("*"))


def test_24_a_looping_pointer(root):
    (root / "LATEST").unlink()
    (root / "LATEST").symlink_to("LATEST")
    assert resumed_step(root)[0] == 2


def test_25_all_damaged_is_an_error_never_fresh(root):
    for step in (1, 2):
        flip(root / f"epoch_0_step_{step}/model/model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged; not starting anew") as error:
        resumed_step(root)
    assert "epoch_0_step_1: model/model.safetensors does not match its checksum" in str(error.value)
    assert "epoch_0_step_2" in str(error.value)


def test_26_stale_temporaries_are_cleaned(root):
    shutil.copytree(root / "epoch_0_step_1", root / ".tmp-epoch_0_step_3")
    shutil.copytree(root / "epoch_0_step_1", root / ".trash-epoch_0_step_0")
    (root / ".tmp-LATEST").write_text("epoch")
    assert resumed_step(root)[0] == 2
    assert sorted(p.name for p in root.iterdir()) == [".lock", "LATEST", "epoch_0_step_1", "epoch_0_step_2"]


def test_7_killed_while_replacing_a_step_the_old_one_is_given_back(root):
    (root / "epoch_0_step_2").rename(root / ".old-epoch_0_step_2")  # the moment between the two renames
    shutil.copytree(root / ".old-epoch_0_step_2", root / ".tmp-epoch_0_step_2")
    assert resumed_step(root)[0] == 2


def test_7_saving_a_step_again_replaces_it(root):
    state = resumed_step(root)[1]
    before = read_json(root / "epoch_0_step_2/manifest.json")["sequence"]
    Checkpointer(None, str(root), keep_last=None).save(state)
    assert read_json(root / "epoch_0_step_2/manifest.json")["sequence"] == before + 1
    assert resumed_step(root)[0] == 2
    assert list(root.glob(".*")) == [root / ".lock"]


def test_28_order_does_not_come_from_the_clock(root):
    os.utime(root / "epoch_0_step_2", (0, 0))
    os.utime(root / "epoch_0_step_2/manifest.json", (0, 0))
    assert resumed_step(root)[0] == 2


def test_14_the_first_start_of_a_requeued_job_is_fresh_and_says_so(tmp_path, caplog):
    assert resumed_step(tmp_path / "new")[0] is None
    assert "no checkpoint in" in caplog.text
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]


def test_what_was_asked_for_by_name_must_be_there_and_sound(root):
    assert resumed_step(root, "epoch_0_step_1")[0] == 1
    assert resumed_step(root, str(root / "epoch_0_step_1"))[0] == 1
    assert resumed_step(root, str(root / "epoch_0_step_1/model"))[0] == 1
    for asked in ("best", "epoch_0_step_7", str(root / "nowhere")):
        with pytest.raises(CheckpointError, match=r"nothing to restore there; .* has epoch_0_step_2, epoch_0_step_1"):
            resumed_step(root, asked)
    flip(root / "epoch_0_step_1/resume/state.json")
    with pytest.raises(CheckpointError, match=r"damaged: resume/state.json .* has epoch_0_step_2"):
        resumed_step(root, "epoch_0_step_1")


def test_25_the_pointer_names_what_was_fallen_back_to(root):
    flip(root / "epoch_0_step_2/model/model.safetensors")
    assert resumed_step(root)[0] == 1
    assert (root / "LATEST").read_text() == "epoch_0_step_1\n"


def test_what_was_asked_for_by_name_does_not_become_the_latest(root):
    assert resumed_step(root, "epoch_0_step_1")[0] == 1
    assert (root / "LATEST").read_text() == "epoch_0_step_2\n"


def test_a_fresh_start_keeps_an_earlier_runs_checkpoints_of_the_same_name(root, caplog):
    earlier = {step: read_json(root / f"epoch_0_step_{step}/manifest.json") for step in (1, 2)}
    (root / "BEST").write_text("epoch_0_step_1\n")
    state = make_state(seed=8)
    checkpointer = Checkpointer(None, str(root), keep_last=1)
    assert checkpointer.restore(state) is False
    assert "2 checkpoint(s) of an earlier run" in caplog.text
    for _ in range(4):
        train(state, 1)
        checkpointer.save(state)
    kept = {step: next(root.glob(f"epoch_0_step_{step}.*")) for step in (1, 2)}
    names = {p.name for p in root.iterdir()}
    assert names == {".lock", "LATEST", "epoch_0_step_4", *(path.name for path in kept.values())}
    for step, path in kept.items():
        assert publish.damage(path, Ranks(None)) == []
        assert read_json(path / "manifest.json") == earlier[step]
        assert resumed_step(root, str(path))[0] == step
    flip(root / "epoch_0_step_4/model/model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged"):  # those kept are not this run's
        resumed_step(root)


def test_two_earlier_runs_of_the_same_name_are_both_kept(root):
    for seed in (8, 9):
        state = make_state(seed=seed)
        train(state, 1)
        checkpointer = Checkpointer(None, str(root))
        checkpointer.restore(state)
        for _ in range(2):  # the second time it is the run's own, and replaced
            checkpointer.save(state)
        stamp = root / "epoch_0_step_1/manifest.json"
        os.utime(stamp, (10**9, 10**9))
    os.utime(next(root.glob("epoch_0_step_1.*")) / "manifest.json", (10**9, 10**9))
    Checkpointer(None, str(root)).save(state)
    assert len(list(root.glob("epoch_0_step_1.*"))) == 3
    assert list(root.glob(".*")) == [root / ".lock"]


def test_killed_while_keeping_an_earlier_runs_both_are_whole(root, monkeypatch):
    """Killed between the two renames: the earlier run's is aside, the new one unpublished, no pointer names either."""
    state = make_state()
    train(state, 2)

    def killed(path):
        raise KeyboardInterrupt

    original = publish.keep_aside
    monkeypatch.setattr(publish, "keep_aside", lambda path: killed(original(path)))
    with pytest.raises(KeyboardInterrupt):
        Checkpointer(None, str(root)).save(state)
    kept = next(root.glob("epoch_0_step_2.*"))
    assert publish.damage(kept, Ranks(None)) == []
    assert not (root / "epoch_0_step_2").exists()
    assert publish.read_pointer(root, "LATEST") is None
    assert resumed_step(root)[0] == 1
    assert resumed_step(root, str(kept))[0] == 2
    assert list(root.glob(".*")) == [root / ".lock"]


def test_an_older_run_with_more_steps_does_not_win(root, tmp_path):
    state = make_state()
    train(state, 1)
    checkpointer = Checkpointer(None, str(root), keep_last=None)
    checkpointer.restore(state)
    checkpointer.save(state)  # step 1 again; the other run's step 2 is still there
    assert resumed_step(root)[0] == 1


def test_retention_keeps_latest_best_and_the_last(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path), keep_last=2)
    checkpointer.restore(state)
    for loss in (3.0, 1.0, 2.0, float("nan"), 1.0, 4.0):
        train(state, 1)
        checkpointer.offer_best(loss)
        checkpointer.save(state)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "BEST",
        "LATEST",
        "epoch_0_step_2",
        "epoch_0_step_5",
        "epoch_0_step_6",
    ]
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"
    assert resumed_step(tmp_path, "best")[0] == 2
    # what was best is remembered across a resume
    state = make_state(seed=3)
    state.fingerprint = make_state().fingerprint
    again = Checkpointer(None, str(tmp_path), restore_from="latest", keep_last=1)
    again.restore(state)
    train(state, 1)
    again.offer_best(1.5)
    again.save(state)
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"
    assert sorted(p.name for p in tmp_path.glob("epoch*")) == ["epoch_0_step_2", "epoch_0_step_7"]
    train(state, 1)
    again.offer_best(0.5)
    again.save(state)
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_8\n"


def test_a_validation_of_another_step_does_not_make_the_best(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    train(state, 1)
    checkpointer.offer_best(1.0)
    train(state, 1)
    checkpointer.save(state)
    assert not (tmp_path / "BEST").exists()


def names(root):
    return sorted(path.name for path in root.glob("epoch*"))


def test_a_step_that_is_validated_after_its_save_is_the_best(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path), keep_last=1)
    checkpointer.restore(state)
    for loss, best, kept in ((3.0, 1, [1]), (1.0, 2, [2]), (2.0, 2, [2, 3]), (float("nan"), 2, [2, 4]), (0.5, 5, [5])):
        train(state, 1)
        checkpointer.save(state)
        checkpointer.offer_best(loss)
        assert (tmp_path / "BEST").read_text() == f"epoch_0_step_{best}\n"
        assert names(tmp_path) == [f"epoch_0_step_{step}" for step in kept]
    assert publish.damage(tmp_path / "epoch_0_step_5", Ranks(None)) == []
    assert resumed_step(tmp_path, "best")[0] == 5
    # what was best is remembered across a resume, whichever checkpoint knows it
    for loss, best in ((0.7, 5), (0.4, 7)):
        checkpointer = Checkpointer(None, str(tmp_path), restore_from="latest", keep_last=1)
        state = make_state(seed=3)
        state.fingerprint = make_state().fingerprint
        checkpointer.restore(state)
        train(state, 1)
        checkpointer.save(state)
        checkpointer.offer_best(loss)
        assert (tmp_path / "BEST").read_text() == f"epoch_0_step_{best}\n"


def test_a_kill_between_a_save_and_the_end_of_its_validation_leaves_the_best_before(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    for loss in (2.0, 1.0, None):
        train(state, 1)
        checkpointer.save(state)
        if loss is not None:
            checkpointer.offer_best(loss)
    (tmp_path / "BEST").write_text("epoch_0_step_1\n")  # killed before the pointer, after the loss
    assert resumed_step(tmp_path)[0] == 3
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"


def test_going_back_forgets_a_best_that_comes_later(tmp_path):
    """Its checkpoint will be written anew, by weights of another loss."""
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path), keep_last=None)
    checkpointer.restore(state)
    for loss in (3.0, 2.0, 1.0):
        train(state, 1)
        checkpointer.save(state)
        checkpointer.offer_best(loss)
    again, state = Checkpointer(None, str(tmp_path), restore_from="epoch_0_step_2"), make_state()
    again.restore(state)
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"
    train(state, 1)
    again.save(state)
    again.offer_best(2.5)
    assert (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"
    assert not (tmp_path / "epoch_0_step_3" / "val_loss.json").exists()


def test_a_best_that_cannot_be_written_is_an_error(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    train(state, 1)
    checkpointer.save(state)
    (tmp_path / "BEST").mkdir()
    with pytest.raises(CheckpointError, match=r"Making epoch_0_step_1 the best failed.*BEST"):
        checkpointer.offer_best(1.0)


def test_a_run_that_saved_nothing_does_not_name_what_an_earlier_one_saved(root, capsys):
    state = make_state()
    checkpointer = Checkpointer(None, str(root))
    checkpointer.restore(state)
    assert checkpointer.finish(state) is None
    assert capsys.readouterr().out == "stopped at step 0 of 100; nothing was saved\n"


def test_a_run_that_went_back_names_the_checkpoint_it_stands_at(root, capsys):
    earlier = names(root)[0]
    checkpointer, state = Checkpointer(None, str(root), restore_from=earlier), make_state()
    checkpointer.restore(state)
    assert checkpointer.finish(state) == root / earlier
    out = capsys.readouterr().out
    assert (
        f"saved in {root / earlier}\nto go on, run the same command with --checkpoint.restore_from={earlier}\n" in out
    )


def test_5_a_kill_before_the_pointers_is_repaired(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    for loss in (2.0, 1.0):
        train(state, 1)
        checkpointer.offer_best(loss)
        checkpointer.save(state)
    for pointer in ("LATEST", "BEST"):
        (tmp_path / pointer).write_text("epoch_0_step_1\n")
    assert resumed_step(tmp_path)[0] == 2
    assert (tmp_path / "LATEST").read_text() == (tmp_path / "BEST").read_text() == "epoch_0_step_2\n"


def test_finish_saves_the_last_step_once(tmp_path, capsys):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    train(state, 2)
    checkpointer.finish(state)
    assert f"vllm serve {tmp_path / 'epoch_0_step_2/model'}" in capsys.readouterr().out
    stamp = (tmp_path / "epoch_0_step_2/manifest.json").stat().st_mtime_ns
    checkpointer.finish(state)
    _, resumed = resumed_step(tmp_path)
    Checkpointer(None, str(tmp_path)).finish(make_state())  # nothing was trained
    again = Checkpointer(None, str(tmp_path), restore_from="latest")
    again.restore(resumed)
    again.finish(resumed)
    assert (tmp_path / "epoch_0_step_2/manifest.json").stat().st_mtime_ns == stamp


def test_off_saves_nothing(tmp_path):
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path / "out"), enabled=False)
    assert checkpointer.restore(state) is False
    assert checkpointer.save(state) is None
    checkpointer.finish(state)
    assert not (tmp_path / "out").exists()


# --- a disk that refuses ----------------------------------------------------------------------------------------------

SAVED_ONCE = """
import os, resource, signal, sys, time
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.errors import CheckpointError
from tests.unit.checkpoint.runs import make_state, train
state = make_state()
checkpointer = Checkpointer(None, sys.argv[1])
checkpointer.restore(state)
train(state, 1)
checkpointer.save(state)
"""

FULL = f"""{SAVED_ONCE}
train(state, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit fail with EFBIG, as ENOSPC on a full disk
for limit in (2_000, 60_000):  # almost every file; only the tensors
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpointer.save(state)
    except CheckpointError as error:
        print(error)
"""


def test_16_a_write_that_fails_leaves_the_old_intact(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("checkpoint epoch_0_step_2 was not saved; those saved before are intact") == 2, done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "LATEST", "epoch_0_step_1"]
    assert publish.damage(tmp_path / "epoch_0_step_1", Ranks(None)) == []


def test_18_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint_dir=.*file is a file"):
        Checkpointer(None, str(tmp_path / "file" / "checkpoints"))
    with pytest.raises(ConfigError, match="is not writable"):
        Checkpointer(None, "/proc/checkpoints")


def test_18_a_directory_that_vanishes_is_an_error_with_its_path(tmp_path):
    root = tmp_path / "ckpt"
    state = make_state()
    checkpointer = Checkpointer(None, str(root))
    root.write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"Creating .*ckpt/epoch_0_step_0 failed: .*ckpt: File exists"):
        checkpointer.save(state)


def test_messages_name_the_bad_option():
    with pytest.raises(ConfigError, match=r"checkpoint.keep_last=0: at least one"):
        Checkpointer(None, keep_last=0)


@pytest.fixture(autouse=True)
def _info(caplog):
    caplog.set_level(logging.INFO)


HOLDS = f"""{SAVED_ONCE}
if os.fork() == 0:  # a data worker that outlives its run
    time.sleep(60)
    os._exit(0)
print("saved", flush=True)
if "finish" in sys.argv:
    checkpointer.finish(state)
time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path):
    """Starts a run in a process of its own, which stays after its first save; its worker too."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLDS, str(tmp_path), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert "saved\n" in iter(process.stdout.readline, "")
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_is_gone(tmp_path, other_run, monkeypatch):
    other = other_run()
    unpublished = tmp_path / ".tmp-epoch_0_step_2"
    unpublished.mkdir()
    monkeypatch.setattr(lock, "_WAIT_S", 0.5)
    state = make_state()
    names_it = rf"another run is saving in .* \(pid {other.pid} on .*\); write another checkpoint\.checkpoint_dir"
    for attempt in (lambda c: c.restore(state), lambda c: c.save(state)):
        with pytest.raises(ConfigError, match=names_it):
            attempt(Checkpointer(None, str(tmp_path), restore_from="latest"))
    assert unpublished.is_dir()
    monkeypatch.setattr(lock, "_WAIT_S", 30.0)
    killer = threading.Timer(1.0, other.kill)  # while the second waits, as a requeued job does
    killer.start()
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(state)
    killer.join()
    assert not unpublished.exists()


def test_a_run_that_saves_nothing_is_refused_there_too(tmp_path, other_run, monkeypatch):
    other_run()
    monkeypatch.setattr(lock, "_WAIT_S", 0.5)
    with pytest.raises(ConfigError, match="another run is saving in"):
        Checkpointer(None, str(tmp_path), enabled=False).restore(make_state())


def test_a_run_that_has_finished_lets_the_next_one_save(tmp_path, other_run, monkeypatch):
    other = other_run("finish")
    monkeypatch.setattr(lock, "_WAIT_S", 40.0)  # on a slow machine the end takes its time
    state = make_state()
    assert Checkpointer(None, str(tmp_path), restore_from="latest").restore(state)
    assert other.poll() is None


def test_a_process_may_start_its_next_run_before_the_last_one_is_forgotten(tmp_path):
    first, second = Checkpointer(None, str(tmp_path)), Checkpointer(None, str(tmp_path))
    state = make_state()
    first.restore(state)
    second.restore(state)
    held = list(lock._here.values())
    first.finish(state)
    assert list(lock._here.values()) == held
    del held, second
    gc.collect()
    assert tmp_path.resolve() / ".lock" not in lock._here


@pytest.mark.parametrize("failing", ["flock", "open"])
def test_without_locks_the_run_says_so_once_and_goes_on(tmp_path, failing, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if failing == "flock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    else:
        (tmp_path / ".lock").mkdir()
    caplog.set_level(logging.INFO)
    state = make_state()
    checkpointer = Checkpointer(None, str(tmp_path))
    checkpointer.restore(state)
    train(state, 1)
    assert checkpointer.save(state).is_dir()
    assert caplog.text.count("cannot be locked") == 1
