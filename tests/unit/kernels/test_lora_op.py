"""The Triton LoRA op under Triton's interpreter; what the op's module says of a machine without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_automodel.kernels.lora import MAX_RANK, runs_on, unsupported_reason


def test_lora_op_under_the_interpreter():
    """Its own process, because Triton decides when it is first imported whether it interprets."""
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("interpreted_lora.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_where_the_kernels_can_run():
    assert runs_on("cuda")
    assert runs_on("cpu") == (os.environ.get("TRITON_INTERPRET") == "1")
    assert not runs_on("mps")
    assert unsupported_reason(MAX_RANK + 1) is not None
