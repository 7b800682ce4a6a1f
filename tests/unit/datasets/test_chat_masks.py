"""Failure classes 4, 5 and 6: what exactly is supervised in a conversation, for each family of templates."""

from __future__ import annotations

import json

import pytest

from nemo_automodel.components.datasets.chat_template import ChatRenderer
from nemo_automodel.components.datasets.llm.chat import to_messages
from nemo_automodel.components.datasets.rendering import encode
from nemo_automodel.errors import DataError
from nemo_automodel.types import IGNORE_INDEX
from tests.builders import CHAT_KINDS, make_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital."},
    {"role": "user", "content": "And two plus two?"},
    {"role": "assistant", "content": "four"},
]
STOP = {
    "chatml": "<|im_end|>",
    "chatml_bos": "<|im_end|>",
    "chatml_pad_eos": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "trim": "</s>",
    "generation": "<|im_end|>",
    "default_system": "<|im_end|>",
    "reasoning": "<|im_end|>",
}


def supervised(kind: str, messages, tools=None, tokenizer=None, **options) -> list[str]:
    """The supervised spans, decoded, as the loss sees them: from the shifted labels."""
    tokenizer = tokenizer or make_tokenizer(kind)
    rendered = ChatRenderer(tokenizer, **options)(messages, "row 0", tools)
    ((ids, labels),) = encode(tokenizer, [rendered])
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids[1:], strict=False))
    assert labels[-1] == IGNORE_INDEX
    spans, before = [], IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            spans.append([label]) if before == IGNORE_INDEX else spans[-1].append(label)
        before = label
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_class_6_supervised_spans_are_the_assistants_words_and_the_stop_token(kind: str) -> None:
    lead = " " if kind == "mistral" else ""  # its prompt ends before the space
    think = "<think>\n\n</think>\n\n" if kind == "reasoning" else ""  # Qwen3's shape: only behind the last user turn
    assert supervised(kind, TWO_TURNS) == [
        f"{lead}Paris is the capital.{STOP[kind]}",
        f"{lead}{think}four{STOP[kind]}",
    ]


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_class_6_last_turn_only(kind: str) -> None:
    (span,) = supervised(kind, TWO_TURNS, train_on="last")
    assert span.endswith("four" + STOP[kind])
    assert "Paris" not in span


@pytest.mark.parametrize("kind", [k for k in CHAT_KINDS if k not in ("mistral",)])
def test_class_6_a_system_turn_shifts_nothing(kind: str) -> None:
    with_system = [{"role": "system", "content": "You are a fox."}, *TWO_TURNS]
    assert supervised(kind, with_system) == supervised(kind, TWO_TURNS)


def test_class_6_train_on_all_is_every_token_but_the_first() -> None:
    tokenizer = make_tokenizer("chatml")
    ((ids, labels),) = encode(tokenizer, [ChatRenderer(tokenizer, "all")(TWO_TURNS, "row 0")])
    assert labels == [*ids[1:], IGNORE_INDEX]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma", "trim", "generation"])
@pytest.mark.parametrize("answer", ["", "  Paris  ", "a\n\nb\n", "user", "assistant\n", "<fox> é 🦊"])
def test_class_6_odd_answers(kind: str, answer: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}, *TWO_TURNS]
    shown = answer.strip() if kind in ("llama3", "gemma", "trim") else answer
    assert supervised(kind, messages)[0] == shown + STOP[kind]


def test_class_6_reasoning_of_earlier_turns_is_neither_shown_nor_supervised() -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\none"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>\nsecond thought\n</think>\n\ntwo"},
    ]
    assert supervised("reasoning", messages) == ["one<|im_end|>", "<think>\nsecond thought\n</think>\n\ntwo<|im_end|>"]


def test_class_6_tool_calls_are_supervised_and_tool_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        {"role": "user", "content": "two plus two?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    called = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    assert supervised("reasoning", messages, tools) == [
        called,
        "four<|im_end|>",
        "<think>\n\n</think>\n\nwelcome<|im_end|>",
    ]


