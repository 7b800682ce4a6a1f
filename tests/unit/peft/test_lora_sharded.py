"""LoRA on parameters sharded by FSDP2 over two real gloo ranks."""

from __future__ import annotations

import subprocess
import sys


def test_sharded_adapters_equal_one_process():
    """Claims: see ``sharded_lora.py``."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.peft.sharded_lora"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
