"""Runs the cases of a file beside this one with Triton interpreting: in a process of its own, since it decides when first imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def require_passes(file: str, *options: str) -> None:
    """Every case in ``file`` that pytest takes with ``options`` passes, there is one, and none is skipped."""
    pytest.importorskip("triton")
    cases = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(cases)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
