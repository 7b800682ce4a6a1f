"""Output head + cross-entropy, forward and backward: ours against the plain formula, Liger and Cut Cross Entropy.

    python -m benchmarks.linear_ce [--out DIR]

Every contender gets the same bf16 hidden states, head and labels; its loss and gradients are compared with an fp32
reference on a slice before it is timed. Peak memory includes the inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import milliseconds, write
from nemo_automodel.components.loss.linear_ce import FusedLinearCrossEntropy

# rows, hidden size, vocabulary, head trained, share of rows with a label
SHAPES = [
    (8192, 4096, 128256, False, 1.0),
    (8192, 4096, 128256, True, 1.0),
    (8192, 4096, 128256, False, 0.5),
    (16384, 2048, 128256, True, 1.0),
    (8192, 2560, 262208, True, 1.0),
    (8192, 8192, 128256, False, 1.0),
    (8192, 4096, 32000, True, 1.0),
]
CPU_SHAPES = [(64, 32, 500, True, 1.0), (64, 32, 500, False, 0.5)]


def plain(hidden, weight, labels, indices):
    """What transformers computes: bf16 logits, fp32 cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def ours(hidden, weight, labels, indices):
    return FusedLinearCrossEntropy()(hidden, labels, weight, label_indices=indices)


def liger(hidden, weight, labels, indices):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


def cut(hidden, weight, labels, indices):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, reduction="sum")


CONTENDERS = {"plain torch": plain, "Liger": liger, "Cut Cross Entropy": cut, "ours": ours}


def problem(rows, hidden_size, vocab_size, trained, labelled, device):
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, device=device, dtype=torch.bfloat16) * 0.02).requires_grad_(trained)
    labels = torch.randint(0, vocab_size, (rows,), device=device)
    labels[int(rows * labelled) :] = -100
    return hidden, weight, labels[torch.randperm(rows, device=device)]


def step(contender, hidden, weight, labels, indices):
    hidden.grad = weight.grad = None
    loss = contender(hidden, weight, labels, indices)
    (loss / len(labels)).backward()
    return loss.detach()


def errors(contender, hidden, weight, labels, indices, reference):
    """Relative errors of loss, d hidden and dW (in fp32 against ``reference``)."""
    loss = step(contender, hidden, weight, labels, indices)
    got = [loss, hidden.grad, weight.grad]
    return [
        None if b is None else ((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, reference, strict=True)
    ]


def fp32_reference(hidden, weight, labels):
    """Loss and gradients in fp32 without tf32 (on as many rows as are given)."""
    h, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_(weight.requires_grad)
    loss = step(plain, h, w, labels, None)
    return [loss.double(), h.grad.double(), None if w.grad is None else w.grad.double()]


def run(shape, device):
    rows = []
    hidden, weight, labels = problem(*shape, device)
    indices = (labels != -100).nonzero().squeeze(1)
    few = slice(0, min(len(labels), 1024))
    part = hidden.detach()[few].requires_grad_()
    reference = fp32_reference(part, weight, labels[few])
    part_indices = (labels[few] != -100).nonzero().squeeze(1)
    for name, contender in CONTENDERS.items():
        row = dict(zip(("rows", "hidden", "vocab", "head trained", "labelled"), shape, strict=True)) | {
            "contender": name
        }
        try:
            e_loss, e_hidden, e_weight = errors(contender, part, weight, labels[few], part_indices, reference)
            part.grad = weight.grad = None
            milli, spread = milliseconds(lambda c=contender: step(c, hidden, weight, labels, indices), 3, 10)
            row |= {"ms": round(milli, 2), "spread ms": round(spread, 2)}
            hidden.grad = weight.grad = None
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = sum(t.nbytes for t in reference if t is not None)
                step(contender, hidden, weight, labels, indices)
                row["peak GiB"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
            row |= {"err loss": f"{e_loss:.1e}", "err dh": f"{e_hidden:.1e}"}
            row["err dW"] = None if e_weight is None else f"{e_weight:.1e}"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        print(row, flush=True)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="directory for the results (default benchmarks/results)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for shape in (SHAPES if device == "cuda" else CPU_SHAPES) for row in run(shape, device)]
    columns = ["rows", "hidden", "vocab", "head trained", "labelled", "contender", "ms", "spread ms", "peak GiB"]
    print(write("linear_ce", rows, [*columns, "err loss", "err dh", "err dW", "failed"], arguments.out))


if __name__ == "__main__":
    main()
