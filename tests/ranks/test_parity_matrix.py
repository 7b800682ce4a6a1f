"""The parity matrix: every parallel layout trains as one device does.

Claims, for each cell of {layout} × {SFT, LoRA} × {model} × {padded, packed}, through the recipe's own ``main`` on real
gloo ranks against plain transformers on one process: (1) the gradient of every parameter at the first step, relative
error of its norm at most 1e-5 in float32 and 1e-10 in float64; (2) the logged loss and gradient norm of five optimizer
steps to 1e-5. ``make test`` runs a fixed sample, ``make test-all`` all cells, and these write docs/parity.md.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.ranks.launch import ROOT, on_ranks
from tests.ranks.parity import FLOAT64, LAYOUTS, MODELS, Cell, oracle

TABLE = ROOT / "docs" / "parity.md"
GRADIENT = {"float32": 1e-5, "float64": 1e-10}
LOGGED = 1e-5
_HEAD = """# Parity matrix

Every parallel layout against plain transformers on one process; written by `tests/ranks/test_parity_matrix.py` (`make test-all`).
Each number is the largest relative error ‖Δ‖/‖g‖ over the gradients of all parameters at the first step, in float32 and, where
transformers itself computes in float64 throughout, in float64; loss and gradient norm of five optimizer steps agree to 1e-5.

"""


def cells_of(layout: str, whole: bool) -> list[Cell]:
    """All cells of ``layout``, or the four of the sample: each model and kind of rows comes up, by turns."""
    everything = [
        Cell(layout, peft, model, packed, dtype)
        for model in MODELS
        for peft in (False, True)
        for packed in (False, True)
        for dtype in ("float32", "float64")
        if (dtype == "float32" or model in FLOAT64) and not cannot(layout, model)
    ]
    if whole:
        return everything
    start = list(LAYOUTS).index(layout)
    models = list(dict.fromkeys(cell.model for cell in everything))
    names = [models[(start + k) % len(models)] for k in range(4)]
    chosen = zip(names, (False, True, True, False), (True, False, True, False), strict=True)
    wanted = {(m, peft, packed, "float64" if m in FLOAT64 else "float32") for m, peft, packed in chosen}
    return [c for c in everything if (c.model, c.peft, c.packed, c.dtype) in wanted]


def cannot(layout: str, model: str) -> str | None:
    """Why a cell does not apply, None where it does."""
    return "no experts" if "EP" in layout and model != "MoE" else None


def run(layout: str, cells: list[Cell], root: Path) -> dict[str, dict]:
    for cell in cells:
        path = root / f"oracle_{cell.oracle}.pt"
        if not path.exists():
            torch.save(oracle(cell, root), path)
    (root / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    on_ranks(
        "tests.ranks.parity:main", LAYOUTS[layout][0], root, root / "cells.json", root / "results.json", timeout=900
    )
    return json.loads((root / "results.json").read_text())


def wrong(cell: Cell, found: dict) -> str | None:
    """What is wrong with a cell, None if nothing is."""
    if "error" in found:
        return found["error"]
    if found["missing"]:
        return f"parameters with a gradient on one side only: {found['missing']}"
    if not found["gradient"] <= GRADIENT[cell.dtype]:
        return f"gradient of {found['worst']} off by {found['gradient']:.1e}"
    if not max(found["loss"], found["grad_norm"]) <= LOGGED:
        return f"logged loss off by {found['loss']:.1e}, grad_norm by {found['grad_norm']:.1e}"
    return None


@pytest.mark.sample
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_of_cells(tmp_path, layout):
    check(layout, cells_of(layout, whole=False), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cell(tmp_path, layout):
    write_rows(layout, check(layout, cells_of(layout, whole=True), tmp_path))


def check(layout: str, cells: list[Cell], root: Path) -> dict[str, dict]:
    found = run(layout, cells, root)
    assert found.keys() == {cell.name for cell in cells}
    problems = {cell.name: problem for cell in cells if (problem := wrong(cell, found[cell.name]))}
    assert not problems, problems
    return found


def write_rows(layout: str, found: dict[str, dict]) -> None:
    """Put the rows of ``layout`` into the table, in the order of the layouts."""
    with FileLock(str(TABLE) + ".lock"):
        old = TABLE.read_text().splitlines() if TABLE.exists() else []
        rows = {line.split("|")[1].strip(): line for line in old if line.startswith("| ") and "layout" not in line}
        rows = {key: line for key, line in rows.items() if key.split(" ")[0] != layout}
        for peft in ("SFT", "LoRA"):
            for kind in ("padded", "packed"):
                cells = [cannot(layout, m) or _shown(found, f"{layout} {peft} {m} {kind}") for m in MODELS]
                rows[f"{layout} {peft} {kind}"] = f"| {layout} {peft} {kind} | " + " | ".join(cells) + " |"
        order = list(LAYOUTS)
        ordered = sorted(rows, key=lambda key: order.index(key.split(" ")[0]))
        head = ["| layout | " + " | ".join(MODELS) + " |", "|---|" + "---:|" * len(MODELS)]
        TABLE.write_text(_HEAD + "\n".join([*head, *(rows[key] for key in ordered)]) + "\n")
    Path(str(TABLE) + ".lock").unlink(missing_ok=True)


def _shown(found: dict[str, dict], name: str) -> str:
    """Errors to one digit are noisy in the last place: powers of ten do."""
    values = [found[f"{name} {dtype}"]["gradient"] for dtype in GRADIENT if f"{name} {dtype}" in found]
    return " / ".join(f"<{10.0 ** _ceil(v):.0e}" for v in values)


def _ceil(value: float) -> int:
    return math.ceil(math.log10(max(value, 1e-17)))
