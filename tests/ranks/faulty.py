"""The recipe with one fault in it, as a script for torchrun. FAULT=what, FAULT_RANK, FAULT_CALL say which.

The fault sits in the forward pass of a micro-batch (FAULT_CALL counts them on that rank), in the middle of a step. SLOW
makes a place slow enough to be hit there: it says so, and takes three seconds.
"""

import os
import signal
import sys
import time

import torch

from nemo_automodel.components.checkpoint import publish
from nemo_automodel.recipes.llm import finetune
from nemo_automodel.recipes.run import run_recipe

calls = 0
forward_loss = finetune.forward_loss


def faulty(model, batch, loss_fn):
    global calls
    calls += model.training
    if not model.training:
        slow("validation", 1)
    ce_sum, aux = forward_loss(model, batch, loss_fn)
    if (
        "FAULT" in os.environ
        and os.environ["RANK"] == os.environ.get("FAULT_RANK", "1")
        and calls == int(os.environ.get("FAULT_CALL", "5"))
    ):
        ce_sum = FAULTS[os.environ["FAULT"]](ce_sum)
    return ce_sum, aux


def error(_):
    raise ValueError("a fault of the user's code")


def leave(_):
    sys.exit(0)


def vanish(_):
    os._exit(0)


def stop(_):
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(_):
    time.sleep(600)


def usr1(ce_sum):
    os.kill(os.getpid(), signal.SIGUSR1)
    return ce_sum


def nan(ce_sum):
    return ce_sum * float("nan")


def infinite(ce_sum):
    return ce_sum + float("inf")  # a loss that is not finite, with gradients that are


def memory(_):
    try:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB "
            "is free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. See documentation"
        )
    except torch.OutOfMemoryError as error:
        raise RuntimeError("in a wrapper") from error


FAULTS = {f.__name__: f for f in (error, memory, leave, vanish, stop, hang, usr1, nan, infinite)}
finetune.forward_loss = faulty


def slow(place, seconds):
    if os.environ.get("SLOW") == place:
        print("slow", place, flush=True)
        time.sleep(seconds)


def slow_seal(*args):
    slow("save", 3)
    return seal(*args)


seal, publish.seal = publish.seal, slow_seal

if __name__ == "__main__":
    sys.exit(run_recipe("llm", sys.argv[1:], finetune.main))
