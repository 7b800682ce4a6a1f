"""A Hugging Face Hub on 127.0.0.1: real HTTP, real ``huggingface_hub`` and ``datasets`` clients, and its bad days.

It serves the repositories it is given (bytes in memory) through the endpoints those clients use, and can be told to
gate a repository, to answer 5xx a few times, or to cut a connection in mid-file.

``huggingface_hub`` reads its environment when imported, so code under test runs in a subprocess with ``LocalHub.env``.
By hand: ``python -m tests.hub --port 8123 [--gate meta-llama/Llama-3.2-1B] [--fail 503:2] [--cut model.safetensors]``
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MODEL = "meta-llama/Llama-3.2-1B"
DATASET = "rajpurkar/squad"
GOOD_TOKEN = "hf_accepted"
"""The token of an account that has accepted every licence; any other token is an account that has not."""


@dataclass
class Repository:
    """One model or dataset: its files and who may read them."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        self.branches.setdefault("main", digest.hexdigest())

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit id names."""
        return self.branches.get(revision, revision if revision in self.branches.values() else None)


@dataclass
class Fault:
    """What goes wrong for requests ("METHOD path") that match ``pattern``, the next ``times`` times."""

    pattern: str
    times: int
    status: int | None = None  # answer with this status
    cut_after: int | None = None  # or: send this many bytes of the body, then close the connection


class LocalHub:
    """The server. ``with LocalHub() as hub: ...``; ``hub.env(home)`` is the environment for a client process."""

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path", in order
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, kind: str, name: str, files: dict[str, bytes] | Path, **options: Any) -> Repository:
        """Serve ``files`` (path -> bytes, or a directory) as ``name``; ``kind`` is "models" or "datasets"."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        self.repositories[kind, name] = Repository(files, **options)
        return self.repositories[kind, name]

    def fail(self, status: int, times: int = 1, pattern: str = "") -> None:
        """Answer the next ``times`` requests that match the regular expression with ``status``."""
        self.faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Close the connection ``after`` so many bytes of a body whose path matches."""
        self.faults.append(Fault(pattern, times, cut_after=after))

    def take_fault(self, request: str, body: bool) -> Fault | None:
        """The fault that ``request`` ("METHOD path") meets, if any."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request) and (body or fault.cut_after is None):
                fault.times -= 1
                return fault
        return None

    def env(self, home: Path, token: str | None = None, **extra: str) -> dict[str, str]:
        """Environment of a client process: this Hub, an empty cache under ``home``, no token unless given."""
        drop = ("HF_", "HUGGING", "TRANSFORMERS_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HOME": str(home)}
        env |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "*", "no_proxy": "*"}
        if token is not None:
            env["HF_TOKEN"] = token
        return env | extra


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_POST(self) -> None:
        self._posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, body: bool) -> None:
        hub: LocalHub = self.server.hub
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append(f"{self.command} {path}")
        self._body = body
        self._cut: int | None = None
        if fault := hub.take_fault(f"{self.command} {path}", body):
            if fault.status is not None:
                self._error(fault.status, "", "the server has a bad minute")
                return
            self._cut = fault.cut_after
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path
        ):
            kind, name, verb, revision, rest = match.groups()
            self._api(kind, name, verb, revision or "main", (rest or "").strip("/"), parse_qs(parts.query))
        elif match := re.fullmatch(r"(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            prefix, name, revision, file = match.groups()
            self._file("datasets" if prefix else "models", name, revision, file)
        elif path == "/api/whoami-v2":
            self._json({"name": "ada", "type": "user"}) if self._token() else self._error(
                401, "", "Invalid credentials"
            )
        else:
            self._error(404, "", "Not Found")

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repository(self, kind: str, name: str, revision: str, content: bool) -> tuple[Repository, str] | None:
        """The repository and commit, or None after answering as the Hub does to those who may not have it."""
        repository = self.server.hub.repositories.get((kind, name))
        allowed = self._token() == GOOD_TOKEN
        if repository is None or (repository.private and not allowed):
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        if repository.gated and content and not allowed:
            status = 403 if self._token() else 401
            self._error(status, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
            return None
        commit = repository.commit(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _api(
        self, kind: str, name: str, verb: str | None, revision: str, path: str, query: dict[str, list[str]]
    ) -> None:
        found = self._repository(kind, name, revision, content=verb in ("tree", "paths-info"))
        if found is None:
            return
        repository, commit = found
        if verb == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            entries = _tree(repository, path, recursive)
            if path and not entries:
                self._error(404, "EntryNotFound", f"{path} does not exist on {revision}")
                return
            self._json(entries)
        elif verb == "paths-info":
            self._json(_paths_info(repository, self._asked_paths()))
        else:
            self._json(_info(kind, name, repository, commit))

    def _asked_paths(self) -> list[str]:
        if "json" in self.headers.get("Content-Type", ""):
            return list(json.loads(self._posted)["paths"])
        return parse_qs(self._posted.decode()).get("paths", [])

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        found = self._repository(kind, name, revision, content=True)
        if found is None:
            return
        repository, commit = found
        if file not in repository.files:
            self._error(404, "EntryNotFound", f"{file} does not exist on {revision}", {"X-Repo-Commit": commit})
            return
        content = repository.files[file]
        headers = {"ETag": f'"{_oid(file, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, stop = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1])
            stop = min(int(match[2]) + 1, stop) if match[2] else stop
            if start >= len(content) and content:
                self._error(416, "", "Range Not Satisfiable", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206 if "Content-Range" in headers else 200, content[start:stop], "application/octet-stream", headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {**(headers or {}), "X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), "application/json", extra)

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if not self._body:
            return
        if self._cut is not None and self._cut < len(content):
            self.wfile.write(content[: self._cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(content)


def _oid(path: str, content: bytes) -> str:
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet", ".bin"))


def _entry(repository: Repository, path: str) -> dict[str, Any]:
    content = repository.files[path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if _is_lfs(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
    return entry


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _tree(repository: Repository, under: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{under}/" if under else ""
    entries, directories = [], set()
    for path in sorted(repository.files):
        if not path.startswith(prefix):
            continue
        parents = path[len(prefix) :].split("/")[:-1]
        directories.update(
            prefix + "/".join(parents[: i + 1]) for i in range(len(parents) if recursive else min(1, len(parents)))
        )
        if recursive or not parents:
            entries.append(_entry(repository, path))
    return [_directory(path) for path in sorted(directories)] + entries


def _paths_info(repository: Repository, paths: list[str]) -> list[dict[str, Any]]:
    found = []
    for path in paths:
        if path in repository.files:
            found.append(_entry(repository, path))
        elif any(file.startswith(f"{path}/") for file in repository.files):
            found.append(_directory(path))
    return found


def _info(kind: str, name: str, repository: Repository, commit: str) -> dict[str, Any]:
    info = {"_id": hashlib.md5(name.encode()).hexdigest()[:24], "id": name, "author": name.split("/")[0], "sha": commit}
    info |= {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
    info |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2025-01-01T00:00:00.000Z"}
    info |= {"createdAt": "2025-01-01T00:00:00.000Z", "siblings": [{"rfilename": f} for f in sorted(repository.files)]}
    if kind == "models":
        info["modelId"] = name
    return info


def tiny_llama_files(shards: int = 1, **config: Any) -> dict[str, bytes]:
    """The files of a two-layer Llama with its tokenizer, as a Hub repository has them."""
    import torch
    from transformers import LlamaForCausalLM

    from tests.builders import make_tokenizer, tiny_config

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        model = LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=True, **config)).to(torch.bfloat16)
        size = sum(p.numel() for p in model.parameters()) * 2
        model.save_pretrained(directory, max_shard_size=size if shards == 1 else size // shards)
        make_tokenizer("llama3").save_pretrained(directory)
        path = Path(directory)
        return {p.name: p.read_bytes() for p in path.iterdir()} | {
            "README.md": b"---\nlicense: llama3.2\n---\n# Tiny\n"
        }


def squad_files(rows: int = 300) -> dict[str, bytes]:
    """SQuAD-format parquet files under ``plain_text/``, and the dataset card that names the splits."""
    import pyarrow
    from pyarrow import parquet

    def table(count: int, offset: int) -> bytes:
        countries = ["France", "Italy", "Spain", "Norway", "Chile", "Kenya", "Japan", "Peru"]
        capitals = ["Paris", "Rome", "Madrid", "Oslo", "Santiago", "Nairobi", "Tokyo", "Lima"]
        columns: dict[str, list[Any]] = {"id": [], "title": [], "context": [], "question": [], "answers": []}
        for i in range(offset, offset + count):
            country, capital = countries[i % 8], capitals[i % 8]
            context = f"Note {i}. The capital of {country} is {capital}, and people like it there."
            columns["id"].append(f"{i:024x}")
            columns["title"].append(country)
            columns["context"].append(context)
            columns["question"].append(f"What is the capital of {country}?")
            columns["answers"].append({"text": [capital], "answer_start": [context.index(capital)]})
        answers = pyarrow.struct(
            {"text": pyarrow.list_(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())}
        )
        strings = [(key, pyarrow.string()) for key in ("id", "title", "context", "question")]
        schema = pyarrow.schema([*strings, ("answers", answers)])
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table(columns, schema=schema), buffer)
        return buffer.getvalue()

    card = (
        "---\nconfigs:\n- config_name: plain_text\n  default: true\n  data_files:\n"
        "  - split: train\n    path: plain_text/train-*\n  - split: validation\n    path: plain_text/validation-*\n---\n"
    )
    return {
        "README.md": card.encode(),
        "plain_text/train-00000-of-00001.parquet": table(rows, 0),
        "plain_text/validation-00000-of-00001.parquet": table(max(rows // 10, 8), rows),
    }


@contextmanager
def serving(port: int = 0) -> Iterator[LocalHub]:
    """A Hub that serves the announcement's model and dataset, small."""
    with LocalHub(port) as hub:
        hub.add("models", MODEL, tiny_llama_files())
        hub.add("datasets", DATASET, squad_files())
        yield hub


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on 127.0.0.1")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--gate", action="append", default=[], metavar="REPO", help="gate this model or dataset")
    parser.add_argument("--fail", metavar="STATUS:TIMES[:PATTERN]", help="answer so the first TIMES requests")
    parser.add_argument("--cut", metavar="PATTERN", help="cut the first download of a matching file after 1000 bytes")
    arguments = parser.parse_args()
    with serving(arguments.port) as hub:
        for name in arguments.gate:
            for (_, known), repository in hub.repositories.items():
                repository.gated = repository.gated or known == name
        if arguments.fail:
            status, times, *pattern = arguments.fail.split(":", 2)
            hub.fail(int(status), int(times), *pattern)
        if arguments.cut:
            hub.cut(arguments.cut, after=1000)
        print(f"export HF_ENDPOINT={hub.url} HF_HOME=$(mktemp -d) HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
