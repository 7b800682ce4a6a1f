"""What a run prints: the package's messages once each, on rank 0, and no library's progress bar."""

import logging

from nemo_automodel.errors import DataError
from nemo_automodel.recipes.run import run_recipe
from tests.recipes.workspace import make_workspace


def test_a_run_prints_its_messages_once_no_bar_and_no_secret(tmp_path):
    workspace = make_workspace(tmp_path, rows=19, sections={"peft": {"match_all_linear": True}})
    secret = {"HF_TOKEN": "hf_verysecret"}
    fresh = workspace.spawn(
        "--step_scheduler.max_steps=2", "--loggers.progress=null", "--model.token=${HF_TOKEN}", env=secret
    )
    state = (tmp_path / "out/epoch_0_step_2/resume/state.json").read_text()
    assert "${HF_TOKEN}" in state
    assert "hf_verysecret" not in state
    lines = fresh.stderr.splitlines()
    assert [line for line in lines if "drop_last" in line] == [
        "drop_last: 3 of 19 rows of an epoch do not fill a step and are left out"
    ]
    assert len([line for line in lines if "19 of 19 rows" in line]) == 1
    assert len([line for line in lines if line.startswith("LoRA: r=8")]) == 1
    assert "it/s]" not in fresh.stderr + fresh.stdout
    assert "\r" not in fresh.stderr + fresh.stdout
    resumed = workspace.spawn(
        "--step_scheduler.max_steps=2", "--checkpoint.restore_from=latest", "--model.token=${HF_TOKEN}", env=secret
    )
    assert [line for line in resumed.stderr.splitlines() if line.startswith("Resumed from ")]


def test_other_ranks_say_nothing_but_errors(tmp_path, capsys, monkeypatch):
    workspace = make_workspace(tmp_path)
    monkeypatch.setenv("RANK", "1")

    def speaks(cfg):
        logging.getLogger("nemo_automodel.part").warning("as rank 0 says")
        logging.getLogger("nemo_automodel.part").error("rank 1 alone")

    capsys.readouterr()
    assert run_recipe("llm", ["-c", str(workspace.recipe)], main=speaks) == 0
    assert capsys.readouterr().err == "error: rank 1 alone\n"


def test_the_packages_logger_is_left_as_it_was(tmp_path, capsys, caplog):
    workspace = make_workspace(tmp_path)
    ours, root = logging.getLogger("nemo_automodel"), logging.getLogger()
    before = (ours.level, ours.propagate, list(ours.handlers), root.level, list(root.handlers))

    def speaks(cfg):
        logging.getLogger("nemo_automodel.part").warning("look at %s", "this")
        logging.getLogger("nemo_automodel.part").info("by the way")
        logging.getLogger("nemo_automodel.part").debug("unseen")
        raise DataError("no rows")

    capsys.readouterr()
    assert run_recipe("llm", ["-c", str(workspace.recipe)], main=speaks) == 2
    assert capsys.readouterr().err == "warning: look at this\nby the way\nerror: no rows\n"
    assert before == (ours.level, ours.propagate, list(ours.handlers), root.level, list(root.handlers))
    assert not caplog.records
