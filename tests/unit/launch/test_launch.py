"""``automodel launch``: what it writes for Slurm, Kubernetes and SkyPilot, what it refuses, and what it hands to a client."""

import os
import shutil
import stat
import subprocess

import pytest
import yaml

from nemo_automodel.cli.app import main
from tests.unit.config.mutations import FULL

K8S = ["--image", "registry/automodel:1", "--claim", "shared:/data", "--checkpoint.checkpoint_dir", "/data/run"]
SKY = ["--accelerator", "H100", "--setup", "pip install ."]
SIZE = ["--nodes", "2", "--gpus-per-node", "4"]


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Recipe.yaml").write_text(FULL)
    return tmp_path / "My Recipe.yaml"


def write(kind, *arguments):
    """The text that is written."""
    assert main(["launch", kind, "-c", "My Recipe.yaml", *SIZE, *arguments, "--output", "job", "--dry-run"]) == 0
    with open("job") as file:
        return file.read()


def test_slurm_script(recipe, tmp_path):
    text = write("slurm", "--time", "08:00:00", "--partition=gpu", "--sbatch", "constraint=h100 mem=0",
                 "--optimizer.lr", "3e-4", "--rng.seed=7")  # fmt: skip
    subprocess.run(["bash", "-n", "job"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "job"], check=True)
    directives = [line.split("#")[1].split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    expected = ["--job-name=my-recipe", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--gpus-per-node=4"]
    expected += [
        "--partition=gpu",
        "--time=08:00:00",
        f"--chdir={tmp_path}",
        "--output=%x-%j.log",
        "--open-mode=append",
    ]
    assert directives == [*expected, "--requeue", "--signal=B:USR1@120", "--constraint=h100", "--mem=0"]
    command = text[text.index("srun") : text.index("run=$!")]
    assert f"finetune llm -c '{recipe}'" in command
    assert "--optimizer.lr 3e-4" in command
    assert "--rng.seed=7" in command
    assert "--checkpoint.restore_from=latest" in command
    assert '--rdzv-endpoint "$rendezvous"' in command
    assert "--nproc-per-node 4" in command
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text


def test_overrides_reach_the_ranks_as_they_were_written(tmp_path):
    (tmp_path / "automodel").mkdir()
    text = write("slurm", "--dataset.path_or_dataset_id=/data/it's $HOME/*.jsonl")
    command = text[text.index("srun") : text.index("&\nrun=$!")]
    start = 'srun() { shift 3; while [ "$1" != finetune ]; do shift; done; printf "%s\\n" "$@"; }\n'
    shown = subprocess.run(["bash", "-c", start + command], capture_output=True, text=True, check=True).stdout
    assert "--dataset.path_or_dataset_id=/data/it's $HOME/*.jsonl" in shown.splitlines()


def test_kubernetes_manifest(recipe):
    config_map, service, job = yaml.safe_load_all(write("k8s", *K8S, "--namespace", "ml", "--secret", "hf"))
    assert config_map["data"]["recipe.yaml"] == FULL
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert {document["metadata"]["namespace"] for document in (config_map, service, job)} == {"ml"}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    actions = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert actions == {2: "FailJob", 75: "Ignore"}
    pod = spec["template"]["spec"]
    assert (pod["subdomain"], pod["restartPolicy"]) == (service["metadata"]["name"], "Never")
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
    assert container["command"][:5] == ["automodel", "finetune", "llm", "-c", "/etc/automodel/recipe.yaml"]
    assert "--rdzv-endpoint=my-recipe-0.my-recipe:29400" in container["command"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}


def test_skypilot_task(recipe):
    bucket = ["--spot", "--bucket", "s3://runs:/keep", "--checkpoint.checkpoint_dir", "/keep/a"]
    task = yaml.safe_load(write("skypilot", *SKY, *bucket))
    assert task["num_nodes"] == 2
    assert task["resources"] == {"accelerators": "H100:4", "use_spot": True}
    assert task["file_mounts"]["/keep"] == {"source": "s3://runs", "mode": "MOUNT_CACHED"}
    assert task["file_mounts"]["/tmp/automodel/recipe.yaml"] == str(recipe)
    assert task["setup"].strip() == "pip install ."
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert '--rdzv-endpoint "$head_ip:29400"' in task["run"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["slurmm"], "did you mean `slurm`?"),
        (["slurm"], "-c is missing"),
        (["slurm", "-c", "My Recipe.yaml", "--optimizer.lrr=1"], "did you mean `lr`"),
        (["slurm", "-c", "My Recipe.yaml", "--node", "2"], "did you mean `--nodes`?"),
        (["slurm", "-c", "My Recipe.yaml", "--nodes", "0"], "--nodes 0: not a number of 1 or more"),
        (["slurm", "-c", "My Recipe.yaml", "--gpus-per-node", "2", "--nproc-per-node", "3"], "there are 2 on a node"),
        (["k8s", "-c", "My Recipe.yaml"], "write --image"),
        (["k8s", "-c", "My Recipe.yaml", "--image", "x"], "write --claim NAME:/PATH"),
        (["k8s", "-c", "My Recipe.yaml", "--image", "x", "--claim", "a:/data"], "lost with its pod"),
        (["k8s", "-c", "My Recipe.yaml", *K8S, "--job-name", "My_Job"], "small letters"),
        (["skypilot", "-c", "My Recipe.yaml"], "write --accelerator H100"),
        (["skypilot", "-c", "My Recipe.yaml", "--accelerator", "H100"], "write --setup"),
        (["skypilot", "-c", "My Recipe.yaml", *SKY, "--spot"], "lost with the machine"),
    ],
)
def test_mistakes_write_nothing(arguments, says, capsys, tmp_path):
    assert main(["launch", *arguments]) == 2
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["My Recipe.yaml"]


def test_an_edited_script_is_not_overwritten(capsys):
    write("slurm")
    write("slurm")
    with open("job", "a") as file:
        file.write("# mine\n")
    assert main(["launch", "slurm", "-c", "My Recipe.yaml", "--output", "job", "--dry-run"]) == 2
    assert "exists already and differs" in capsys.readouterr().err


def test_without_a_client_it_says_so(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "k8s", "-c", "My Recipe.yaml", *K8S]) == 0
    assert "`kubectl` is not installed here" in capsys.readouterr().out


def test_the_clients_exit_code_is_the_commands(tmp_path, monkeypatch, capfd):
    client = tmp_path / "bin/kubectl"
    client.parent.mkdir()
    client.write_text('#!/bin/sh\necho "asked: $*"\nexit 3\n')
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    assert main(["launch", "k8s", "-c", "My Recipe.yaml", *K8S]) == 3
    assert "asked: apply -f my-recipe.k8s.yaml" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["slurm", "--help"], ["k8s", "-h"], ["skypilot", "--help"]])
def test_help(arguments, capsys):
    assert main(["launch", *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--nodes", "--gpus-per-node", "--dry-run", "--job-name"))


@pytest.mark.parametrize(("kind", "suffix"), [("slurm", ".sbatch"), ("k8s", ".k8s.yaml"), ("skypilot", ".sky.yaml")])
def test_help_names_the_kind_of_file_that_is_written(kind, suffix, capsys):
    assert main(["launch", kind, "--help"]) == 0
    assert f"--output my-run{suffix} " in capsys.readouterr().out
