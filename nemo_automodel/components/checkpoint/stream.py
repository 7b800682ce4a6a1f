"""Writing a planned export: the work spread over ranks, one group of tensors whole at a time and only where it is written.

Every file belongs to one rank. In each round every such rank takes the next group of its files: the others send their
parts of it, it puts them together, converts and writes them. What takes memory beside the model is one group a rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from nemo_automodel.components.checkpoint.export import Export, Group, Part
from nemo_automodel.components.checkpoint.ranks import Ranks
from nemo_automodel.components.checkpoint.safetensors_file import SafetensorsFile
from nemo_automodel.components.checkpoint.shards import Intervals, count

INDEX = "model.safetensors.index.json"
Region = tuple[Intervals, ...]


def write_weights(directory: Path, export: Export, ranks: Ranks) -> None:
    """Write the files of ``export`` and their index into ``directory``; every rank calls it.

    Raises CheckpointError, on every rank: one could not be written.
    """
    regions = ranks.gather({key: part.region for key, part in _parts(export)})
    holders = [{key: _first_with(regions, key, rank) for key, _ in _parts(export)} for rank in range(ranks.world_size)]
    ranks.together("Writing the weights", lambda: _write_all(directory, export, ranks, regions, holders))
    ranks.on_main("Writing the index of the weights", lambda: _write_index(directory, export))


def _parts(export: Export) -> Iterator[tuple[tuple[str, int, str], Part]]:
    """Every part with a key that is the same on every rank."""
    for file, groups in export.files.items():
        for number, group in enumerate(groups):
            for name, part in group.parts.items():
                yield (file, number, name), part


def _first_with(regions: list[dict[tuple[str, int, str], Region]], key: tuple[str, int, str], owner: int) -> list[int]:
    """For a tensor that ``owner`` puts together: the ranks that send their parts, one for each distinct part."""
    senders: dict[Region, int] = {regions[owner][key]: owner}
    for rank, of_rank in enumerate(regions):
        senders.setdefault(of_rank[key], rank)
    return [rank for region, rank in senders.items() if all(count(intervals) for intervals in region)]


def _write_all(
    directory: Path,
    export: Export,
    ranks: Ranks,
    regions: list[dict[tuple[str, int, str], Region]],
    holders: list[dict[tuple[str, int, str], list[int]]],
) -> None:
    turns: list[list[tuple[str, int, Group]]] = [[] for _ in range(ranks.world_size)]
    for position, (name, groups) in enumerate(export.files.items()):
        turns[position % ranks.world_size] += [(name, number, group) for number, group in enumerate(groups)]
    failure: Exception | None = None
    with ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}

        def write(file: str, group: Group, whole: dict[str, Tensor]) -> None:
            if file not in files:
                outputs = {name: what for g in export.files[file] for name, what in g.outputs.items()}
                files[file] = stack.enter_context(SafetensorsFile(directory / file, outputs))
            for name, tensor in group.convert(whole).items():
                files[file].write(name, tensor)

        for turn in range(max(map(len, turns))):
            this = {owner: turns[owner][turn] for owner in range(ranks.world_size) if turn < len(turns[owner])}
            whole = _exchange(this, ranks, regions, holders)
            if whole is None or failure is not None:
                continue  # a rank that failed goes on sending, or the others would wait for it
            file, _, group = this[ranks.rank]
            try:
                write(file, group, whole)
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure


def _exchange(
    this: Mapping[int, tuple[str, int, Group]],
    ranks: Ranks,
    regions: list[dict[tuple[str, int, str], Region]],
    holders: list[dict[tuple[str, int, str], list[int]]],
) -> dict[str, Tensor] | None:
    """Send this rank's parts to the owners of ``this`` round's groups; returns this rank's own group, put together."""
    mine: dict[str, Tensor] | None = None
    waits: list[Callable[[], None]] = []
    for owner, (file, number, group) in sorted(this.items()):
        for name, part in group.parts.items():
            key = (file, number, name)
            senders = holders[owner][key]
            if owner == ranks.rank:
                mine = {} if mine is None else mine
                mine[name] = torch.empty(part.shape, dtype=part.dtype)
                for sender in senders:
                    waits.append(_receive(mine[name], part, regions[sender][key], sender, ranks))
            elif ranks.rank in senders:
                waits.append(ranks.send(part.sent(), owner))
    for wait in waits:
        wait()
    return mine


def _receive(whole: Tensor, part: Part, region: Region, sender: int, ranks: Ranks) -> Callable[[], None]:
    """Start getting one part of ``whole``; the call that is returned ends it."""
    if sender == ranks.rank:
        return lambda: _place(whole, region, part.local)
    rows = region[0] if region else ()
    if len(rows) == 1 and all(i == ((0, n),) for i, n in zip(region[1:], whole.shape[1:], strict=True)):
        start, stop = rows[0]
        return ranks.receive(whole.narrow(0, start, stop - start), sender)
    buffer = torch.empty([count(intervals) for intervals in region], dtype=whole.dtype)
    wait = ranks.receive(buffer, sender)

    def finish() -> None:
        wait()
        _place(whole, region, buffer)

    return finish


def _place(whole: Tensor, region: Region, values: Tensor, dim: int = 0) -> None:
    """Put ``values`` at ``region`` of ``whole``."""
    if dim == len(region):
        whole.copy_(values)
        return
    done = 0
    for start, stop in region[dim]:
        size = stop - start
        _place(whole.narrow(dim, start, size), region, values.narrow(dim, done, size), dim + 1)
        done += size


def _write_index(directory: Path, export: Export) -> None:
    if len(export.files) == 1:
        return
    weight_map = {name: file for file, groups in export.files.items() for group in groups for name in group.outputs}
    total = sum(group.nbytes for groups in export.files.values() for group in groups)
    index = {"metadata": {"total_parameters": export.num_parameters, "total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
