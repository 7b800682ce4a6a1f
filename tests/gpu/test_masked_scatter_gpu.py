"""On a GPU torch uses our gradient of ``masked_scatter``'s source, which is its own and waits for nothing."""

from __future__ import annotations

import pytest
import torch

from nemo_automodel.kernels import masked_scatter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96])
def test_the_gradient_is_the_cpus_without_waiting(dtype, width):
    masked_scatter.register()
    mask = torch.rand(4, 300, width) < 0.3
    into, weights = (torch.randn(4, 300, 96, dtype=dtype) for _ in range(2))
    source = torch.randn(int(mask.expand_as(into).sum()), dtype=dtype)
    found = []
    for device in ("cpu", "cuda"):
        values = [t.detach().to(device) for t in (into, source, weights, mask)]
        for value in values[:2]:
            value.requires_grad_()
        loss = (values[0].masked_scatter(values[3], values[1]) * values[2]).sum()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([values[0].grad.cpu(), values[1].grad.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
