"""Small tokenizers and model configs for tests, built in code: no download, milliseconds each."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What does the fox do? It jumps over the dog.",
    "Context: Paris is the capital of France. Question: What is the capital of France? Answer: Paris",
    "You are a helpful assistant. Hello, my name is Ada. What is two plus two? Two plus two is four.",
    "Instruction: name a colour. Response: blue. <|user|> system user assistant tool think",
]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\\n\\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set prefix = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_TRIM = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
) + _CHATML
_REASONING = (  # tools in a system turn; thinking kept only after the last user turn (the shape of Qwen3's template)
    "{% if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% set content = message['content'] or '' %}{% set reasoning = message['reasoning_content'] or '' %}"
    "{% if not reasoning and '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_IM = ["<|im_start|>", "<|im_end|>"]
_LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# kind -> (chat template, special tokens beside bos/eos/pad/unk, eos token)
_KINDS: dict[str, tuple[str | None, list[str], str]] = {
    "plain": (None, [], "</s>"),  # bos, eos, pad all distinct; adds none of them by itself
    "pad_eos": (None, [], "</s>"),  # pad is eos
    "no_pad": (None, [], "</s>"),
    "no_eos": (None, [], ""),  # neither eos nor pad
    "bos": (None, [], "</s>"),  # its post-processor puts <s> in front
    "chatml": (_CHATML, _IM, "<|im_end|>"),
    "chatml_bos": ("{{ bos_token }}" + _CHATML, _IM, "<|im_end|>"),  # template and post-processor both add <s>
    "chatml_pad_eos": (_CHATML, _IM, "<|im_end|>"),
    "llama3": (_LLAMA3, _LLAMA, "<|eot_id|>"),  # its post-processor adds BOS, and so does its template
    "gemma": (_GEMMA, ["<start_of_turn>", "<end_of_turn>"], "</s>"),  # BOS likewise; the stop token is not eos
    "mistral": (_MISTRAL, ["[INST]", "[/INST]"], "</s>"),
    "trim": (_TRIM, [], "</s>"),  # role markers are plain text; content is stripped
    "generation": (_GENERATION, _IM, "<|im_end|>"),
    "default_system": (_DEFAULT_SYSTEM, _IM, "<|im_end|>"),
    "reasoning": (_REASONING, [*_IM, "<think>", "</think>"], "<|im_end|>"),
}
TOKENIZER_KINDS = tuple(_KINDS)
CHAT_KINDS = tuple(kind for kind, (template, _, _) in _KINDS.items() if template)


@cache
def _trained(specials: tuple[str, ...], vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(kind: str = "plain", vocab_size: int = 384) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of one of ``TOKENIZER_KINDS``; at most ``vocab_size`` entries, any text encodes."""
    template, extra, eos = _KINDS[kind]
    base = ["<s>", *([eos] if eos and eos not in extra else []), "<pad>"]
    specials = tuple(t for t in [*base, *extra] if t != "<pad>" or kind not in ("no_pad", "no_eos"))
    backend = Tokenizer.from_str(_trained(specials, vocab_size))
    if kind in ("bos", "chatml_bos", "llama3", "gemma", "mistral"):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names: dict[str, Any] = {"bos_token": AddedToken("<s>", special=True, normalized=False)}
    if eos:
        names["eos_token"] = eos
    if kind in ("pad_eos", "chatml_pad_eos"):
        names["pad_token"] = eos
    elif kind not in ("no_pad", "no_eos"):
        names["pad_token"] = "<pad>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.model_max_length = 1024
    if template:
        tokenizer.chat_template = template
    return tokenizer


_SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 384},
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def tiny_config(model_type: str = "llama", **over: Any) -> PretrainedConfig:
    """A two-layer config of ``model_type`` (llama, qwen3, gemma3_text, mixtral, qwen3_moe, gpt2, ...), vocabulary 384."""
    own = _OF_TYPE.get(model_type, {})
    sizes = own if model_type == "gpt2" else {**_SIZES, **own}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(model_type, **{**ids, **sizes, **over})
