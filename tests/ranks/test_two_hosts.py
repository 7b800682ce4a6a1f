"""Two hosts, each a network namespace of its own joined to the other by a pair of virtual interfaces, train as one does.

Claims: (1) ``automodel finetune --nnodes 2`` on each of them meets the other over c10d rendezvous at the first one's
address, and two processes on each train to one process's losses; (2) nothing goes over the loopback or a name server:
gloo's interface and the hosts' addresses are found; (3) both commands end with the run's exit code, a mistake's too.
"""

import contextlib
import os
import subprocess
import uuid

import pytest

from tests.recipes.workspace import make_workspace

ARGS = [
    "--step_scheduler.local_batch_size=2",
    "--dist_env.device=cpu",
    "--nproc-per-node=2",
    "--nnodes=2",
    "--rdzv-endpoint=10.77.0.1:29411",
]


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def hosts():
    """The names of two namespaces: 10.77.0.1 and 10.77.0.2, each with its loopback."""
    tag = uuid.uuid4().hex[:6]
    names = [f"am{tag}a", f"am{tag}b"]
    try:
        made = ip("netns", "add", names[0], check=False)
    except FileNotFoundError:
        pytest.skip("`ip` is not installed")
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", f"v{tag}a", "netns", names[0], "type", "veth", "peer", "name", f"v{tag}b", "netns", names[1])
        for name, end, address in zip(names, "ab", ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"v{tag}{end}")
            ip("-n", name, "link", "set", f"v{tag}{end}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def run_on(hosts, workspace, *arguments):
    """Give the command on both hosts; returns what each ended with: (code, stdout, stderr)."""
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    command = workspace.command(*ARGS, *arguments)
    processes = [
        subprocess.Popen(["ip", "netns", "exec", host, *command], cwd=workspace.path, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for host in hosts
    ]  # fmt: skip
    try:
        return [(process, *process.communicate(timeout=200)) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def test_two_hosts_train_as_one_process(hosts, tmp_path):
    workspace = make_workspace(tmp_path)
    one = workspace.run("--step_scheduler.local_batch_size=2", out="one")
    ended = run_on(hosts, workspace)
    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    assert [line["loss"] for line in workspace.metrics()] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert [line["num_label_tokens"] for line in workspace.metrics()] == [line["num_label_tokens"] for line in one]


@pytest.mark.full
def test_both_hosts_end_with_the_code_of_a_mistake(hosts, tmp_path):
    workspace = make_workspace(tmp_path)
    ended = run_on(hosts, workspace, "--dataset.column_mapping={question: quest, answer: answer}")
    assert [process.returncode for process, _, _ in ended] == [2, 2], ended
    assert sum(stderr.count("no column 'quest'") for _, _, stderr in ended) == 1
