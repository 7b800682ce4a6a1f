"""Failure class 7 (and 4): what is loaded is what is saved, byte for byte, and nothing changes in silence."""

from __future__ import annotations

import logging

import pytest
from transformers import AutoTokenizer

from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components.datasets.llm.chat import make_chat_dataset
from nemo_automodel.errors import ModelError
from tests.builders import CHAT_KINDS, TOKENIZER_KINDS, make_tokenizer

CHAT = [{"role": "user", "content": " hi é\n"}, {"role": "assistant", "content": " Paris \n"}]


def saved(tmp_path, kind: str, name: str = "model") -> str:
    make_tokenizer(kind).save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def files(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("kind", [k for k in TOKENIZER_KINDS if k not in ("no_pad", "no_eos")])
def test_class_7_files_are_byte_identical_after_a_round_trip(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, kind))
    tokenizer.save_pretrained(tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"))
    again.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    original = files(tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert files(tmp_path / "out").get(name) == original.get(name)


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_class_7_the_template_trained_on_is_the_template_saved(tmp_path, kind: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, kind))
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": " hi é", "completion": " Paris "}\n')
    trained = make_chat_dataset(tokenizer, str(data))[0]["input_ids"]
    tokenizer.save_pretrained(tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in (False, True):
        options = {"tokenize": False, "add_generation_prompt": prompt}
        assert plain.apply_chat_template(CHAT, **options) == make_tokenizer(kind).apply_chat_template(CHAT, **options)
    messages = [{"role": "user", "content": " hi é"}, {"role": "assistant", "content": " Paris "}]
    assert plain.apply_chat_template(messages, return_dict=False) == trained


def test_class_7_a_template_given_in_the_recipe_is_saved(tmp_path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        tokenizer = load_tokenizer(saved(tmp_path, "chatml"), chat_template=given)
        tokenizer.save_pretrained(tmp_path / "out")
        plain = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert plain.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert plain.chat_template == template


def test_class_4_a_missing_pad_is_chosen_and_reported(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = load_tokenizer(saved(tmp_path, "no_pad"))
    assert tokenizer.pad_token == "</s>" == tokenizer.eos_token
    assert "has no pad token: '</s>' is used (also its EOS" in caplog.text
    caplog.clear()
    with_pad = make_tokenizer("no_pad")
    with_pad.add_tokens(["<|pad|>"], special_tokens=True)
    with_pad.save_pretrained(tmp_path / "pad")
    tokenizer = load_tokenizer(str(tmp_path / "pad"))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "</s>")
    assert "'<|pad|>' is used;" in caplog.text


def test_class_4_a_pad_that_is_eos_is_left_alone(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = load_tokenizer(saved(tmp_path, "pad_eos"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert "pad" not in caplog.text


def test_tokens_can_be_set_and_added(tmp_path) -> None:
    path = saved(tmp_path, "no_eos")
    tokenizer = load_tokenizer(path, eos_token="<end>", pad_token="<pad>", add_tokens=["<end>", "<pad>"])
    assert len(tokenizer) == 386
    assert tokenizer("fox<end>")["input_ids"][-1] == tokenizer.eos_token_id == 384
    assert tokenizer.pad_token_id == 385
    with pytest.raises(ModelError, match=r"tokenizer.pad_token='<nope>': not in the vocabulary"):
        load_tokenizer(path, pad_token="<nope>")


def test_another_tokenizer_than_the_models(tmp_path) -> None:
    path = saved(tmp_path, "chatml", "other")
    assert load_tokenizer("no/such", pretrained_model_name_or_path=path).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda tmp: load_tokenizer(), "nothing to load; set tokenizer.pretrained_model_name_or_path"),
        (lambda tmp: load_tokenizer(str(tmp / "absent")), "absent: no such directory"),
        (lambda tmp: load_tokenizer(str(tmp)), r"the directory has no tokenizer files \(tokenizer.json"),
        (
            lambda tmp: load_tokenizer(saved(tmp, "chatml"), chat_template="absent.jinja"),
            "neither Jinja text nor a readable file",
        ),
    ],
)
def test_mistakes_say_what_to_do(tmp_path, call, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a Git LFS pointer.*`git lfs pull`"),
        ('{"version": "1.0", "tru', "is not valid JSON"),
    ],
)
def test_damaged_files_are_one_error(tmp_path, content: str, says: str) -> None:
    path = saved(tmp_path, "chatml")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=says) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
