"""``exit_status.json`` where two runs meet in one directory (single runs and ranks: tests/ranks/test_faults.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.components.checkpoint.checkpointer import Checkpointer
from nemo_automodel.errors import ConfigError, DirectoryInUseError
from nemo_automodel.recipes.ending import run_to_end
from tests.unit.checkpoint.runs import make_state

OTHER = """
import sys
from types import SimpleNamespace
from nemo_automodel.errors import ConfigError
from nemo_automodel.recipes.ending import run_to_end
def main(cfg):
    raise ConfigError("a mistake")
run_to_end(main, SimpleNamespace(checkpoint=SimpleNamespace(checkpoint_dir=sys.argv[1])))
"""


@pytest.fixture
def cfg(tmp_path):
    return SimpleNamespace(checkpoint=SimpleNamespace(checkpoint_dir=str(tmp_path)))


def read(directory):
    return json.loads((directory / "exit_status.json").read_text())


def test_a_run_that_is_refused_writes_nothing(cfg, tmp_path):
    def refused(_):
        (tmp_path / "exit_status.json").write_text("the other run's, which has just ended")
        raise DirectoryInUseError("another run is saving there")

    with pytest.raises(DirectoryInUseError):
        run_to_end(refused, cfg)
    assert (tmp_path / "exit_status.json").read_text() == "the other run's, which has just ended"
    assert [file.name for file in tmp_path.iterdir()] == ["exit_status.json"]


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_run_ends_as_itself_though_another_one_failed_there_meanwhile(cfg, tmp_path, ends):
    def main(_):
        other = subprocess.run([sys.executable, "-c", OTHER, str(tmp_path)], capture_output=True)
        assert other.returncode != 0
        assert read(tmp_path)["reason"] == "bad_input"
        if ends == "badly":
            raise RuntimeError("my own")

    if ends == "badly":
        with pytest.raises(RuntimeError):
            run_to_end(main, cfg)
        assert (read(tmp_path)["exit_code"], read(tmp_path)["message"]) == (1, "RuntimeError: my own")
    else:
        assert run_to_end(main, cfg) == 0
        assert (read(tmp_path)["exit_code"], read(tmp_path)["reason"]) == (0, "done")


def test_of_two_ranks_of_a_run_the_first_to_fail_is_right(cfg, tmp_path, monkeypatch):
    from nemo_automodel.recipes import ending

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    first, second = (ending._describe(ConfigError(text), rank, False) for rank, text in enumerate(("a", "b")))
    assert ending._write(tmp_path, first)
    assert not ending._write(tmp_path, second)
    assert read(tmp_path)["message"] == "a"
    monkeypatch.setenv("MASTER_PORT", "29501")  # another run's ranks
    assert ending._write(tmp_path, second)
    assert read(tmp_path)["message"] == "b"


@pytest.mark.parametrize("disk", ["sound", "full"])
def test_an_error_waits_for_the_checkpoint_that_is_being_written(cfg, tmp_path, monkeypatch, capsys, disk):
    seal = publish.seal

    def slow(*args):
        time.sleep(1.0)
        if disk == "full":
            raise OSError(28, "No space left on device")
        seal(*args)

    monkeypatch.setattr(publish, "seal", slow)

    def main(_):
        Checkpointer(None, str(tmp_path), async_save=True).save(make_state())
        raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        run_to_end(main, cfg)
    saved = publish.find_checkpoints(tmp_path)
    assert len(saved) == (disk == "sound")
    assert ("it was not: " in capsys.readouterr().err) == (disk == "full")
    assert read(tmp_path)["message"] == "RuntimeError: elsewhere"
