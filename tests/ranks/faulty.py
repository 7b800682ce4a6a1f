"""The recipe with one fault in it: ``python -m``-like script for torchrun. FAULT=what, FAULT_RANK, FAULT_CALL say which.

The fault sits in the forward pass of a micro-batch (FAULT_CALL counts them on that rank), in the middle of a step.
"""

import os
import signal
import sys
import time

from nemo_automodel.recipes.llm import finetune
from nemo_automodel.recipes.run import run_recipe

calls = 0
forward_loss = finetune.forward_loss


def faulty(model, batch, loss_fn):
    global calls
    calls += model.training
    ce_sum, aux = forward_loss(model, batch, loss_fn)
    if os.environ["RANK"] == os.environ.get("FAULT_RANK", "1") and calls == int(os.environ.get("FAULT_CALL", "5")):
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


def nan(ce_sum):
    return ce_sum * float("nan")


def infinite(ce_sum):
    return ce_sum + float("inf")  # a loss that is not finite, with gradients that are


FAULTS = {f.__name__: f for f in (error, leave, vanish, stop, hang, nan, infinite)}
finetune.forward_loss = faulty

if __name__ == "__main__":
    sys.exit(run_recipe("llm", sys.argv[1:], finetune.main))
