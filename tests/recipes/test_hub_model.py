"""The real download code against a Hub on 127.0.0.1: what works, what recovers, and what each failure says.

Client code runs in processes of their own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import DATASET, GOOD_TOKEN, MODEL, LocalHub, Repository, squad_files, tiny_llama_files

ROOT = Path(__file__).parents[2]

# Tries each call of CALLS (name -> [repository, keyword arguments]) and prints {name: class name or error}.
_LOAD_EACH = """
    import json, sys
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.errors import ModelError

    results = {}
    for name, (repository, arguments) in json.loads(sys.argv[1]).items():
        try:
            results[name] = type(NeMoAutoModelForCausalLM.from_pretrained(repository, **arguments)).__name__
        except ModelError as error:
            results[name] = str(error)
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def llama() -> dict[str, bytes]:
    return tiny_llama_files()


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


def client(hub: LocalHub, home: Path, code: str, *arguments: str, **env: str) -> str:
    """Run ``code`` in a process that knows this Hub; returns what it printed."""
    environment = hub.env(home, PYTHONPATH=str(ROOT), **env)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def load_each(hub: LocalHub, home: Path, calls: dict[str, tuple[str, dict[str, Any]]], **env: str) -> dict[str, str]:
    results = json.loads(client(hub, home, _LOAD_EACH, json.dumps(calls), **env).splitlines()[-1])
    assert all("\n" not in message for message in results.values())
    return results


def test_announced_python_runs_as_it_is(local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path) -> None:
    local_hub.add("models", MODEL, llama)
    code = """
        from nemo_automodel import NeMoAutoModelForCausalLM

        model = NeMoAutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B").to("cpu")
        output = model.generate(["Hello, my name is"])   # a list of strings
        print(output[0])

        from transformers import LlamaForCausalLM
        assert isinstance(model, LlamaForCausalLM), type(model)
        assert len(output) == 1 and len(output[0]) > len("Hello, my name is"), output
    """
    assert client(local_hub, tmp_path, code).startswith("Hello, my name is")


def test_dataset_loads_over_http(local_hub: LocalHub, tmp_path: Path) -> None:
    local_hub.add("datasets", DATASET, squad_files(rows=20))
    local_hub.fail(503, times=1, pattern="README")
    local_hub.cut(r"train.*parquet", after=100)
    code = """
        from datasets import load_dataset

        rows = load_dataset("rajpurkar/squad", split="train")
        print(len(rows), rows[0]["answers"]["text"][0])
    """
    assert client(local_hub, tmp_path, code).splitlines()[-1] == "20 Paris"


def test_refusals_say_what_to_do(local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path) -> None:
    local_hub.add("models", MODEL, llama)
    local_hub.add("models", "meta-llama/Gated", llama, gated=True)
    local_hub.add("models", "acme/pickled", {"config.json": llama["config.json"], "pytorch_model.bin": b"\x80\x02."})
    local_hub.add("models", "acme/adapter", {"adapter_config.json": b"{}"})
    local_hub.add("models", "acme/future", {"config.json": b'{"model_type": "llama99"}'})
    results = load_each(
        local_hub,
        tmp_path,
        {
            "gated, no token": ("meta-llama/Gated", {}),
            "gated, not accepted": ("meta-llama/Gated", {"token": "hf_other"}),
            "gated, accepted": ("meta-llama/Gated", {"token": GOOD_TOKEN}),
            "no repository": ("meta-llama/Lama-3.2-1B", {}),
            "no repository, with token": ("meta-llama/Lama-3.2-1B", {"token": GOOD_TOKEN}),
            "no revision": (MODEL, {"revision": "v9"}),
            "pickled": ("acme/pickled", {}),
            "adapter": ("acme/adapter", {}),
            "unknown type": ("acme/future", {}),
            "no directory": ("./no/such/dir", {}),
        },
    )
    assert results.pop("gated, accepted") == "LlamaForCausalLM"
    expected = {
        "gated, no token": ["meta-llama/Gated", "gated", "hf auth login", f"{local_hub.url}/meta-llama/Gated"],
        "gated, not accepted": ["meta-llama/Gated", "accept its licence", "hf auth login"],
        "no repository": ["meta-llama/Lama-3.2-1B not found", "spelling", "hf auth login"],
        "no repository, with token": ["meta-llama/Lama-3.2-1B not found"],
        "no revision": [MODEL, "no revision 'v9'", "/tree/main"],
        "pickled": ["acme/pickled", "pickled weights only", "save_pretrained"],
        "adapter": ["acme/adapter", "LoRA adapter", "base model"],
        "unknown type": ["acme/future", "llama99", "pip install -U transformers"],
        "no directory": ["./no/such/dir", "no such local directory"],
    }
    for name, parts in expected.items():
        for part in parts:
            assert part in results[name], (name, results[name])
    assert not any(request.endswith("pytorch_model.bin") and "GET" in request for request in local_hub.requests)


