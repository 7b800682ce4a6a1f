"""Failure classes 3, 4, 5 and 8 where rows become samples, and the formats of the ready-made datasets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nemo_automodel.components.datasets import sources, tokenized
from nemo_automodel.components.datasets.llm.chat import make_chat_dataset
from nemo_automodel.components.datasets.llm.column_mapped import make_instruction_dataset
from nemo_automodel.components.datasets.llm.hellaswag import make_hellaswag_dataset
from nemo_automodel.components.datasets.llm.squad import make_squad_dataset
from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX
from tests.builders import make_tokenizer

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "France",
            "paragraphs": [
                {
                    "context": "Paris is the capital of France.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "What is the capital?",
                            "answers": [{"text": "Paris", "answer_start": 0}],
                        },
                        {"id": "2", "question": "Of what?", "answers": [{"text": "France", "answer_start": 24}]},
                    ],
                }
            ],
        }
    ],
}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qa(path, n: int = 4, length: int = 1) -> str:
    return write(path, [{"question": "fox " * (length if i else 1), "answer": f"dog {i}"} for i in range(n)])


def answer_of(tokenizer, sample) -> str:
    return tokenizer.decode([label for label in sample["labels"] if label != IGNORE_INDEX])


def test_squad_from_disk_supervises_the_answer_and_eos(tmp_path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    tokenizer = make_tokenizer("plain")
    data = make_squad_dataset(tokenizer, str(tmp_path / "squad.json"))
    text = "Context: Paris is the capital of France. Question: What is the capital? Answer: Paris</s>"
    assert tokenizer.decode(data[0]["input_ids"]) == text
    assert [answer_of(tokenizer, data[i]) for i in range(2)] == [" Paris</s>", " France</s>"]
    ids = data[0]["input_ids"]
    assert ids == tokenizer(text[: -len("</s>")])["input_ids"] + [tokenizer.eos_token_id]
    assert all(label in (IGNORE_INDEX, following) for label, following in zip(data[0]["labels"], ids[1:], strict=False))
    assert data[0]["labels"][-1] == IGNORE_INDEX
    assert (data.stats.rows, data.stats.dropped, data.stats.truncated) == (2, 0, 0)
    assert data.stats.tokens == sum(len(data[i]["input_ids"]) for i in range(2)) == data.lengths.sum()
    assert data.stats.label_tokens == sum(label != IGNORE_INDEX for i in range(2) for label in data[i]["labels"])


def test_squad_in_a_chat_template(tmp_path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    tokenizer = make_tokenizer("llama3")
    data = make_squad_dataset(tokenizer, str(tmp_path / "squad.json"), use_chat_template=True)
    assert answer_of(tokenizer, data[0]) == "Paris<|eot_id|>"


def test_class_5_plain_rows_have_one_bos_if_the_tokenizer_adds_one(tmp_path) -> None:
    for kind, count in (("plain", 0), ("bos", 1), ("llama3", 1)):
        tokenizer = make_tokenizer(kind)
        data = make_instruction_dataset(tokenizer, qa(tmp_path / "a.jsonl"))
        ids = data[1]["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == count
        assert ids[:-1] == tokenizer("fox \ndog 1")["input_ids"]
    path = write(tmp_path / "bos.jsonl", [{"question": "<s>fox", "answer": "dog"}])  # a row that brings its own
    assert make_instruction_dataset(make_tokenizer("bos"), path)[0]["input_ids"].count(0) == 1


@pytest.mark.parametrize("kind", ["plain", "pad_eos", "no_pad"])
def test_class_4_eos_is_supervised_once_whatever_the_pad(tmp_path, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "dog"}, {"question": "q", "answer": "dog</s>"}])
    data = make_instruction_dataset(tokenizer, path)
    assert [data[i]["labels"].count(tokenizer.eos_token_id) for i in range(2)] == [1, 1]


def test_no_eos_says_what_to_set(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no EOS token.*set tokenizer\.eos_token"):
        make_instruction_dataset(make_tokenizer("no_eos"), qa(tmp_path / "a.jsonl"))


def test_a_space_that_ends_the_prompt_does_not_hide_the_first_word(tmp_path) -> None:
    tokenizer = make_tokenizer("plain")
    path = write(tmp_path / "a.jsonl", [{"question": "What does the fox do?", "answer": "jumps over"}])
    assert answer_of(tokenizer, make_instruction_dataset(tokenizer, path, separator=" ")[0]).strip() == "jumps over</s>"


def test_class_3_truncation_that_removes_every_label_is_counted(tmp_path) -> None:
    rows = [{"question": "fox " * (50 if i % 4 == 0 else 2), "answer": "dog"} for i in range(8)]
    rows.append({"question": "fox", "answer": "dog " * 50})
    data = make_instruction_dataset(make_tokenizer(), write(tmp_path / "a.jsonl", rows), seq_length=16)
    stats = data.stats
    assert (stats.rows, stats.dropped, stats.truncated, len(data)) == (9, 2, 3, 7)
    assert [data.source_row(i) for i in range(7)] == [1, 2, 3, 5, 6, 7, 8]
    full = make_instruction_dataset(make_tokenizer(), str(tmp_path / "a.jsonl"))
    assert stats.tokens_cut == sum(max(0, n - 16) for n in full.lengths)
    assert max(data.lengths) == 16
    assert data[6]["labels"][-1] == IGNORE_INDEX
    assert data[6]["input_ids"] == full[8]["input_ids"][:16]
    assert "2 rows dropped with nothing to train on, 3 truncated" in str(stats)


def test_class_3_more_than_half_dropped_is_an_error(tmp_path) -> None:
    with pytest.raises(
        DataError, match=r"3 of 4 rows have nothing to train on: in 3 the prompt alone fills seq_length=16"
    ):
        make_instruction_dataset(make_tokenizer(), qa(tmp_path / "a.jsonl", 4, 50), seq_length=16)
    path = write(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}] * 3)
    with pytest.raises(DataError, match=r"3 of 3 rows have nothing to train on: .* 3 have an empty or unmarked answer"):
        make_chat_dataset(make_tokenizer("chatml"), path)


def test_class_8_the_cache_key_follows_everything_that_matters(tmp_path, cache) -> None:
    path = qa(tmp_path / "a.jsonl")
    seen = {}

    def key(label: str, tokenizer=None, **options) -> str:
        data = make_instruction_dataset(tokenizer or make_tokenizer("chatml"), path, **options)
        seen[label] = data.fingerprint
        return data.fingerprint

    base = key("base")
    assert key("base") == base
    key("length", seq_length=64)
    key("loss", answer_only_loss=False)
    key("template", use_chat_template=True)
    key("mapping", column_mapping={"context": "question", "answer": "answer"})
    key("limit", limit_dataset_samples=2)
    added = make_tokenizer("chatml")
    added.add_tokens(["fox"])
    key("added token", added)
    other = make_tokenizer("chatml")
    other.chat_template += " "
    key("other template", other, use_chat_template=True)
    key("other eos", make_tokenizer("plain"))
    qa(tmp_path / "a.jsonl", 5)
    key("other rows")
    assert len(set(seen.values())) == len(seen) == 10
    assert len(list((cache / "nemo_automodel").glob("*.arrow"))) == 10


def test_class_8_an_edit_that_keeps_size_and_time_is_seen(tmp_path) -> None:
    import os

    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "dog"}])
    before = os.stat(path)
    first = make_instruction_dataset(make_tokenizer(), path)
    write(tmp_path / "a.jsonl", [{"question": "q", "answer": "fox"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = make_instruction_dataset(make_tokenizer(), path)
    assert answer_of(make_tokenizer(), first[0]) == "dog</s>"
    assert answer_of(make_tokenizer(), second[0]) == "fox</s>"


def test_class_8_a_second_run_reads_the_cache(tmp_path, monkeypatch) -> None:
    path = qa(tmp_path / "a.jsonl")
    first = make_instruction_dataset(make_tokenizer(), path)
    monkeypatch.setattr(tokenized, "encode", None)  # would fail if called
    second = make_instruction_dataset(make_tokenizer(), path)
    assert [second[i] for i in range(4)] == [first[i] for i in range(4)]
    assert second.stats == first.stats


def test_a_padded_call_of_the_tokenizer_does_not_change_the_key(tmp_path) -> None:
    tokenizer, path = make_tokenizer(), qa(tmp_path / "a.jsonl")
    before = make_instruction_dataset(tokenizer, path).fingerprint
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert make_instruction_dataset(tokenizer, path).fingerprint == before


def test_processes_give_the_same_rows(tmp_path, cache) -> None:
    path, tokenizer = qa(tmp_path / "a.jsonl", 9), make_tokenizer("chatml")
    one = make_instruction_dataset(tokenizer, path, use_chat_template=True)
    for file in (cache / "nemo_automodel").glob("*.arrow"):
        file.unlink()
    two = make_instruction_dataset(tokenizer, path, use_chat_template=True, num_proc=2)
    assert [one[i] for i in range(9)] == [two[i] for i in range(9)]
    assert one.fingerprint == two.fingerprint


def test_what_several_processes_cached_is_read_if_it_is_all_there(tmp_path, cache, monkeypatch) -> None:
    path, tokenizer = qa(tmp_path / "a.jsonl", 9), make_tokenizer()
    first = make_instruction_dataset(tokenizer, path, num_proc=2)
    with monkeypatch.context() as patched:
        patched.setattr(sources, "_rows_of", None)  # would fail if called
        again = make_instruction_dataset(tokenizer, path)
    part, _ = sorted((cache / "nemo_automodel").glob("*_of_00002.arrow"))
    part.unlink()
    made_again = make_instruction_dataset(tokenizer, path)
    for data in (again, made_again):
        assert [data[i] for i in range(9)] == [first[i] for i in range(9)]


def test_hellaswag(tmp_path) -> None:
    rows = [{"ctx": "The fox", "endings": ["sleeps.", "jumps over."], "label": label} for label in ("1", 0, "0", "")]
    tokenizer = make_tokenizer()
    data = make_hellaswag_dataset(tokenizer, write(tmp_path / "a.jsonl", rows))
    assert [answer_of(tokenizer, data[i]) for i in range(len(data))] == [
        " jumps over.</s>",
        " sleeps.</s>",
        " sleeps.</s>",
    ]
    with pytest.raises(DataError, match=r"b.jsonl:1: label '5' names none of the 2 endings"):
        make_hellaswag_dataset(tokenizer, write(tmp_path / "b.jsonl", [{**rows[0], "label": "5"}]))


def test_column_mapping_and_loss_on_everything(tmp_path) -> None:
    rows = [{"passage": "c", "ask": "q", "reply": "a"}]
    mapping = {"context": "passage", "question": "ask", "answer": "reply"}
    tokenizer = make_tokenizer("bos")
    path = write(tmp_path / "a.jsonl", rows)
    data = make_instruction_dataset(tokenizer, path, column_mapping=mapping, answer_only_loss=False)
    assert tokenizer.decode(data[0]["input_ids"]) == "<s>c\nq\na</s>"
    assert data[0]["labels"] == [*data[0]["input_ids"][1:], IGNORE_INDEX]
    with pytest.raises(DataError, match=r"column_mapping=.*map answer and at least one of context and question"):
        make_instruction_dataset(tokenizer, path, column_mapping={"prompt": "ask", "answer": "reply"})


def test_a_slow_tokenizer_gets_the_same_labels(tmp_path) -> None:
    class Slow:
        """The same tokenizer without offsets."""

        is_fast = False

        def __init__(self, tokenizer) -> None:
            self.inner = tokenizer

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return self.inner(*args, **kwargs)

    from nemo_automodel.components.datasets.rendering import encode, prompt_and_answer

    rows = [prompt_and_answer("The fox says:", " jumps over", True), prompt_and_answer("a", " b", False)]
    tokenizer = make_tokenizer("bos")
    assert encode(Slow(tokenizer), rows) == encode(tokenizer, rows)


def test_lengths_are_plain_numbers(tmp_path) -> None:
    data = make_instruction_dataset(make_tokenizer(), qa(tmp_path / "a.jsonl"))
    assert list(data.lengths) == [len(data[i]["input_ids"]) for i in range(len(data))]
    assert isinstance(data.lengths, np.ndarray)


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_rows_with_an_empty_answer_are_dropped_and_counted(tmp_path, kind):
    rows = [{"question": "q", "answer": "" if i % 4 == 0 else "a"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = {"question": "question", "answer": "answer"}
    data = make_instruction_dataset(make_tokenizer(kind), str(tmp_path / "rows.jsonl"), column_mapping=mapping)
    assert (len(data), data.stats.dropped) == (6, 2)


def test_a_chats_pair_with_an_empty_answer_is_dropped_and_counted(tmp_path):
    empty = [{"prompt": "hi", "completion": " "}, {"instruction": "hi", "output": "", "system": "You are a fox."}]
    path = write(tmp_path / "a.jsonl", [*empty, *[{"prompt": "hi", "completion": "dog"}] * 3])
    data = make_chat_dataset(make_tokenizer("chatml"), path)
    assert (len(data), data.stats.dropped) == (3, 2)


def test_roles_in_capitals_are_known_and_unknown_ones_named(tmp_path):
    def chat(role):
        return {"messages": [{"role": "User", "content": "hi"}, {"role": role, "content": "dog"}]}

    tokenizer = make_tokenizer("chatml")
    data = make_chat_dataset(tokenizer, write(tmp_path / "a.jsonl", [chat("Assistant"), chat("Bot")]))
    assert [answer_of(tokenizer, data[i]) for i in range(2)] == ["dog<|im_end|>"] * 2
    path = write(tmp_path / "b.jsonl", [chat("assistant"), chat("narrator")])
    with pytest.raises(DataError, match=r"b\.jsonl:2: unknown role 'narrator'.*; write one of system;.*user \(human, "):
        make_chat_dataset(tokenizer, path)
    tokenizer.chat_template = "{# 'narrator' #}" + tokenizer.chat_template
    assert make_chat_dataset(tokenizer, path).stats.dropped == 1


def test_rows_without_an_assistants_turn_name_the_roles_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}] * 3)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"3 have an empty or unmarked answer \(roles there: user; "):
            make_chat_dataset(make_tokenizer("chatml"), path)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "dog"}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_may_be_given_as_json_text(tmp_path, tools):
    tokenizer = make_tokenizer("reasoning")
    data = make_chat_dataset(tokenizer, write(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools}]))
    wanted = tokenizer.apply_chat_template(CHAT, tools=[TOOL], tokenize=True, return_dict=False)
    assert data[0]["input_ids"] == wanted
    none = write(tmp_path / "b.jsonl", [{"messages": CHAT, "tools": "[]"}])
    assert "Tools" not in tokenizer.decode(make_chat_dataset(tokenizer, none)[0]["input_ids"])


@pytest.mark.parametrize(("tools", "says"), [("[", "not valid JSON"), ("{}", "must be a list of tools")])
def test_tools_that_are_none_are_an_error(tmp_path, tools, says):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools}])
    with pytest.raises(DataError, match=rf"a\.jsonl:1: column 'tools'.*{says}"):
        make_chat_dataset(make_tokenizer("reasoning"), path)


def test_functions_are_tools(tmp_path):
    tokenizer = make_tokenizer("reasoning")
    row = {"messages": CHAT, "functions": [TOOL["function"]]}
    data = make_chat_dataset(tokenizer, write(tmp_path / "a.jsonl", [row]))
    assert data[0]["input_ids"] == tokenizer.apply_chat_template(CHAT, tools=[TOOL], tokenize=True, return_dict=False)


def test_columns_that_are_not_read_are_said_once(tmp_path, caplog):
    rows = [{"messages": CHAT, "tools": None, "system": "", "id": 1, "conversations": []}] * 3
    caplog.set_level("INFO", "nemo_automodel.components.datasets.llm.chat")
    make_chat_dataset(make_tokenizer("chatml"), write(tmp_path / "a.jsonl", rows))
    said = [r.message.split(": ", 1)[1] for r in caplog.records if "not read" in r.message]
    assert said == ["columns that are not read: id, conversations"]
