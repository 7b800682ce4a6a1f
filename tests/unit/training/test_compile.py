"""Regional compile: blocks in place, names kept, one compilation for equal blocks."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from nemo_automodel import kernels
from nemo_automodel.components.training.compile import CompileConfig, take_gradients_at_the_first
from nemo_automodel.errors import ConfigError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


@pytest.mark.parametrize(("enabled", "device", "expected"), [(None, "cpu", False), (None, "cuda", True), (False, "cuda", False), (True, "cpu", True)])  # fmt: skip
def test_on_for_cuda_unless_said_otherwise(enabled, device, expected, monkeypatch):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda self, **options: compiled.append(options))
    blocks = [Block(), Block()]
    config = CompileConfig(enabled=enabled, mode="max-autotune", fullgraph=True, dynamic=False)
    assert config.apply(blocks, torch.device(device)) is expected
    options = {"mode": "max-autotune", "fullgraph": True, "dynamic": False, "options": None}
    assert compiled == [options] * (2 if expected else 0)


def test_a_mode_that_there_is_not_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"compile\.mode='foo': write one of default, .*max-autotune"):
        CompileConfig(mode="foo")


@pytest.mark.parametrize(("width", "bias", "unpadded"), [(1096, True, True), (1096, False, False), (1088, True, False), (24, True, False)])  # fmt: skip
def test_rows_are_not_padded_where_a_bias_would_be_copied_into_them(width, bias, unpadded, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Sequential, "compile", lambda self, **options: compiled.append(options["options"]))
    block = nn.Sequential(nn.Linear(8, width, bias=bias), nn.GELU(), nn.Linear(width, 8))
    CompileConfig(enabled=True).apply([block], torch.device("cpu"))
    CompileConfig(enabled=True, mode="default").apply([block], torch.device("cpu"))
    assert compiled == [{"comprehensive_padding": False} if unpadded else None, None]


def test_a_block_with_unpadded_rows_computes_the_same():
    block = nn.Sequential(nn.Linear(8, 1096), nn.GELU(), nn.Linear(1096, 8))
    x = torch.randn(3, 8)
    expected = block(x)
    assert CompileConfig(enabled=True).apply([block], x.device)
    torch.testing.assert_close(block(x), expected)


def test_off_where_deterministic_unless_said_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not CompileConfig().apply([], torch.device("cuda"))
    assert CompileConfig(enabled=True).apply([], torch.device("cuda"))


def test_blocks_share_one_compilation_and_compute_the_same():
    blocks = nn.Sequential(*[Block() for _ in range(10)])
    names, x = list(blocks.state_dict()), torch.randn(3, 8, requires_grad=True)
    expected = blocks(x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert CompileConfig(enabled=True, fullgraph=True).apply(list(blocks), x.device)
    torch.testing.assert_close(blocks(x), expected)
    assert list(blocks.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Adapted(Block):
    """A block whose weight is frozen, with an adapter."""

    def __init__(self):
        super().__init__()
        self.linear.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_adapted_block_is_compiled_as_the_others_are(shared):
    torch.manual_seed(0)
    blocks, x = nn.Sequential(*[Adapted() for _ in range(4)]), torch.randn(3, 8)
    blocks(x).sum().backward()
    expected = [block.scale.grad for block in blocks]
    blocks.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if shared:
        take_gradients_at_the_first(list(blocks))
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    blocks(x).sum().backward()
    for block, gradient in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block.scale.grad, gradient)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if shared else 2)
    assert not x.requires_grad


def test_a_first_block_that_trains_nothing_goes_no_further_back():
    blocks = nn.Sequential(Adapted(), Adapted())
    blocks[0].requires_grad_(False)
    take_gradients_at_the_first(list(blocks))
    seen = []
    blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    blocks(torch.randn(3, 8))
    assert seen == [False]


_START = """
import os
from pathlib import Path
import torch
from torch import nn
from torch._dynamo.utils import counters
from nemo_automodel import kernels
from nemo_automodel.components.training.compile import CompileConfig

kernels.mark_compiled_code(Path(os.environ["KERNELS"]))

class Block(nn.Linear):
    def forward(self, x):
        return torch.nn.functional.silu(super().forward(x))

block = Block(8, 8)
assert CompileConfig(enabled=True).apply([block], torch.device("cpu"))
block(torch.ones(2, 8)).sum().backward()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


def _start(**environment):
    ours = ("TORCHINDUCTOR", "TRITON_CACHE", "LOCAL_RANK")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    run = subprocess.run([sys.executable, "-c", _START], env=clean | environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr
    directories, hits = run.stdout.splitlines()[-2:]
    return directories.split(), hits.split()


def test_a_second_start_finds_what_the_first_compiled_but_not_with_other_kernels(tmp_path):
    """Beside the models, not below /tmp as torch's default; torch's key has only the names of our ops."""
    expected = [str(tmp_path / "nemo_automodel/compiled"), str(tmp_path / "nemo_automodel/compiled/triton/0")]
    (tmp_path / "kernels").mkdir()
    for text, hits in (("a = 1", ["0", "1"]), ("a = 1", ["1", "0"]), ("a = 2", ["0", "1"])):
        (tmp_path / "kernels" / "lora.py").write_text(text)
        assert _start(HF_HOME=str(tmp_path), KERNELS=str(tmp_path / "kernels")) == (expected, hits)


def test_our_kernels_are_in_the_key_of_whatever_is_compiled():
    """Also where the user compiles the model, not us."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(kernels.__file__).parent.glob("*.py"))))
    assert digest.hexdigest()[:16] in torch.compiler.config.cache_key_tag


@pytest.mark.parametrize(("world", "expected"), [("16", "compiled/host_1"), ("8", "compiled")])
def test_hosts_that_share_a_disk_do_not_share_compiled_code(world, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert CompileConfig(enabled=True).apply([], torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "nemo_automodel" / expected)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "nemo_automodel" / expected / "triton" / "3")


def test_compiled_code_goes_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert CompileConfig(enabled=True).apply([], torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    assert CompileConfig(enabled=True, cache_dir=str(tmp_path / "chosen")).apply([], torch.device("cpu"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")


def test_a_directory_that_cannot_be_written_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    assert CompileConfig(enabled=True, cache_dir=str(tmp_path / "file" / "below")).apply([], torch.device("cpu"))
    assert "set compile.cache_dir" in caplog.text
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
