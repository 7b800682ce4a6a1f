"""Kernels and their fp32 oracles. They import nothing of the rest of the package."""

import hashlib
from pathlib import Path

from torch.compiler import config


def mark_compiled_code(folder: Path) -> None:
    """Make the kernels' code in ``folder`` part of torch's key of compiled code, which has only the names of their ops.

    Without it, what was compiled with another version of them is taken from torch's cache and called with this one's.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    config.cache_key_tag += f" nemo_automodel.kernels {digest.hexdigest()[:16]}"


mark_compiled_code(Path(__file__).parent)
