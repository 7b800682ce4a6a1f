"""torch.compile, one decoder block at a time, and where what it made is kept."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from nemo_automodel.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class CompileConfig:
    """How decoder blocks are compiled. Blocks of one shape share one compilation, so that start-up stays short.

    Args:
        enabled: None = on where the device is CUDA, unless deterministic algorithms were asked for
            (``rng.deterministic``): what is compiled depends on the shapes seen before, and a resumed run starts anew.
        mode: torch.compile's ``mode``; None is its default.
        fullgraph: raise where a block cannot be captured as one graph, instead of splitting it.
        dynamic: torch.compile's ``dynamic``; None lets sizes become dynamic once they change.
        cache_dir: Where compiled code is kept for the next start. Default ``$TORCHINDUCTOR_CACHE_DIR``, or where that is
            not set ``$HF_HOME/nemo_automodel/compiled`` (of several hosts, each in a directory of its own there): torch's
            own default is below /tmp, which a container loses.
    """

    enabled: bool | None = None
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            from torch._inductor import list_mode_options

            if self.mode not in (modes := list(list_mode_options())):
                raise ConfigError(f"compile.mode={self.mode!r}: write one of {', '.join(modes)}, or leave it out")

    def wanted(self, device: torch.device) -> bool:
        """Whether blocks on ``device`` are compiled."""
        if self.enabled is None:
            return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        return self.enabled

    def function(self, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """``forward`` compiled as blocks on ``device`` are; as it is where they are not."""
        if not self.wanted(device):
            return forward
        keep_compiled_code(self.cache_dir)
        return torch.compile(forward, mode=self.mode, fullgraph=self.fullgraph, dynamic=self.dynamic)

    def apply(self, blocks: Sequence[nn.Module], device: torch.device) -> bool:
        """Compile each of ``blocks`` in place (parameter names stay); return whether it was done."""
        if not self.wanted(device):
            return False
        keep_compiled_code(self.cache_dir)
        take_gradients_at_the_first(blocks)
        for block in blocks:
            options = {"comprehensive_padding": False} if self.mode is None and _padding_costs_a_copy(block) else None
            block.compile(mode=self.mode, fullgraph=self.fullgraph, dynamic=self.dynamic, options=options)
        return True


def _padding_costs_a_copy(block: nn.Module) -> bool:
    """Whether ``block`` has linear layers with a bias whose outputs the compiler would put into rows of other strides.

    It does so where a row is no multiple of 128 bytes. A product with a bias can then not add it by itself: the bias is
    written to every row first (6.6 ms of a forward of SigLIP's 27 blocks, 4304 wide, on an H200).
    """
    from torch._inductor import list_options

    linears = (m for m in block.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    two_bytes_each = any(m.out_features > 1024 and m.out_features % 64 for m in linears)
    return two_bytes_each and "comprehensive_padding" in list_options()


def take_gradients_at_the_first(blocks: Sequence[nn.Module]) -> None:
    """Let the first of ``blocks`` of each class take its input as one that needs a gradient, where it trains weights itself.

    Under LoRA nothing before it is trained, so that its backward, which ends at its first adapters, would be a compilation of
    its own. Now it is that of the others; going on to the input costs a thousandth of a step.
    """
    kinds: dict[type, list[nn.Module]] = {}
    for block in blocks:
        kinds.setdefault(type(block), []).append(block)
    for members in kinds.values():
        if len(members) > 1:
            members[0].register_forward_pre_hook(_needs_gradient)


@torch.compiler.disable
def _needs_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], torch.Tensor) or not torch.is_grad_enabled() or not block.training:
        return None
    hidden, *others = args
    if hidden.requires_grad or not hidden.is_floating_point() or not any(p.requires_grad for p in block.parameters()):
        return None
    return (hidden.detach().requires_grad_(), *others)


def keep_compiled_code(directory: str | None = None) -> None:
    """Tell torch's compiler and Triton to keep what they compile in ``directory``, for this process and its children.

    Args:
        directory: Default as for ``CompileConfig.cache_dir``. One that cannot be written to is left alone, and said.
    """
    chosen = directory or _from_environment("TORCHINDUCTOR_CACHE_DIR")
    path = Path(chosen).expanduser() if chosen else Path(constants.HF_HOME) / "nemo_automodel" / "compiled" / _host()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        logger.warning("compiled code cannot be kept in %s; set compile.cache_dir to a directory that can be written", path)  # fmt: skip
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    if _from_environment("TRITON_CACHE_DIR") is None:  # a directory a device, as torch does it, but for our kernels too
        os.environ["TRITON_CACHE_DIR"] = str(path / "triton" / os.environ.get("LOCAL_RANK", "0"))


def _host() -> str:
    """A directory for each host of several, which may share a disk: they would lock each other's files."""
    several = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
    return f"host_{os.environ['GROUP_RANK']}" if several and "GROUP_RANK" in os.environ else ""


def _from_environment(name: str) -> str | None:
    """What the user set ``name`` to; torch sets it to its own default, once its compiler is imported."""
    value = os.environ.get(name)
    torchs_own = Path(tempfile.gettempdir()) / "torchinductor_"
    return None if value is None or value.startswith(str(torchs_own)) else value
