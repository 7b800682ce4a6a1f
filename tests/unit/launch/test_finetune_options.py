"""``automodel finetune``: how many processes, mistakes in saying so, and the exit code that a run has written down."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from nemo_automodel.cli.app import main
from nemo_automodel.cli.exit_status import ExitStatus
from nemo_automodel.cli.network import can_listen, interface_of, local_address
from nemo_automodel.recipes.run import run_recipe
from tests.unit.config.mutations import FULL

MISTAKES = {
    "none at all": (["--nproc-per-node", "0"], {}, "--nproc-per-node 0: not a number of 1 or more"),
    "no number": (["--nproc-per-node", "gpu"], {}, "--nproc-per-node gpu: not a number"),
    "no value": (["--nproc-per-node"], {}, "--nproc-per-node: no value; write --nproc-per-node 8"),
    "misspelt": (["--nproc-per-nod", "2"], {}, "did you mean `--nproc-per-node`?"),
    "twice": (["--nproc-per-node=2", "--nproc-per-node=3"], {}, "given more than once"),
    "where to meet": (["--nnodes", "2"], {}, "write --rdzv-endpoint HOST:PORT"),
    "no port": (["--nnodes", "2", "--rdzv-endpoint", "node1"], {}, "--rdzv-endpoint node1: not an address and a port"),
    "how many": (["--rdzv-endpoint", "node1:1"], {}, "write how many: --nnodes 2"),
    "id alone": (["--rdzv-id", "x"], {}, "--rdzv-id: is for several machines"),
    "in torchrun": (["--nproc-per-node", "2"], {"RANK": "0", "LOCAL_RANK": "0"}, "torchrun has started already"),
    "in a pod without a master": ([], {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "r.yaml").write_text(FULL)
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message_and_exit_code_2(case, recipe, capsys, monkeypatch):
    arguments, environ, says = MISTAKES[case]
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["finetune", "llm", "-c", recipe, *arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("error:") == 1


def test_a_script_says_how_it_is_started_on_several_ranks(recipe, capsys):
    assert run_recipe("llm", ["-c", recipe, "--nproc-per-node=2"], main=lambda cfg: None) == 2
    assert "start a script as torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["finetune", "--help"], ["finetune", "llm", "--help"]])
def test_help_shows_the_options(arguments, capsys, recipe):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--nproc-per-node N", "--nnodes M", "--rdzv-endpoint", "--rdzv-id"))


def test_help_without_a_kind_of_model_says_which_there_are(capsys, recipe):
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: automodel finetune {llm,vlm} -c" in shown
    assert "for vlm see automodel finetune vlm --help" in shown
    assert main(["finetune", "vlm", "--help"]) == 0
    assert "usage: automodel finetune vlm -c" in capsys.readouterr().out


def test_a_typo_is_found_before_any_process_is_started_or_torch_imported(recipe, tmp_path):
    script = (
        "import sys, time; start = time.monotonic()\n"
        "from nemo_automodel.cli.app import main\n"
        f"code = main(['finetune', 'llm', '-c', {recipe!r}, '--nproc-per-node', '2', '--optimizer.lrr=1'])\n"
        "print(code, 'torch' in sys.modules, time.monotonic() - start)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd())
    code, torch_imported, seconds = result.stdout.split()
    assert (code, torch_imported) == ("2", "False")
    assert "did you mean `lr`" in result.stderr
    assert float(seconds) < 1 or os.getloadavg()[0] > os.cpu_count()


def test_an_old_exit_status_is_not_taken_for_the_new_one(tmp_path):
    path = tmp_path / "exit_status.json"
    assert ExitStatus(None).read() is None
    assert ExitStatus(tmp_path / "absent").read() is None
    written = {"exit_code": 75, "reason": "preempted", "step": 3, "rank": None, "message": None, "time": time.time()}
    path.write_text(json.dumps(written))
    status = ExitStatus(tmp_path)
    assert status.read() is None, "it was there before the run"
    path.write_text('{"exit_code": 7')
    assert status.read() is None, "half written"
    path.write_text('{"reason": "no code"}')
    assert status.read() is None
    path.write_text(json.dumps(written | {"exit_code": 2}))
    assert status.read()["exit_code"] == 2


def test_addresses_and_interfaces():
    loopback = "lo" if sys.platform == "linux" else "lo0"
    assert interface_of("127.0.0.1") == loopback
    assert interface_of("192.0.2.1") is None  # of nobody
    assert local_address("127.0.0.1", 1) is None, "no other machine could use it"
    assert not can_listen("192.0.2.1", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not can_listen("127.0.0.1", taken.getsockname()[1])
    assert can_listen("localhost", 0)


def test_the_exit_status_of_a_run_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    status = ExitStatus("~/out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exit_status.json").write_text('{"exit_code": 75}')
    assert status.read() == {"exit_code": 75}
