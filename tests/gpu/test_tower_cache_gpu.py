"""On a GPU: features go to page-locked memory and come back as they were, and nothing waits for the device."""

import pytest
import torch

from nemo_automodel._transformers.inputs import to_device
from tests.unit.model.test_tower_cache import Case, Run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_features_come_back_as_they_were_and_nothing_waits(tmp_path, family):
    case = Case(family, tmp_path)
    run = Run(case.model().bfloat16().cuda(), 1.0)
    device = torch.device("cuda")
    batches = [to_device(batch, device) for (batch,) in case.loader(shuffle=False).steps(0)]
    first = [run.loss(batch).item() for batch in batches]
    held = [leaf for held in run.cache._held.values() for leaf in held.leaves if isinstance(leaf, torch.Tensor)]
    assert held
    assert all(leaf.is_pinned() for leaf in held)
    calls = run.calls
    assert [run.loss(batch).item() for batch in batches] == first
    assert run.calls == calls

    ((name, tower),) = run.cache._towers.items()
    inputs = {"pixel_values": batches[0]["pixel_values"], "return_dict": True}
    if family == "qwen3_vl":
        inputs = {"hidden_states": inputs["pixel_values"].bfloat16(), "grid_thw": batches[0]["image_grid_thw"]}
    with run.cache.serve(batches[0]):
        tower(**inputs)  # the first time in this form it is run, row by row
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with run.cache.serve(batches[0]):
            calls = run.calls
            tower(**inputs)
            assert run.calls == calls, name
    finally:
        torch.cuda.set_sync_debug_mode("default")
