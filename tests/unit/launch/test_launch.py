"""``automodel launch``: what it writes for Slurm, Kubernetes and SkyPilot, what it refuses, and what it hands to a client."""

import os
import re
import shlex
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


def test_values_with_spaces_reach_slurm_whole(tmp_path, monkeypatch):
    """Read by sbatch itself, which says what it has understood before it looks for a controller."""
    folder = tmp_path / "My Folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    options = r"""comment="it's a \"b\" c\\d # e" --exclusive mem=0"""
    recipe = ["-c", str(tmp_path / "My Recipe.yaml"), *SIZE]
    assert main(["launch", "slurm", *recipe, "--sbatch", options, "--output", "job", "--dry-run"]) == 0
    directives = [line for line in (folder / "job").read_text().splitlines() if line.startswith("#SBATCH")]
    assert [line for line in directives if "exclusive" in line or "mem" in line] == [
        "#SBATCH --exclusive", "#SBATCH --mem=0"
    ]  # fmt: skip
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed")
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    sbatch = subprocess.run(["sbatch", "-v", "job"], env=environment, capture_output=True, text=True)
    read = dict(re.findall(r"sbatch: (\S+) +: (.*)", sbatch.stderr))
    assert read["comment"] == r"""it's a "b" c\d # e"""
    assert read["chdir"] == str(folder)
    assert "exclusive" in read


def container_mounts(text):
    """The folders that the container of a script is given, where it has them."""
    (mounts,) = (w for w in shlex.split(text[text.index("srun") :].split("finetune")[0]) if "container-mounts" in w)
    pairs = [mount.split(":") for mount in mounts.partition("=")[2].split(",")]
    assert all(source == target for source, target in pairs)
    return {source for source, _ in pairs}


def test_a_container_is_given_where_checkpoints_go_and_the_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    image = ["--image", "my#image"]
    work = tmp_path / "work"
    shared, scratch, cache = (tmp_path / name for name in ("shared", "a scratch", "cache"))
    for folder in (work, shared, scratch, cache):
        folder.mkdir()
    shutil.copy("My Recipe.yaml", work)
    monkeypatch.chdir(work)
    assert container_mounts(write("slurm", *image)) == {str(work)}  # checkpoints/ is in it
    os.remove("job")
    monkeypatch.setenv("HF_HOME", str(cache))
    text = write("slurm", *image, "--checkpoint.checkpoint_dir", str(shared / "runs/a"))
    assert container_mounts(text) == {str(work), str(shared), str(cache)}
    os.remove("job")
    (work / "checkpoints").symlink_to(scratch)
    assert str(scratch) in container_mounts(write("slurm", *image, "--checkpoint.checkpoint_dir", "checkpoints/a"))


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
    assert task["name"] == "my-recipe"
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert '--rdzv-endpoint "$head_ip:29400"' in task["run"]


def test_skypilot_reads_back_what_it_was_given():
    setup = "\npip install uv\nif true; then\n  uv sync\nfi\n"
    task = yaml.safe_load(write("skypilot", "--accelerator", "H100", "--setup", setup, "--job-name", "on"))
    assert task["name"] == "on"
    assert task["setup"].strip() == setup.strip()


def test_kubernetes_retries_and_grace():
    job = list(yaml.safe_load_all(write("k8s", *K8S, "--retries", "0", "--grace-seconds", "300")))[2]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["terminationGracePeriodSeconds"]) == (0, 300)


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
        (["k8s", "-c", "My Recipe.yaml", *K8S, "--retries", "many"], "--retries many: not a number of 0 or more"),
        (["k8s", "-c", "My Recipe.yaml", *K8S, "--grace-seconds", "x"], "--grace-seconds x: not a number of 1 or more"),
        (["slurm", "-c", "My Recipe.yaml", "--sbatch", "comment='a b"], "no closing quotation; quote a value"),
        (
            ["slurm", "-c", "My Recipe.yaml", "--image", "a", "--checkpoint.checkpoint_dir", "/nowhere-here/a"],
            "checkpoint.checkpoint_dir=/nowhere-here/a: nothing of it exists here",
        ),
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
