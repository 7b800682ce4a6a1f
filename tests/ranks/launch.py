"""Run a function of a test module on real gloo ranks, through torchrun, as a user's run would be started."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(target: str, nproc: int, *args: object, timeout: float = 240, check: bool = True, env: dict | None = None):
    """Start ``target`` (a file, or ``module:function``) on ``nproc`` ranks; fails with the whole output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    if target.endswith(".py"):
        command += [target, *map(str, args)]
    else:
        module, function = target.split(":")
        command += [
            "--no-python",
            sys.executable,
            "-c",
            f"import os, sys; from {module} import {function}; {function}(*sys.argv[1:]); "
            "sys.stdout.flush(); sys.stderr.flush(); os._exit(0)",  # gloo's threads may abort an interpreter that ends
        ]
        command += [*map(str, args)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert not check or result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]
    return result
