"""Block attention as it is on the CPU, and its Triton kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels.flash import fits, unsupported_reason
from tests.unit.kernels.interpreted_block_attention import *  # noqa: F403 the same cases, without the interpreter
from tests.unit.kernels.interpreter import require_passes


@pytest.mark.parametrize("cases", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_under_the_interpreter(cases: str) -> None:
    require_passes("interpreted_block_attention.py", "-m", cases)


def test_where_it_runs() -> None:
    assert unsupported_reason(torch.device("cpu"), torch.float32) is None
    assert unsupported_reason(torch.device("mps"), torch.float16) == "there is no kernel for mps"
    assert unsupported_reason(torch.device("cuda"), torch.float32) == "there is no kernel for torch.float32"
    small, large, odd = (torch.empty(1, 2, 4, size) for size in (16, 264, 12))
    assert fits(small, small, small)
    assert not fits(large, large, large)
    assert not fits(odd, odd, odd)
    assert not fits(small, small[:, :, :3], small[:, :, :3])
