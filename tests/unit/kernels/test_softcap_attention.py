"""Soft-capped attention's Triton kernels under Triton's interpreter, and where they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_automodel.kernels.softcap_attention import unsupported_reason


@pytest.mark.parametrize("cases", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_under_the_interpreter(cases: str) -> None:
    """Its own process, because Triton decides when it is first imported whether it interprets."""
    pytest.importorskip("triton")
    path = Path(__file__).with_name("interpreted_softcap_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", cases, str(path)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_where_it_runs() -> None:
    pytest.importorskip("triton")
    assert unsupported_reason(torch.device("cpu"), torch.float32) == "there is no kernel for cpu"
    assert unsupported_reason(torch.device("mps"), torch.float16) == "there is no kernel for mps"
    assert unsupported_reason(torch.device("cuda"), torch.float32) == "there is no kernel for torch.float32"
