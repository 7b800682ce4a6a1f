"""Which architectures tensor parallelism works on: a fixed few always, all of them in ``make test-all``.

Claims: of the architectures without a plan of their own at least 40 can be cut, and every plan that a model brings is
used or found wrong; the page in docs/ says what was found.
"""

import pytest

from tests.ranks.launch import ROOT
from tests.ranks.tp_coverage import causal_lms, run, table

_SAMPLE = {  # every way that a plan comes about
    "phi3": "own",  # fused weights, gathered and split
    "granite_swa": "own",  # a bare parameter cut
    "gpt2": "inferred",  # transposed fused weights in three parts
    "gpt_neox_japanese": "inferred",  # fused by head
    "bert": "inferred",  # an output head whose bias has two names
    "roformer": "inferred",  # positions frozen by its constructor, which loading trains
    "bloom": "inferred",  # attention that cannot be cut beside an MLP that can
    "mamba": "none",
}


def test_a_sample_is_cut_as_the_page_says():
    rows = run(list(_SAMPLE))
    assert {row.name: row.plan for row in rows} == _SAMPLE
    page = (ROOT / "docs" / "tensor-parallel.md").read_text()
    for row in rows:
        assert f"| {row.name} | {row.plan} | {f'{row.share:.0%}' if row.plan != 'none' else '-'} |" in page, row


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_all_architectures():
    rows = run(causal_lms())
    (ROOT / "docs" / "tensor-parallel.md").write_text(table(rows))
    assert sum(row.plan == "inferred" for row in rows) >= 40
    assert sum(row.plan == "own" for row in rows) >= 90
