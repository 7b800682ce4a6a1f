"""What the environment of torchrun, srun, a PyTorchJob and an Indexed Job is read as, and what is set for torch."""

import pytest

from nemo_automodel.components.distributed.placement import adopt_slurm, find_nodes, first_host, started_as_rank
from nemo_automodel.errors import ConfigError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {  # what `srun --nodes 2 --ntasks-per-node 4` showed its task 6
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
SRUN_A_TASK_A_NODE = {**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
BATCH = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
PYTORCH_JOB = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2"}


@pytest.mark.parametrize(
    ("environ", "starter"),
    [
        ({}, None),
        (TORCHRUN, "torchrun"),
        (SRUN, "srun"),
        (SRUN_A_TASK_A_NODE, None),
        (BATCH, None),
        (PYTORCH_JOB, None),
    ],
)
def test_who_started_this_process_as_a_rank(environ, starter):
    assert started_as_rank(environ) == starter


def test_srun_tasks_get_the_variables_of_torchrun():
    environ = dict(SRUN)
    adopt_slurm(environ)
    assert {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "6",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
    }
    assert environ["MASTER_PORT"] == str(20000 + 70 * 7 + 2)


@pytest.mark.parametrize("environ", [{}, BATCH, TORCHRUN, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_nothing_is_set_elsewhere(environ):
    after = dict(environ)
    adopt_slurm(after)
    assert after == environ


def test_nodes_of_srun_with_a_task_on_each():
    nodes = find_nodes(SRUN_A_TASK_A_NODE)
    assert (nodes.count, nodes.endpoint, nodes.is_host) == (2, "gpu07:20492", False)
    again = find_nodes({**SRUN_A_TASK_A_NODE, "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "1"})
    assert again.is_host
    assert again.run_id != nodes.run_id, "a requeued job must not meet what is left of its first start"


def test_nodes_of_kubernetes():
    nodes = find_nodes(PYTORCH_JOB)
    assert (nodes.count, nodes.endpoint, nodes.is_host) == (4, "job-master-0:23456", False)
    # newer operators count processes in WORLD_SIZE and nodes in PET_NNODES
    nodes = find_nodes({**PYTORCH_JOB, "WORLD_SIZE": "32", "PET_NNODES": "4", "PET_NODE_RANK": "0"})
    assert (nodes.count, nodes.is_host) == (4, True)
    nodes = find_nodes({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "run-0.run"})
    assert (nodes.count, nodes.endpoint, nodes.is_host) == (2, "run-0.run:29400", False)


@pytest.mark.parametrize("environ", [{}, TORCHRUN, SRUN, BATCH, {"JOB_COMPLETION_INDEX": "0"}, {"WORLD_SIZE": "1"}])
def test_no_other_nodes(environ):
    assert find_nodes(environ) is None


def test_an_environment_that_makes_no_sense_is_named():
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        find_nodes({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE=many is not a number"):
        find_nodes({**PYTORCH_JOB, "WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[03-07,9],login", "gpu03"),
        ("login,gpu[03-07]", "login"),
        ("r[1-2]n[04,06]", "r1n04"),
        ("a-b.c[10]", "a-b.c10"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
