"""The autoclasses: the real class comes back, behaves as itself, and trains in the dtypes that were asked for."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText
from nemo_automodel._transformers.auto_model import _keep_sums_wide
from nemo_automodel._transformers.blocks import find_blocks
from nemo_automodel._transformers.limits import check_data_fits
from nemo_automodel._transformers.loading import check_vocabulary
from nemo_automodel._transformers.tokenizer import load_tokenizer
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.errors import ConfigError, ModelError
from tests.builders import make_tokenizer, tiny_config
from tests.unit.model.models import documents, pair


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config("llama")).to(torch.bfloat16).save_pretrained(path)
    make_tokenizer("bos").save_pretrained(path)
    return path


def test_it_is_the_transformers_class(checkpoint: Path, tmp_path: Path) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint))
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, type(model).__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not model.training

    model.to("cpu").save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LlamaForCausalLM
    assert not info["missing_keys"] | info["unexpected_keys"]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert (tmp_path / "config.json").read_text() == (checkpoint / "config.json").read_text()


def test_copies_and_pickles_keep_the_class(checkpoint: Path) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="float32")
    ids = documents(9)[0]
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(whole, weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other(ids, labels=ids).logits is None
        assert other.lm_head.weight is not model.lm_head.weight


def test_generate_takes_and_gives_text(checkpoint: Path) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="float32")
    plain = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = ["Hello, my name is", "The quick brown fox jumps over"]
    texts = model.generate(prompts, do_sample=False, max_new_tokens=8)
    for prompt, text in zip(prompts, texts, strict=True):  # left padding changes nothing: each equals its own run
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = plain.generate(ids, do_sample=False, max_new_tokens=8)
        assert text == tokenizer.decode(expected[0], skip_special_tokens=True)
        assert text.startswith(prompt)
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=8), expected)
    assert model.generate(prompts[0], do_sample=False, max_new_tokens=8) == texts[:1]
    assert len(model.generate(["Hello"])) == 1  # as announced, with no further argument


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_that_of_transformers(family: str, cache: str) -> None:
    ours, plain = pair(family)
    ids = documents(20)[0].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :7], ids[0, :7] = 0, 2  # left padding
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": mask, "pad_token_id": 2, "eos_token_id": None}
    ours.eval(), plain.eval()
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


def test_generate_on_text_needs_a_tokenizer() -> None:
    model = NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), dtype="float32")
    with pytest.raises(ModelError, match="pass tokenizer="):
        model.generate(["Hello"])
    assert model.generate(["Hello"], tokenizer=make_tokenizer("no_pad"), max_new_tokens=2)[0].startswith("Hello")


@pytest.mark.parametrize("form", ["object", "mapping", "directory"])
def test_config_comes_in_three_forms(form: str, checkpoint: Path) -> None:
    config = tiny_config("llama")
    forms = {
        "object": config,
        "mapping": {"model_type": "llama", **config.to_diff_dict()},
        "directory": str(checkpoint),
    }
    model = NeMoAutoModelForCausalLM.from_config(forms[form], num_hidden_layers=1)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.config, LlamaConfig)
    assert len(model.model.layers) == 1
    assert config.num_hidden_layers == 2
    assert model.dtype == model.export_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"hidden_size": 8}, "write model_type: llama"),
        ({"model_type": "llama", "hiden_size": 8}, "did you mean hidden_size"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "30"),
        (3, "write a mapping with model_type"),
        ({"model_type": "vit"}, "AutoModelForCausalLM"),
    ],
)
def test_a_bad_config_says_what_to_write(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        NeMoAutoModelForCausalLM.from_config(config)


class OneDevice:
    """A distributed manager that spreads nothing and remembers what it was given."""

    device, dp_rank, dp_size = torch.device("cpu"), 0, 1

    def parallelize(self, model: Any, blocks: Any, compute_dtype: torch.dtype) -> Any:
        self.blocks, self.compute_dtype = list(blocks), compute_dtype
        return model


def dtypes(model: torch.nn.Module, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad == trained}


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("arguments", "compute", "trained", "frozen"),
    [
        ({}, BF16, {F32}, set()),
        ({"master_dtype": "bfloat16"}, BF16, {BF16}, set()),
        ({"dtype": "float32"}, F32, {F32}, set()),
        ({"torch_dtype": "bf16"}, BF16, {F32}, set()),
        ({"dtype": "auto"}, BF16, {F32}, set()),
        ({"peft": PeftConfig(match_all_linear=True)}, BF16, {F32}, {BF16}),
    ],
)
def test_dtypes_under_a_manager(
    checkpoint: Path, arguments: dict[str, Any], compute: torch.dtype, trained: set, frozen: set
) -> None:
    """Failure class 17: masters in float32, adapters in float32 on a bfloat16 base, no bit of the checkpoint lost."""
    manager = OneDevice()
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), distributed=manager, **arguments)
    assert manager.compute_dtype == compute
    assert manager.blocks == list(model.model.layers)
    assert (dtypes(model, True), dtypes(model, False)) == (trained, frozen)
    assert model.export_dtype == torch.bfloat16
    plain = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.state_dict()[name].float(), parameter)


def test_a_loop_of_ones_own_has_attention_lora_and_fused_loss(checkpoint: Path) -> None:
    peft = PeftConfig(match_all_linear=True, dim=4)
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="float32", peft=peft)
    assert model.config._attn_implementation == "automodel"
    params = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in params) < sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    ids = documents(30)[0]
    losses = []
    for _ in range(5):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
        assert outputs.logits is None
    assert losses[-1] < losses[0] - 0.05
    plain = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert losses[0] == pytest.approx(plain(ids, labels=ids).loss.item(), abs=1e-5)


@pytest.mark.parametrize("arguments", [{"dtype": "float16"}, {"torch_dtype": "fp16"}, {"dtype": "auto"}])
def test_float16_is_not_trained_in(checkpoint: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).save_pretrained(tmp_path)
    name = next(iter(arguments.values()))
    with pytest.raises(ConfigError, match=rf"^model\.dtype={name}: .*write bfloat16"):
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), distributed=OneDevice(), **arguments)
    assert NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), **arguments).dtype == torch.float16
    with pytest.raises(ConfigError, match=r"^model\.dtype=float16"):
        NeMoAutoModelForCausalLM.from_config(tiny_config("llama"), dtype="float16", distributed=OneDevice())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_save_pretrained_of_an_adapted_model_is_a_peft_adapter(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    peft = PeftConfig(match_all_linear=True, dim=4, alpha=7, **options)
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="float32", peft=peft).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = documents(12)[0]
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "unwritten", is_main_process=False)
    assert not (tmp_path / "unwritten").exists()
    model.save_pretrained(tmp_path / "adapter")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written >= {"adapter_model.safetensors", "adapter_config.json"}
    assert "model.safetensors" not in written
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(checkpoint)

    base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "merged", state_dict=peft.merged_state_dict(model))
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_cannot_be_described_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint))
    PeftConfig(match_all_linear=True).apply(model)
    with pytest.raises(ModelError, match="_automodel_peft"):
        model.save_pretrained(tmp_path)
    model._automodel_peft = PeftConfig(match_all_linear=True)
    with pytest.raises(ModelError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_attention_is_the_users_to_choose(checkpoint: Path) -> None:
    for name in ("sdpa", "eager"):
        model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), attn_implementation=name)
        assert model.config._attn_implementation == name
    with pytest.raises(ModelError, match="flash_attn_9"):
        NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), attn_implementation="flash_attn_9")


def test_own_attention_is_reported_by_name(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("bloom", n_layer=1, n_head=4, hidden_size=32)
    NeMoAutoModelForCausalLM.from_config(config, dtype="float32")
    assert [r.message for r in caplog.records if "BloomForCausalLM" in r.message and "own attention" in r.message]


def test_compile_gets_the_blocks(checkpoint: Path) -> None:
    seen: dict[str, Any] = {}

    class Compile:
        def apply(self, blocks: Any, device: torch.device) -> bool:
            seen.update(blocks=list(blocks), device=device)
            return False

    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), compile=Compile())
    assert seen == {"blocks": list(model.model.layers), "device": torch.device("cpu")}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma3_text", "bloom", "mamba", "jamba"])
def test_blocks_are_found_by_structure(family: str) -> None:
    over: dict[str, Any] = {
        "bloom": {"n_layer": 2, "n_head": 4},
        "mamba": {"state_size": 4},
        "jamba": {"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    }.get(family, {})
    model = AutoModelForCausalLM.from_config(tiny_config(family, **over))
    blocks = find_blocks(model)
    assert len(blocks) == 2
    within = sum(p.numel() for block in blocks for p in block.parameters())
    rest = {id(p) for p in model.parameters()} - {id(p) for block in blocks for p in block.parameters()}
    assert within > 0
    assert len(rest) <= 5  # embeddings, norms and head
    model._no_split_modules = None
    for module in model.modules():
        if hasattr(module, "_no_split_modules"):
            module._no_split_modules = None
    assert find_blocks(model) == blocks


def test_vocabulary_must_cover_the_tokenizer(checkpoint: Path) -> None:
    model = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint))
    tokenizer = make_tokenizer("plain")
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(400)])
    with pytest.raises(ModelError, match=rf"has {len(tokenizer)} tokens.*384 rows.*resize_token_embeddings"):
        check_vocabulary(model, tokenizer)


def test_autoclasses_are_not_built_directly() -> None:
    for auto in (NeMoAutoModelForCausalLM, NeMoAutoModelForImageTextToText):
        with pytest.raises(ModelError, match="from_pretrained"):
            auto()


def test_generate_returns_what_return_dict_in_generate_asks_for(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    make_tokenizer("plain").save_pretrained(tmp_path)
    model = NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), dtype="float32")
    out = model.generate(["Hi"], max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 2
    assert out.sequences.shape[0] == 1


def test_a_tilde_is_the_home_directory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    name = f"~/{checkpoint.name}"
    assert NeMoAutoModelForCausalLM.from_pretrained(name).name_or_path == str(checkpoint)
    assert isinstance(NeMoAutoModelForCausalLM.from_config(name), LlamaForCausalLM)


def test_a_directory_that_is_not_there_says_from_where_it_was_looked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"model \./x: no such local directory \(relative to {tmp_path}\)"):
        NeMoAutoModelForCausalLM.from_pretrained("./x")


def test_parts_of_a_language_model_are_itself(checkpoint: Path) -> None:
    for parts in (["language_model", "projector"], "all"):
        peft = PeftConfig(match_all_linear=True, parts=parts)
        assert NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), peft=peft)._automodel_peft is peft
    with pytest.raises(ConfigError, match=r"peft\.parts=vision_tower: .* no other part .*; leave it out"):
        NeMoAutoModelForCausalLM.from_pretrained(
            str(checkpoint), peft=PeftConfig(match_all_linear=True, parts="vision_tower")
        )


def test_new_tokens_under_adapters_are_said_to_stay_untrained(tmp_path, caplog):
    AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=400)).save_pretrained(tmp_path)
    make_tokenizer("plain").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), add_tokens=["<tool>", "</tool>"])
    for peft, said in ((PeftConfig(match_all_linear=True, dim=4), True), (None, False)):
        caplog.clear()
        check_data_fits(NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path), peft=peft), tokenizer)
        assert ("rows of the 2 new tokens stay as they are" in caplog.text) == said


@pytest.mark.parametrize(
    ("vocabulary", "tp", "wide"), [(384, 1, False), (385, 1, True), (392, 1, False), (392, 2, True)]
)
def test_sums_over_an_odd_vocabulary_stay_wide_on_cuda(vocabulary, tp, wide, caplog):
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    model = LlamaForCausalLM(tiny_config("llama", vocab_size=vocabulary))
    try:
        products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
        with caplog.at_level("INFO"):
            _keep_sums_wide(model, torch.device("cpu"), tp)
            assert products.allow_bf16_reduced_precision_reduction
            _keep_sums_wide(model, torch.device("cuda"), tp)
        narrow = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    finally:
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = before
    assert narrow == (not wide, not wide)
    assert (f"vocabulary of {vocabulary}" in caplog.text) == wide
