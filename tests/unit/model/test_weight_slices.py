"""Tensors larger than what one thread reads: every byte in its place, and a file that is cut off is said."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from nemo_automodel._transformers import weight_slices
from nemo_automodel.errors import ModelError


@pytest.fixture
def stored(tmp_path):
    tensors = {"small": torch.arange(7.0), "large": torch.randn(30, 100), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors, weight_slices.stored_tensors([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("part", [97, 401, 4000, 1 << 20])
def test_threads_read_what_was_written(part, stored, monkeypatch):
    tensors, found = stored
    monkeypatch.setattr(weight_slices, "_PART_BYTES", part)
    monkeypatch.setattr(weight_slices, "PIECE_BYTES", 10 * part)
    for name, tensor in tensors.items():
        assert torch.equal(weight_slices.whole(found[name]), tensor)
    read = list(weight_slices.pieces(found["large"], [((2, 5), (9, 30)), ((10, 90),)]))
    assert torch.equal(torch.cat([rows for _, rows in read]), tensors["large"][[*range(2, 5), *range(9, 30)], 10:90])


def test_a_file_cut_off_since_its_header_was_read_is_said(stored, monkeypatch):
    _, found = stored
    monkeypatch.setattr(weight_slices, "_PART_BYTES", 401)
    path = found["large"].path
    os.truncate(path, path.stat().st_size - 5)
    last = max(found.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(ModelError, match="cut off while it was read"):
        weight_slices.whole(last)
    largest = found["large"]
    os.truncate(path, largest.offset + 5000)
    with pytest.raises(ModelError, match="cut off while it was read"):
        weight_slices.whole(largest)