def test_class_6_a_prompt_that_opens_the_reasoning() -> None:
    """The generation prompt ends in <think>, which finished turns do not show: it is no prefix of them."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}"
    )
    assert supervised("", TWO_TURNS, tokenizer=tokenizer) == ["Paris is the capital.<|im_end|>", "four<|im_end|>"]


def test_class_6_a_generation_block_without_the_stop_token_is_completed() -> None:
    tokenizer = make_tokenizer("generation")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert supervised("", TWO_TURNS, tokenizer=tokenizer) == ["Paris is the capital.<|im_end|>", "four<|im_end|>"]


def test_class_6_only_the_last_turn_gets_the_eos() -> None:
    """A template that writes the EOS once, at the end, supervises no stop it does not show."""
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] + '\\n' }}{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    )
    first, last = supervised("", TWO_TURNS, tokenizer=tokenizer)
    assert first.rstrip("\n") == "Paris is the capital."
    assert last == "four\n</s>"


def test_class_6_a_template_that_hides_the_answer_is_an_error() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 0: cannot tell where message 1 .*generation"):
        ChatRenderer(tokenizer)(TWO_TURNS, "row 0")


def test_message_weight_zero_is_not_supervised() -> None:
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]]
    assert supervised("chatml", messages) == ["four<|im_end|>"]


@pytest.mark.parametrize("said", [{"weight": False}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_what_is_said_not_to_be_learned_is_not(said) -> None:
    assert supervised("chatml", [TWO_TURNS[0], {**TWO_TURNS[1], **said}, *TWO_TURNS[2:]]) == ["four<|im_end|>"]


@pytest.mark.parametrize("said", [{"weight": 1}, {"weight": True}, {"weight": None, "train": None}, {"train": True}])
def test_what_is_said_to_be_learned_is(said) -> None:
    assert len(supervised("chatml", [TWO_TURNS[0], {**TWO_TURNS[1], **said}, *TWO_TURNS[2:]])) == 2


@pytest.mark.parametrize("said", [{"weight": 0.5}, {"weight": "0"}, {"train": "false"}])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_another_weight_is_an_error(said, train_on) -> None:
    (key,) = said
    with pytest.raises(DataError, match=rf"row 0: {key} of a message must be 1 .* or 0 .*, got {said[key]!r}"):
        supervised("chatml", [TWO_TURNS[0], {**TWO_TURNS[1], **said}, *TWO_TURNS[2:]], train_on=train_on)


@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_class_5_ids_equal_the_tokenizers_own(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    ((ids, _),) = encode(tokenizer, [ChatRenderer(tokenizer)(TWO_TURNS, "row 0")])
    assert ids == tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == (1 if kind in ("chatml_bos", "llama3", "gemma", "mistral") else 0)


@pytest.mark.parametrize("kind", ["chatml", "chatml_pad_eos"])
def test_class_4_pad_is_eos_and_eos_is_supervised_once_a_turn(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    ((_, labels),) = encode(tokenizer, [ChatRenderer(tokenizer)(TWO_TURNS, "row 0")])
    assert labels.count(tokenizer.eos_token_id) == 2


def test_bad_role_order_names_the_row() -> None:
    with pytest.raises(DataError, match=r"data.jsonl:7: the chat template refuses .*user, user.*must alternate"):
        ChatRenderer(make_tokenizer("gemma"))([TWO_TURNS[0], TWO_TURNS[0]], "data.jsonl:7")


def test_no_chat_template_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"no chat template; set tokenizer\.chat_template"):
        ChatRenderer(make_tokenizer("plain"))


def test_rows_of_every_form_become_messages() -> None:
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": expected},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": expected[:1], "completion": expected[1:]},
        {"question": "q", "answer": "a"},
    ]
    assert [to_messages(row, "row") for row in rows] == [expected] * len(rows)
    assert to_messages({"instruction": "q", "input": "x", "output": "a"}, "row")[0]["content"] == "q\n\nx"
    with pytest.raises(DataError, match=r"row 3: no conversation found; there is 'text'"):
        to_messages({"text": "x"}, "row 3")
    with pytest.raises(DataError, match=r"messages\[0\]: a message needs a role"):
        to_messages({"messages": [{"content": "x"}]}, "row 3")


def test_tool_call_arguments_as_text_are_parsed() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = to_messages({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}, "row")
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize("calls", [[{"function": "f"}], ["f"], "f"])
def test_a_tool_call_that_is_no_object_is_an_error(calls) -> None:
    with pytest.raises(DataError, match=r"row: messages\[0\]: .*(a tool call must be an object|must be list)"):
        to_messages({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}, "row")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLING = [
    TWO_TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    TWO_TURNS[1],
]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_template_that_leaves_tools_out_is_an_error(train_on) -> None:
    render = ChatRenderer(make_tokenizer("chatml"), train_on)
    with pytest.raises(
        DataError, match=r"a:7: the chat template of .* leaves out the tool_calls of message 1; set tok"
    ):
        render(CALLING, "a:7")
    with pytest.raises(
        DataError, match=r"a:7: the chat template of .* leaves out the tools offered; set tokenizer\.chat"
    ):
        render(TWO_TURNS, "a:7", [CALL])


def test_a_template_that_leaves_out_only_some_calls_is_an_error() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template += "{{ messages[1]['tool_calls'] | tojson }}"
    with pytest.raises(DataError, match=r"leaves out the tool_calls of message 4"):
        ChatRenderer(tokenizer)([*CALLING, CALLING[1]], "a:7")


def test_the_old_function_call_is_a_tool_call() -> None:
    called = {"name": "add", "arguments": '{"a": 2}'}
    turns = [{"role": "assistant", "content": None, "function_call": called}]
    assert to_messages({"messages": turns}, "row") == [CALLING[1]]
    assert to_messages({"messages": [{**TWO_TURNS[1], "function_call": None}]}, "row") == [TWO_TURNS[1]]


def test_the_system_column_is_put_in_front_of_rows_of_every_form() -> None:
    chat, fox = TWO_TURNS[:2], {"role": "system", "content": "You are a fox."}
    forms = [
        {"messages": chat},
        {"messages": [fox, *chat]},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in chat]},
        {"instruction": chat[0]["content"], "output": chat[1]["content"]},
        {"prompt": chat[0]["content"], "completion": chat[1]["content"]},
        {"prompt": chat[:1], "completion": chat[1:]},
    ]
    for row in forms:
        assert to_messages({**row, "system": fox["content"]}, "row") == [fox, *chat]
    for nothing in (None, ""):
        assert to_messages({"messages": chat, "system": nothing}, "row") == chat
    with pytest.raises(
        DataError, match=r"a:3: column 'system' says 'x', the conversation's own .*'You are a fox.'; keep"
    ):
        to_messages({"messages": [fox, *chat], "system": "x"}, "a:3")


def test_a_messages_column_that_is_not_there_is_an_error() -> None:
    row = {"dialog": TWO_TURNS, "conversations": TWO_TURNS}
    with pytest.raises(
        DataError, match=r"a:3: no column 'dialgo' .*messages_column\); there is 'dialog', 'conversations'"
    ):
        to_messages(row, "a:3", "dialgo")
    assert to_messages(row, "a:3", "dialog") == TWO_TURNS


@pytest.mark.parametrize("said", ['{"name": "add", "arguments": {"a": 2}}', f"[{json.dumps(CALL)}]", CALL["function"]])
@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_sharegpts_turn_of_a_call_is_the_assistants(role, said) -> None:
    turns = [{"from": role, "value": said, "weight": 0}, {"from": "observation", "value": "4"}]
    assert to_messages({"conversations": turns}, "row") == [{**CALLING[1], "weight": 0}, CALLING[2]]


def test_a_turn_of_a_call_that_is_no_json_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a:3: conversations\[0\]: content of function_call: not valid JSON"):
        to_messages({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "a:3")
    with pytest.raises(DataError, match=r"a:3: conversations\[0\]: a tool call must be an object"):
        to_messages({"conversations": [{"from": "function_call", "value": "2"}]}, "a:3")


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("user", "user human"),
        ("assistant", "assistant gpt bot chatbot model"),
        ("tool", "tool observation function"),
        ("system", "system System"),
    ],
)
def test_roles_have_other_names(role: str, names: str) -> None:
    for name in names.split():
        (message,) = to_messages({"conversations": [{"from": name, "value": "x"}]}, "row")
        assert message["role"] == role


def test_alpacas_history_is_earlier_turns() -> None:
    (ask, answer), last = (m["content"] for m in TWO_TURNS[:2]), TWO_TURNS[2:]
    row = {"instruction": last[0]["content"], "output": last[1]["content"], "history": [[ask, answer]]}
    assert to_messages(row, "row") == TWO_TURNS
    assert to_messages({**row, "history": None}, "row") == last
    with pytest.raises(
        DataError, match=r"a:3: column 'history' must hold pairs \[user, assistant\] of text, got \"\['x"
    ):
        to_messages({**row, "history": [["x"]]}, "a:3")


@pytest.mark.parametrize("empty", ["", " \n", [], [{"type": "text", "text": " "}]])
def test_a_row_with_an_empty_turn_of_the_assistant_is_dropped(empty) -> None:
    turn = {"role": "assistant", "content": empty}
    assert to_messages({"messages": [TWO_TURNS[0], turn]}, "row") == []
    assert to_messages({"messages": [TWO_TURNS[0], turn, *TWO_TURNS[2:]]}, "row") == []
    for kept in ({"weight": 0}, {"train": False}, {"tool_calls": [CALL]}, {"reasoning_content": "hm"}):
        assert len(to_messages({"messages": [TWO_TURNS[0], {**turn, **kept}]}, "row")) == 2
    assert len(to_messages({"messages": [{"role": "user", "content": empty}, TWO_TURNS[1]]}, "row")) == 2
