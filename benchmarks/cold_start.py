"""Process start to the end of the first optimizer step, of ``automodel finetune llm`` as a user types it; the input wait.

    python -m benchmarks.cold_start [--starts first second bare] [--steps 12] [--limit 240] [--cpu] [--dir DIR] [--out DIR]

Workload A on chats packed to 4096 tokens, from a checkpoint directory written here (bf16 safetensors, still in the page
cache when it is read). ``first``: every cache is empty; ``second``: the caches that the first start left; ``bare``: as
``second``, but from the config alone, so without reading weights. The end of the step is the time in ``metrics.jsonl``,
which is written once the device is done; the parts are told apart by when the command printed which line. The second
start goes on for ``--steps`` steps: the share of a step in which the loop waited for data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import write
from benchmarks.workloads import WORKLOADS, Workload, tiny
from nemo_automodel.cli import demo_data

LIMITS = {"first": 60.0, "second": 30.0}  # seconds
MAX_INPUT_WAIT = 1.0  # per cent of a step
STARTS = ("first", "second", "bare")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_DATASETS_CACHE", "HF_HUB_CACHE")
COLUMNS = ["start", "first step s", "limit s", "imports s", "data and model s", "certificate s", "first forward to step s",
           "step s", "input wait %", "met", "failed"]  # fmt: skip
_SHARD = 4 * 2**30  # bytes


# --- what a user has on disk ---------------------------------------------------------------------------------------


def write_inputs(workload: Workload, directory: Path, rows: int) -> float:
    """Checkpoint, tokenizer and chats; the seconds that writing the weights took."""
    chats, _ = demo_data.conversations()
    demo_data.train_tokenizer(chats, directory / "model", vocab_size=min(1536, workload.shape["vocab_size"]))
    sentences = [row["messages"][1]["content"] for row in chats]
    drawn = random.Random(0)
    longest = workload.seq // 40  # sentences of a chat: about a third of a pack
    texts = (" ".join(drawn.choices(sentences, k=drawn.randint(1, max(1, longest)))) for _ in range(rows))
    turns = [[{"role": "user", "content": drawn.choice(sentences)}, {"role": "assistant", "content": t}] for t in texts]
    demo_data.write_jsonl(directory / "chats.jsonl", [{"messages": messages} for messages in turns])
    started = time.monotonic()
    _write_weights(workload, directory / "model")
    return time.monotonic() - started


@torch.no_grad()
def _write_weights(workload: Workload, directory: Path) -> None:
    """Seeded weights in bf16, made on the GPU where there is one, in files of about 4 GiB with their index."""
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = workload.plain_model()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(directory)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if workload.shape["tie_word_embeddings"] else set()
    held: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    shard = 0

    def flush() -> None:
        nonlocal shard
        shard += 1
        name = f"model-{shard:05d}.safetensors"
        save_file(held, directory / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held.clear()

    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        held[name] = (made.fill_(1.0) if "norm" in name else made.normal_(0.0, 0.02, generator=generator)).cpu()
        if sum(tensor.nbytes for tensor in held.values()) > _SHARD:
            flush()
    flush()
    if device == "cuda":
        torch.cuda.empty_cache()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def recipe(workload: Workload, directory: Path, bare: bool, steps: int, cpu: bool) -> dict[str, Any]:
    """What a user writes for workload A: nothing but the model, the data, LoRA and the batch."""
    model: dict[str, Any] = {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(directory / "model"),
    }
    if bare:
        model["_target_"] = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
        model["config"] = str(directory / "model")
        del model["pretrained_model_name_or_path"]
    found: dict[str, Any] = {
        "model": model,
        "tokenizer": {"pretrained_model_name_or_path": str(directory / "model")},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.chat.make_chat_dataset",
            "path_or_dataset_id": str(directory / "chats.jsonl"),
        },
        "packed_sequence": {"packed_sequence_size": workload.seq},
        "peft": {
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "match_all_linear": True,
            "dim": workload.lora_rank,
        },
        "step_scheduler": {
            "global_batch_size": workload.batch,
            "local_batch_size": workload.batch,
            "max_steps": steps,
        },
        "checkpoint": {"checkpoint_dir": str(directory / "checkpoints")},
    }
    return found | ({"dist_env": {"device": "cpu"}} if cpu else {})


# --- one start -----------------------------------------------------------------------------------------------------


def start(kind: str, workload: Workload, directory: Path, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command in a process of its own with caches below ``directory``; what its output says about its start."""
    caches = directory / "caches"
    if kind == "first":
        shutil.rmtree(caches, ignore_errors=True)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    yaml_file = directory / "recipe.yaml"
    yaml_file.write_text(yaml.safe_dump(recipe(workload, directory, kind == "bare", steps, arguments.cpu)))
    environment = {name: value for name, value in os.environ.items() if name not in CACHES}
    environment |= {"HF_HOME": str(caches), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "nemo_automodel.cli.app", "finetune", "llm", "-c", str(yaml_file)]
    command += ["--nproc-per-node", "1"]
    log = directory / f"{kind}.log"
    began = time.time()
    with log.open("w") as file:
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.stdout is not None
        os.set_blocking(run.stdout.fileno(), False)
        seen: list[tuple[float, str]] = []
        while run.poll() is None and time.time() - began < arguments.limit:
            for line in run.stdout.readlines():
                seen.append((time.time() - began, line.rstrip()))
                file.write(f"{seen[-1][0]:8.2f}  {line}")
            time.sleep(0.02)
        if run.poll() is None:
            run.kill()
            return {"failed": f"not done within {arguments.limit:.0f} s", "lines": seen}
        seen += [(time.time() - began, line.rstrip()) for line in run.stdout.readlines()]
    if run.returncode != 0:
        print("\n".join(line for _, line in seen[-40:]), flush=True)
        return {"failed": f"exit code {run.returncode}", "lines": seen}
    return _read(directory / "checkpoints", began, seen)


