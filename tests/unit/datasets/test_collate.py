"""Failure classes 2 and 4 where batches are made: padding by length, documents kept apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from nemo_automodel.components.datasets.collate import collate_packed, collate_padded
from nemo_automodel.components.datasets.llm.column_mapped import make_instruction_dataset
from nemo_automodel.components.datasets.loader import DataLoader
from nemo_automodel.components.datasets.packing import PackedSequence
from nemo_automodel.types import IGNORE_INDEX
from tests.builders import make_tokenizer, tiny_config


def row(*ids: int):
    return np.array(ids), np.array([*ids[1:], IGNORE_INDEX])


def test_class_4_padding_follows_lengths_not_ids() -> None:
    eos = 1
    batch = collate_padded([row(5, 6, eos), row(7, eos, 8, 9, eos)], [4, 2], pad_id=eos, pad_to_multiple_of=8)
    assert batch["input_ids"].tolist() == [[5, 6, eos, eos, eos, eos, eos, eos], [7, eos, 8, 9, eos, eos, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, eos, *[-100] * 6], [eos, 8, 9, eos, *[-100] * 4]]
    assert batch["label_indices"].tolist() == [0, 1, 8, 9, 10, 11]
    assert batch["num_label_tokens"] == 6
    assert batch["sample_ids"] == [4, 2]
    assert {batch[name].dtype for name in ("input_ids", "labels", "attention_mask", "label_indices")} == {torch.int64}


def test_no_mask_when_nothing_is_padded() -> None:
    assert "attention_mask" not in collate_padded([row(*range(3, 11))] * 2, [0, 1])
    assert collate_padded([row(3, 4, 5)], [0], pad_to_multiple_of=1)["input_ids"].shape == (1, 3)


def test_class_2_packed_rows_say_where_documents_end() -> None:
    batch = collate_packed([[row(5, 6, 7), row(8, 9)], [row(3, 4, 5, 6, 7, 8)]], [0, 1, 2], size=6)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 3, 4, 5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 12]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert (batch["max_length_q"], batch["max_length_k"]) == (6, 6)
    assert batch["labels"].tolist() == [[6, 7, -100, 9, -100, -100, 4, 5, 6, 7, 8, -100]]
    assert "attention_mask" not in batch


def test_an_empty_pack_is_one_masked_document() -> None:
    batch = collate_packed([[]], [], size=8)
    assert batch["cu_seq_lens_q"].tolist() == [0, 8]
    assert batch["num_label_tokens"] == 0


@pytest.fixture
def packed(tmp_path):
    lines = [f'{{"question": "fox {"fox " * (i % 5)}", "answer": "dog {i}"}}\n' for i in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    tokenizer = make_tokenizer()
    data = make_instruction_dataset(tokenizer, str(tmp_path / "a.jsonl"))
    options = {
        "dataset": data,
        "tokenizer": tokenizer,
        "global_batch_size": 2,
        "local_batch_size": 2,
        "drop_last": False,
    }
    return data, options


def test_class_2_no_target_crosses_a_document(packed) -> None:
    data, options = packed
    seen = 0
    for (batch,) in DataLoader(packing=PackedSequence(64), **options).steps(0):
        assert batch["input_ids"].shape == (1, 128)
        bounds = batch["cu_seq_lens_q"].tolist()
        assert (batch["labels"][0, torch.tensor(bounds[1:]) - 1] == IGNORE_INDEX).all()
        documents = [batch["input_ids"][0, a:b].tolist() for a, b in itertools.pairwise(bounds)]
        own = [data[i]["input_ids"] for i in batch["sample_ids"]]
        assert [d for d in documents if set(d) != {2}] == own
        seen += len(own)
    assert seen == 24


def test_packed_and_padded_epochs_have_the_same_loss(packed) -> None:
    """Class 2 and 1 at once, by an independent oracle: transformers, one document at a time, fp32."""
    data, options = packed
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="eager").eval()

    def total(loader) -> tuple[float, int]:
        loss, count = 0.0, 0
        for (batch,) in loader.steps(0):
            extra = {k: batch[k] for k in ("attention_mask", "position_ids") if k in batch}
            if "cu_seq_lens_q" in batch:
                document = torch.bucketize(
                    torch.arange(batch["labels"].numel()), batch["cu_seq_lens_q"][1:], right=True
                )
                same = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
                extra["attention_mask"] = torch.where(same, 0.0, torch.finfo(torch.float32).min)[None, None]
            logits = model(input_ids=batch["input_ids"], **extra).logits.flatten(0, 1)[batch["label_indices"]]
            labels = batch["labels"].flatten()[batch["label_indices"]]
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            count += batch["num_label_tokens"]
        return loss, count

    with torch.no_grad():
        one_by_one = 0.0
        for i in range(len(data)):
            ids = torch.tensor([data[i]["input_ids"]])
            labels = torch.tensor([IGNORE_INDEX, *data[i]["labels"][:-1]])[
                None
            ]  # unshifted again, as transformers wants
            one_by_one += model(input_ids=ids, labels=labels).loss.item() * int((labels != IGNORE_INDEX).sum())
        padded = total(DataLoader(**options))
        packed_total = total(DataLoader(packing=PackedSequence(64), **options))
    assert padded[1] == packed_total[1] == data.stats.label_tokens
    assert padded[0] == pytest.approx(one_by_one, rel=1e-6)
    assert packed_total[0] == pytest.approx(one_by_one, rel=1e-6)
