"""Soft-capped attention's Triton kernels under Triton's interpreter, and where they are used."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels.softcap_attention import unsupported_reason
from tests.unit.kernels.interpreter import require_passes


@pytest.mark.parametrize("cases", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_under_the_interpreter(cases: str) -> None:
    require_passes("interpreted_softcap_attention.py", "-m", cases)


def test_where_it_runs() -> None:
    pytest.importorskip("triton")
    assert unsupported_reason(torch.device("cpu"), torch.float32) == "there is no kernel for cpu"
    assert unsupported_reason(torch.device("mps"), torch.float16) == "there is no kernel for mps"
    assert unsupported_reason(torch.device("cuda"), torch.float32) == "there is no kernel for torch.float32"
