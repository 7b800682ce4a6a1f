"""Tensor parallelism of every causal language model that the installed transformers registers, as a table.

Each architecture's tiny twin is cut over two gloo ranks by its own plan, or as inferred, and its loss and every gradient
compared with the whole twin's; then again with its sequence sharded. ``python -m tests.ranks.tp_coverage FILE`` writes
the table; ``test_tp_coverage.py`` does so too and counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nemo_automodel._transformers import compat
from nemo_automodel._transformers.tiny_twin import tiny_twin
from nemo_automodel._transformers.tp_infer import infer
from nemo_automodel._transformers.tp_plan import brings_plan, cut_share, plan_from_styles
from nemo_automodel._transformers.tp_proof import Twin
from nemo_automodel._transformers.twin_start import start_config
from tests.ranks.launch import ROOT, on_ranks

BATCH = 24  # architectures a pair of processes
WORTH = 0.1


@dataclass
class Row:
    """One architecture."""

    name: str
    plan: str  # own, inferred, none, or no twin
    share: float = 0.0  # of the blocks' parameters that are cut
    sequence: bool = False
    ends: bool = False
    note: str = ""


def measure(file: str, *names: str) -> None:
    """One row a name, appended to ``file`` by rank 0."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for name in names:
        row = _row(name, mesh)
        if dist.get_rank() == 0:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(asdict(row)) + "\n")
    dist.destroy_process_group()


def _row(name, mesh) -> Row:
    size = mesh.size()
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_twin(start_config(name, causal=True), heads=2 * size))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # as loading leaves it
        twin = Twin(model, mesh)
    except Exception as error:
        return Row(name, "no twin", note=_short(f"{type(error).__name__}: {error}"))
    styles = compat.own_tp_plan(model)
    wrong = None
    if brings_plan(styles):

        def own(m):
            return plan_from_styles(m, styles, size)

        wrong = twin.objection(own)
        if wrong is None:
            plan = own(model)
            ends = any(layer.kind == "vocabulary" for layer in plan.layers.values())
            return Row(name, "own", cut_share(model, plan), twin.objection(own, True) is None, ends)
    found, objections = infer(twin, size)
    notes = [f"own plan: {wrong}"] if wrong else []
    notes += [f"{what}: {reason}" for what, reason in objections.items()]
    if not found.pairs:
        return Row(name, "none", note=_short("; ".join(notes) or "no column layer feeds a row layer alone"))
    plan = found.plan(model, size)
    along = twin.objection(lambda m: found.plan(m, size), True) is None or bool(infer(twin, size, True)[0].pairs)
    share = cut_share(model, plan)
    if share < WORTH:
        return Row(name, "none", note=_short(f"only {share:.0%} of the parameters; " + "; ".join(notes)))
    return Row(name, "inferred", share, along, found.ends, _short("; ".join(notes)))


def _short(text: str) -> str:
    return " ".join(text.split())[:220].replace("|", "/")


def run(names: list[str]) -> list[Row]:
    """Rows of ``names``; a pair of processes that dies costs only the architecture it was at."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        left = list(names)
        while left:
            file = Path(folder, f"{len(left)}.jsonl")
            with contextlib.suppress(subprocess.TimeoutExpired):
                on_ranks("tests.ranks.tp_coverage:measure", 2, file, *left[:BATCH], timeout=400, check=False)
            done = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
            rows += done
            assert rows, "no architecture was measured; run measure() by hand"
            if len(done) < len(left[:BATCH]):
                rows.append(Row(left[len(done)], "none", note="its two processes died"))
                done.append(rows[-1])
            left = left[len(done) :]
    return rows


def causal_lms() -> list[str]:
    """Every model type with a causal language model that transformers registers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(rows: list[Row]) -> str:
    """The page ``docs/tensor-parallel.md``."""
    works = [row for row in rows if row.plan in ("own", "inferred")]
    inferred = [row for row in works if row.plan == "inferred"]
    lines = [
        "# Tensor parallelism: what works",
        "",
        "Written by `tests/ranks/test_tp_coverage.py` (`make test-all`). Every causal language model that transformers",
        f"{transformers.__version__} registers is shrunk to a tiny twin and cut over two ranks, by the plan that it brings or",
        "by one inferred from its structure; loss and every parameter's gradient must be the whole twin's. A run makes",
        "the same proof of its own model before it starts, and refuses what does not pass.",
        "",
        f"**{len(works)} of {len(rows)}** architectures can be cut: {len(works) - len(inferred)} by their own plan, "
        f"{len(inferred)} by an inferred one; {sum(row.sequence for row in works)} of them with `sequence_parallel: true` too.",
        "",
        "- *cut*: the share of the decoder blocks' parameters in column and row layers; the rest is whole on each rank.",
        "- *vocabulary*: whether embedding and output head are cut (the fused loss is then vocabulary-parallel).",
        "- *sequence*: whether `sequence_parallel: true` passes the same proof.",
        "",
        "| architecture | plan | cut | vocabulary | sequence | what is left whole, and why |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        works_ = row.plan in ("own", "inferred")
        cells = [
            row.name,
            row.plan,
            f"{row.share:.0%}" if works_ else "-",
            _yes(row.ends, works_),
            _yes(row.sequence, works_),
        ]
        lines.append("| " + " | ".join([*cells, row.note]) + " |")
    return "\n".join(lines) + "\n"


def _yes(value: bool, applies: bool) -> str:
    return "-" if not applies else "yes" if value else "no"


if __name__ == "__main__":
    ROOT.joinpath(sys.argv[1]).write_text(table(run(sys.argv[2:] or causal_lms())))
