"""The Triton LoRA op under Triton's interpreter; what the op's module says of a machine without it."""

from __future__ import annotations

import os

from nemo_automodel.kernels.lora import MAX_RANK, runs_on, unsupported_reason
from tests.unit.kernels.interpreter import require_passes


def test_lora_op_under_the_interpreter():
    require_passes("interpreted_lora.py")


def test_where_the_kernels_can_run():
    assert runs_on("cuda")
    assert runs_on("cpu") == (os.environ.get("TRITON_INTERPRET") == "1")
    assert not runs_on("mps")
    assert unsupported_reason(MAX_RANK + 1) is not None
