"""A real Slurm runs what ``automodel launch slurm`` writes: two nodes of this machine, one gloo rank on each.

Claims: (1) the job trains as one process does, its output is followed and its exit code carried; (2) so is the code of a
mistake; (3) told to make room, it saves, ends with 75, is requeued and goes on to the same losses; (4) cancelled, it is
not requeued; (5) ``srun`` with a task for each rank needs no torchrun.
"""

import subprocess
import time

import pytest

from tests.recipes.slurm_cluster import Cluster, install
from tests.recipes.workspace import make_workspace

ARGS = ["--step_scheduler.local_batch_size=2", "--rng.seed=3"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := install():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


def launch(cluster, workspace, *arguments):
    """Submit the workspace's recipe and follow it; returns the finished process."""
    command = workspace.command(*ARGS, *arguments)
    command[command.index("finetune") : command.index("-c")] = ["launch", "slurm", "--nodes=2", "--gpus-per-node=0"]
    return subprocess.Popen([*command, "--follow", "--job-name=job"], cwd=workspace.path, env=cluster.environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process, seconds=240):
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def job_number(workspace, deadline=60):
    end = time.monotonic() + deadline
    while not (logs := list(workspace.path.glob("job-*.log"))):
        assert time.monotonic() < end, "the job did not start"
        time.sleep(0.1)
    return logs[0].stem.split("-")[1]


def wait_for_steps(workspace, steps, seconds=120):
    path, end = workspace.path / "out/metrics.jsonl", time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < steps:
        logs = [log.read_text()[-3000:] for log in workspace.path.glob("job-*.log")]
        assert time.monotonic() < end, logs
        time.sleep(0.05)


def losses(workspace, out="out"):
    return [line["loss"] for line in workspace.metrics(out)]


def test_two_nodes_train_as_one_process(cluster, workspace):
    workspace.run(*ARGS, out="one")
    code, stdout, stderr = finish(launch(cluster, workspace))
    assert code == 0, stdout + stderr
    assert losses(workspace) == pytest.approx(losses(workspace, "one"), rel=1e-5)
    assert "48 of 48 rows" in stdout, "the job's own output"
    assert cluster.job(job_number(workspace))["NodeList"] == "n[1-2]"


@pytest.mark.full
def test_the_code_of_a_mistake_is_carried(cluster, workspace):
    code, stdout, stderr = finish(launch(cluster, workspace, "--model.pretrained_model_name_or_path=./absent"))
    assert code == 2, stdout + stderr
    job = cluster.job(job_number(workspace))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")


def test_told_to_make_room_it_saves_and_goes_on_after_the_requeue(cluster, workspace):
    args = ["--step_scheduler.max_steps=60", "--step_scheduler.ckpt_every_steps=1000"]
    workspace.run(*ARGS, *args, out="one")
    process = launch(cluster, workspace, *args)
    wait_for_steps(workspace, 5)
    number = job_number(workspace)
    cluster.run("scancel", "--batch", "--signal=USR1", number)  # what --signal=B:USR1 does before the time limit
    end = time.monotonic() + 60
    while cluster.job(number)["Restarts"] != "1":
        assert time.monotonic() < end, cluster.job(number)
        time.sleep(0.2)
    # Slurm would wait for two minutes; in the second of its end the nodes would still refuse the job
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")
    code, stdout, stderr = finish(process)
    assert code == 0, stdout + stderr
    assert cluster.job(number)["Restarts"] == "1"
    assert "requeued" in stdout
    assert "fresh start" in stdout.split("requeued")[0]
    assert "fresh start" not in stdout.split("requeued")[1], "it goes on"
    assert losses(workspace) == pytest.approx(losses(workspace, "one"), rel=1e-5)
    assert [line["step"] for line in workspace.metrics()] == list(range(1, 61))


@pytest.mark.full
def test_cancelled_it_stays_away(cluster, workspace):
    process = launch(cluster, workspace, "--step_scheduler.max_steps=100000")
    wait_for_steps(workspace, 3)
    number = job_number(workspace)
    cluster.run("scancel", number)
    code, stdout, stderr = finish(process)
    assert code != 0
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), stdout + stderr
    assert (workspace.path / "out/LATEST").is_file(), "but it has saved"


@pytest.mark.full
def test_srun_with_a_task_for_each_rank(cluster, workspace):
    workspace.run(*ARGS, out="one")
    tasks = ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    command = workspace.command(*ARGS, "--step_scheduler.local_batch_size=1", "--dist_env.device=cpu")
    environment = {**cluster.environment, "MASTER_ADDR": "127.0.0.1"}  # no name server knows n1
    process = subprocess.Popen([*tasks, *command], cwd=workspace.path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    code, stdout, stderr = finish(process)
    assert code == 0, stdout + stderr
    assert losses(workspace) == pytest.approx(losses(workspace, "one"), rel=1e-5)
