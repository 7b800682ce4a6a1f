"""``automodel merge`` where a GPU is seen: transformers then keeps weights in FP8 unless it is told not to."""

from __future__ import annotations

import pytest
import torch

from tests.unit.checkpoint.test_adapter import check_merge_into_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_merge_into_an_fp8_base(model_type, tmp_path):
    check_merge_into_fp8(model_type, tmp_path)