def test_bad_minutes_are_waited_out(local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path) -> None:
    """5xx that passes and a connection cut in mid-file: the model loads, and the cut file goes on from the cut."""
    local_hub.add("models", "acme/busy", llama)
    local_hub.add("models", "acme/cut", llama)
    local_hub.fail(503, times=2, pattern="acme/busy/.*config.json")
    local_hub.fail(502, times=2, pattern="acme/busy/.*safetensors")
    local_hub.cut("acme/cut/.*safetensors", after=5000, times=2)
    calls = {name: (f"acme/{name}", {}) for name in ("busy", "cut")}
    results = load_each(local_hub, tmp_path, calls)
    assert results["busy"] == results["cut"] == "LlamaForCausalLM"
    downloads = [r for r in local_hub.requests if r.startswith("GET /acme/cut") and r.endswith("model.safetensors")]
    assert len(downloads) == 3


@pytest.mark.full
def test_a_server_that_stays_down_is_named(local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path) -> None:
    local_hub.add("models", MODEL, llama)
    local_hub.fail(500, times=1000, pattern="GET .*safetensors")
    results = load_each(local_hub, tmp_path, {"down": (MODEL, {})})
    for part in (MODEL, local_hub.url, "500", "try again later"):
        assert part in results["down"]


def test_offline_uses_the_cache_and_says_so_without(
    local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path
) -> None:
    local_hub.add("models", MODEL, llama)
    calls = {"here": (MODEL, {}), "elsewhere": ("acme/other", {})}
    assert load_each(local_hub, tmp_path, {"here": (MODEL, {})}) == {"here": "LlamaForCausalLM"}
    served = len(local_hub.requests)
    results = load_each(local_hub, tmp_path, calls, HF_HUB_OFFLINE="1")
    assert results["here"] == "LlamaForCausalLM"
    for part in ("acme/other", "HF_HUB_OFFLINE is set", "hf download acme/other"):
        assert part in results["elsewhere"]
    assert len(local_hub.requests) == served


def test_index_must_stay_in_its_directory(local_hub: LocalHub, llama: dict[str, bytes], tmp_path: Path) -> None:
    config = {"config.json": llama["config.json"]}
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../other/model.safetensors"}}
    missing = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    local_hub.add("models", "acme/escape", config | {"model.safetensors.index.json": json.dumps(index).encode()})
    local_hub.add("models", "acme/hole", config | {"model.safetensors.index.json": json.dumps(missing).encode()})
    results = load_each(local_hub, tmp_path, {"escape": ("acme/escape", {}), "hole": ("acme/hole", {})})
    assert "'../../other/model.safetensors'" in results["escape"]
    assert "model-00002-of-00002.safetensors, which is not there" in results["hole"]


def test_importing_the_package_costs_nothing() -> None:
    code = """
        import sys, time
        start = time.process_time()
        import nemo_automodel
        took = time.process_time() - start
        heavy = {"torch", "transformers", "datasets", "huggingface_hub", "yaml", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        assert took < 0.3, took
        assert "NeMoAutoModelForCausalLM" in dir(nemo_automodel)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, env=os.environ, timeout=60)


def test_a_repository_knows_its_revisions() -> None:
    repository = Repository({"a": b"1"}, branches={"v1": "0" * 40})
    assert repository.commit("v1") == repository.commit("0" * 40) == "0" * 40
    assert repository.commit("main") != repository.commit("v1")
    assert repository.commit("v2") is None
