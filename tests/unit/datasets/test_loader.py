"""Failure classes 9 and 10: the order is a function of (seed, epoch, position), and steps planned are steps run."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import timeit

import datasets
import numpy as np
import pytest
import torch

from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence, pack
from nemo_automodel.errors import AutoModelError, DataError
from nemo_automodel.types import IGNORE_INDEX, Loader
from tests.builders import make_tokenizer

SIZE = 32


def rows(n: int = 50, longest: int = 20, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of 2 to ``longest`` tokens; row i holds only the id i + 3, so a batch says whose it is."""
    draw = random.Random(seed)
    out = []
    for i in range(n):
        length = draw.randint(2, longest)
        out.append({"input_ids": [i + 3] * length, "labels": [i + 3] * (length - 1) + [IGNORE_INDEX]})
    return out


def ids_of(loader: DataLoader, epoch: int = 0, first_step: int = 0) -> list[list[list[int]]]:
    """Sample ids by step and micro-batch."""
    return [[batch["sample_ids"] for batch in step] for step in loader.steps(epoch, first_step)]


def global_steps(loaders: list[DataLoader], epoch: int = 0, first_step: int = 0) -> list[list[int]]:
    """The sample ids of each step over all ranks, sorted (a step is a set)."""
    by_rank = [ids_of(loader, epoch, first_step) for loader in loaders]
    return [sorted(itertools.chain(*itertools.chain(*step))) for step in zip(*by_rank, strict=True)]


def ranks(dp: int, local: int, **options) -> list[DataLoader]:
    options = {"dataset": rows(), "global_batch_size": 8, "seed": 5, **options}
    return [DataLoader(dp_rank=r, dp_size=dp, local_batch_size=local, **options) for r in range(dp)]


PACKED = {"packing": PackedSequence(SIZE), "global_batch_size": 4}
LAYOUTS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


@pytest.mark.parametrize(
    "options", [{}, PACKED, {"drop_last": False}, {**PACKED, "drop_last": False}, {"shuffle": False}]
)
def test_class_9_global_batches_are_the_same_for_every_layout(options) -> None:
    expected = global_steps(ranks(1, 4, **options))
    for dp, local in LAYOUTS:
        assert global_steps(ranks(dp, local, **options)) == expected


@pytest.mark.parametrize("options", [{"drop_last": False}, {**PACKED, "drop_last": False}])
def test_class_9_every_row_exactly_once_an_epoch(options) -> None:
    for epoch, (dp, local) in itertools.product(range(2), LAYOUTS):
        seen = list(itertools.chain(*global_steps(ranks(dp, local, **options), epoch)))
        assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {**PACKED, "drop_last": False}])