def _read(checkpoints: Path, began: float, seen: list[tuple[float, str]]) -> dict[str, Any]:
    metrics = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    first = metrics[0]["time"] - began
    said = {word: next((at for at, line in seen if line.startswith(word)), None) for word in ("certificate", "model ")}
    certified, described = said["certificate"], said["model "]
    proof = json.loads((checkpoints / "certificate.json").read_text()).get("seconds", 0.0)
    cached = certified is not None and any("certificate" in line and "cache" in line for _, line in seen)
    proof = 0.0 if cached else proof
    found: dict[str, Any] = {"first step s": round(first, 1), "certificate s": round(proof, 1), "lines": seen}
    if certified is not None:
        found["until model is ready s"] = round(certified - proof, 1)
    if described is not None:
        found["first forward to step s"] = round(first - described, 1)
    rest = metrics[len(metrics) // 2 :]
    if len(metrics) > 3:
        step = statistics.median(line["step_time_s"] for line in rest)
        wait = statistics.median(line["data_wait_s"] for line in rest)
        found |= {"step s": round(step, 3), "input wait %": round(100 * wait / step, 2)}
    return found


def import_seconds() -> float:
    """What importing the recipe takes, in a process of its own, files in the page cache."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import nemo_automodel.recipes.llm.finetune, transformers"], check=True)
    return time.monotonic() - started


def main(argv: list[str] | None = None) -> int:
    """Write the inputs, start as asked; 1 where a start failed or took longer than its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["first", "second"])
    parser.add_argument("--steps", type=int, default=12, help="of the second start")
    parser.add_argument("--limit", type=float, default=240, help="seconds a start may take")
    parser.add_argument("--cpu", action="store_true", help="a tiny shape on the CPU, to exercise the program")
    parser.add_argument("--dir", type=Path, default=None, help="where the checkpoint goes (default: a temporary place)")
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args(argv)
    workload = tiny(WORKLOADS["A"]) if arguments.cpu else WORKLOADS["A"]
    if arguments.cpu:
        workload = Workload("A", workload.about, {**workload.shape, "vocab_size": 1536}, 2, 512, 16)
    rows: list[dict[str, Any]] = []
    table = ""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        directory = Path(name)
        written = write_inputs(workload, directory, rows=200 if arguments.cpu else 2000)
        imports = round(import_seconds(), 1)
        print(f"weights written in {written:.0f} s; imports take {imports} s", flush=True)
        for kind in arguments.starts:
            found = start(kind, workload, directory, arguments.steps if kind == "second" else 1, arguments)
            row: dict[str, Any] = {"start": kind, "limit s": LIMITS.get(kind), "imports s": imports, **found}
            if "failed" not in found:
                ready = found.pop("until model is ready s", None)
                row["data and model s"] = None if ready is None else round(ready - imports, 1)
                row["met"] = _met(row, arguments.cpu)
            print({key: row[key] for key in COLUMNS if row.get(key) is not None}, flush=True)
            rows.append(row)  # written each time, so that a run cut short leaves what it has
            table = write("cold-start-cpu" if arguments.cpu else "cold-start", rows, COLUMNS, arguments.out)
    print(table)
    return int(any("failed" in row or row.get("met") == "NO" for row in rows))


def _met(row: dict[str, Any], cpu: bool) -> str | None:
    """Whether the start was in time and the loop did not wait for data; of a CPU nothing is asked."""
    if cpu or row["limit s"] is None:
        return None
    in_time = row["first step s"] <= row["limit s"]
    return "yes" if in_time and row.get("input wait %", 0.0) < MAX_INPUT_WAIT else "NO"


if __name__ == "__main__":
    sys.exit(main())