def test_class_9_resume_from_any_step_and_any_number_of_workers(options, workers: int) -> None:
    (whole,) = ranks(1, 2, **options)
    (resumed,) = ranks(1, 2, num_workers=workers, **options)
    for epoch in range(2):
        expected = ids_of(whole, epoch)
        starts = range(len(expected) + 1) if not workers else (0, len(expected) // 2, len(expected))
        for start in starts:
            assert ids_of(resumed, epoch, start) == expected[start:]


def test_class_9_resume_on_another_number_of_ranks() -> None:
    expected = global_steps(ranks(1, 4, **PACKED))
    assert global_steps(ranks(2, 1, **PACKED), 0, 2) == expected[2:]
    assert global_steps(ranks(4, 1, **PACKED), 0, 1) == expected[1:]


def test_micro_batches_are_the_documented_slice() -> None:
    local, dp = 2, 2
    loaders = ranks(dp, local)
    order = [i for step in range(loaders[0].steps_per_epoch(0)) for i in loaders[0].global_batch(0, step)]
    for rank, loader in enumerate(loaders):
        for step, batches in enumerate(ids_of(loader)):
            for i, batch in enumerate(batches):
                start = step * 8 + i * local * dp
                assert batch == order[start : start + local * dp][rank::dp]


def test_class_9_the_global_rng_is_neither_read_nor_moved() -> None:
    (loader,) = ranks(1, 2)
    torch.manual_seed(1)
    first = ids_of(loader)
    torch.manual_seed(2)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert ids_of(loader) == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_seed_and_epoch_change_the_order() -> None:
    orders = {str(ids_of(ranks(1, 2, seed=seed)[0], epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert list(itertools.chain(*itertools.chain(*ids_of(ranks(1, 2, shuffle=False)[0])))) == list(range(48))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("packing", [None, PackedSequence(SIZE)])
def test_class_10_planned_steps_are_executed_steps_on_every_rank(drop_last: bool, packing) -> None:
    for epoch, (dp, local) in itertools.product(range(3), LAYOUTS):
        loaders = ranks(dp, local, global_batch_size=4, drop_last=drop_last, packing=packing)
        shapes = [[len(step) for step in ids_of(loader, epoch)] for loader in loaders]
        assert all(shape == shapes[0] for shape in shapes)
        assert len(shapes[0]) == loaders[0].steps_per_epoch(epoch)


def test_class_10_packing_is_planned_for_each_epoch() -> None:
    (loader,) = ranks(1, 1, packing=PackedSequence(SIZE), global_batch_size=1, dataset=rows(200))
    planned = [loader.steps_per_epoch(epoch) for epoch in range(6)]
    assert planned == [len(ids_of(loader, epoch)) for epoch in range(6)]
    assert len(set(planned)) > 1


def test_drop_last_is_counted_and_its_absence_fills_without_counting() -> None:
    (dropping,) = ranks(1, 4)
    assert (dropping.steps_per_epoch(0), dropping.items_left_over()) == (6, 2)
    filling = ranks(4, 1, drop_last=False)
    assert filling[0].steps_per_epoch(0) == 7
    assert filling[0].items_left_over() == 0
    last = [next(iter(loader.steps(0, 6))) for loader in filling]
    assert [len(batches) for batches in last] == [1, 1, 1, 1]
    assert [len(batches[0]["sample_ids"]) for batches in last] == [1, 1, 0, 0]
    assert [batches[0]["num_label_tokens"] > 0 for batches in last] == [True, True, False, False]
    assert all(batches[0]["input_ids"].shape[1] == 8 for batches in last[2:])


def test_it_is_a_loader_and_has_a_fingerprint() -> None:
    (loader,) = ranks(1, 2)
    typed: Loader = loader
    assert typed.steps_per_epoch(0) == 6
    others = [
        ranks(1, 2, seed=6)[0],
        ranks(1, 2, dataset=rows(51))[0],
        ranks(1, 2, **PACKED)[0],
        ranks(1, 2, shuffle=False)[0],
    ]
    assert len({loader.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert loader.fingerprint == ranks(2, 1)[1].fingerprint


def test_users_own_datasets() -> None:
    class Torch(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int):
            row = rows()[index]
            return {name: torch.tensor(values) for name, values in row.items()}

    expected = ids_of(ranks(1, 2, **PACKED)[0])
    for data in (rows(), datasets.Dataset.from_list(rows()), Torch()):
        (loader,) = ranks(1, 2, dataset=data, **PACKED)
        assert ids_of(loader) == expected
        assert next(loader.steps(0))[0]["labels"].dtype == torch.int64


# --- mistakes --------------------------------------------------------------------------------------------------------
def failing(match: str, **options) -> None:
    with pytest.raises(DataError, match=match):
        list(ranks(1, 1, **options)[0].steps(0))


def test_fewer_rows_than_a_batch_gives_the_numbers() -> None:
    failing(r"gives 5 rows, fewer than step_scheduler.global_batch_size=8.*to 5 or less", dataset=rows(5))
    failing(r"gives 1 packs of 32 tokens \(from 3 rows\)", dataset=rows(3), packing=PackedSequence(SIZE))
    assert ranks(1, 1, dataset=rows(5), drop_last=False)[0].steps_per_epoch(0) == 1
    failing("no rows", dataset=[])


def test_batch_sizes_must_divide() -> None:
    with pytest.raises(DataError, match=r"global_batch_size=8: must be a multiple of .* = 3 × 2"):
        ranks(2, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_named(workers: int) -> None:
    tokenizer = make_tokenizer()
    good = {"input_ids": [3, 4], "labels": [4, IGNORE_INDEX]}
    cases = {
        r"row 1: token id 384 is outside the tokenizer's vocabulary of 384": {
            "input_ids": [3, 384],
            "labels": [4, IGNORE_INDEX],
        },
        r"row 1: token id -5 is negative": {"input_ids": [3, 4], "labels": [-5, IGNORE_INDEX]},
        r"row 1: input_ids and labels must be non-empty lists of one length, got \(2,\) and \(1,\)": {
            **good,
            "labels": [4],
        },
        r"row 1: expected input_ids and labels.* got \{text: str\}": {"text": "hello"},
    }
    for match, row in cases.items():
        failing(match, dataset=[good, row], global_batch_size=2, tokenizer=tokenizer, num_workers=workers)


def test_overlong_documents_are_an_error_or_dropped_and_counted() -> None:
    data = [*rows(20), {"input_ids": [9] * 40, "labels": [9] * 40}]
    failing(
        r"1 of 21 rows are longer than .*=32 \(the longest has 40 tokens\); set dataset.seq_length=32",
        dataset=data,
        **PACKED,
    )
    (loader,) = ranks(1, 1, dataset=data, packing=PackedSequence(SIZE, "drop"), global_batch_size=1)
    assert loader.rows_dropped == 1
    assert sorted(itertools.chain(*itertools.chain(*ids_of(loader)))) == list(range(20))


class Killed:
    """A dataset whose worker process is killed at row 3."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        if index == 3:
            time.sleep(0.3)  # until the loader waits for it
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": [3, 4], "labels": [4, IGNORE_INDEX]}


def test_a_killed_worker_is_one_error() -> None:
    (loader,) = ranks(1, 1, dataset=Killed(), num_workers=1)
    with pytest.raises(AutoModelError, match=r"a data worker stopped: .*num_workers=0"):
        list(loader.steps(0))


def test_packing_a_hundred_thousand_rows_takes_well_under_a_second() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 900) for _ in range(100_000)]
    packs = pack(range(100_000), lengths, 2048)
    # Neither what others take of the processor nor, as `timeit` sees to, the garbage that other tests left behind.
    seconds = timeit.repeat(lambda: pack(range(100_000), lengths, 2048), timer=time.process_time, number=1, repeat=3)
    assert min(seconds) < 1.0
    assert list(itertools.chain(*packs)) == list(range(100_000))
    assert max(sum(lengths[i] for i in p) for p in packs) <= 2048
