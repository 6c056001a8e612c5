"""`init_from=<folder>`: models that transformers made become ours, and theirs again, number for number."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import programs
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.model.decoder import Decoder
from thunderhead.corpus.trained_tokenizers import BpeTokenizer
from thunderhead.release.export import export
from thunderhead.release.huggingface import converted
from thunderhead.release.inverse import options_of, read_source, reference, restored
from thunderhead.release.pretrained import Pretrained, with_options
from tiny import plan_of, tiny, train_here

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
ONE_KIND = {"intermediate_size": 48, "max_position_embeddings": 64}
GPT2 = {"n_positions": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
DENSE = {  # no layer of experts
    **{"first_k_dense_replace": 2, "kv_lora_rank": 24, "q_lora_rank": 20},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Llama with scaled positions": GROUPED
    | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}, "head_dim": 16},
    "Llama with biases and a tied head": GROUPED
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "Mistral": GROUPED | {"sliding_window": 16, "head_dim": 12},
    "Qwen2": GROUPED | {"tie_word_embeddings": True},
    "Qwen2 with a window": GROUPED | SLIDING,
    "Qwen3": GROUPED | {"head_dim": 16},
    "SmolLM3": GROUPED | {"no_rope_layers": [0, 0], "pad_token_id": None},
    "Arcee": GROUPED,
    "DeepseekV2": GROUPED | DENSE | {"q_lora_rank": None, "num_key_value_heads": 4},
    "DeepseekV2 with latent queries": GROUPED | DENSE | {"num_key_value_heads": None, "tie_word_embeddings": True},
    "GPT2": SIZES | GPT2,
    "GPTBigCode": SIZES | GPT2 | {"n_inner": 48},
    "OPT": SIZES | {"ffn_dim": 48, "max_position_embeddings": 64},
    "OPT with norms after": SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "do_layer_norm_before": False},
    "GPTNeoX": SIZES
    | ONE_KIND
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "GPTNeoX in series": SIZES | ONE_KIND | {"use_parallel_residual": False},
    "Starcoder2": GROUPED | {"sliding_window": 16},
    "Nemotron": GROUPED
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "Cohere": GROUPED | {"logit_scale": 1.0},
    "StableLm": GROUPED | {"use_qkv_bias": True},
    "StableLm, parallel": GROUPED | {"use_parallel_residual": True, "num_key_value_heads": 1},
    "Phi": GROUPED,
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 101, "max_seq_len": 64},
}


def made(name: str, **more: Any) -> Any:
    """A model of transformers with random weights, biases and norms too."""
    kind = name.partition(",")[0].split()[0]
    configuration = getattr(transformers, f"{kind}Config")(**{**MODELS[name], **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and key != "lm_head.bias":
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def taken_in(folder: Path) -> Decoder:
    """Our decoder of the folder's options and weights."""
    source = read_source(folder)
    meta = reference(source, options_of(source))
    decoder = meta.to_empty(device="cpu")
    weights = Pretrained(path=str(folder)).weights(decoder)
    decoder.load_state_dict(weights)
    return decoder.eval()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same(name: str, tmp_path: Path) -> None:
    """The same logits here, and byte for byte the same weights there again (but OPT's two rows that nobody reads)."""
    model = made(name)
    decoder = taken_in(saved(model, tmp_path / "theirs"))
    tokens = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs, ours = model(tokens).logits, decoder.logits(tokens)
    assert float((theirs - ours).abs().max()) < 1e-5 * float(theirs.abs().max())
    again, before = converted(decoder, type(model.config).__name__.removesuffix("Config")), model.state_dict()
    after = again.state_dict()
    assert after.keys() == before.keys()
    if name.startswith("OPT"):
        table = "model.decoder.embed_positions.weight"
        before[table], after[table] = before[table][2:], after[table][2:]
    for key, tensor in before.items():
        if name.startswith("Nemotron") and "norm" in key:  # 1 is added to the weights, and taken off again
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=1.2e-7)
        else:
            assert torch.equal(after[key], tensor), key
    assert type(again) is type(model)


@pytest.mark.parametrize(
    ("name", "changed", "lacking"),
    [
        ("Cohere", {"logit_scale": 0.0625}, r"no option here is its logit_scale=0.0625"),
        ("Qwen3", {"rms_norm_eps": 1e-5}, r"no option here is its norm.eps=other than qk_norm's 1e-6"),
        ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"its layer_types=\["),
        ("StableLm", {"qk_layernorm": True}, r"its qk_layernorm=true"),
        ("DeepseekV2", {"first_k_dense_replace": 1}, r"its first_k_dense_replace=1"),
        ("DeepseekV2", {"attention_bias": True}, r"its attention_bias=true"),
        ("GPTNeoX", {"attention_bias": False}, r"its attention_bias=false"),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, r"its scale_attn_by_inverse_layer_idx=true"),
        ("GPT2", {"activation_function": "quick_gelu"}, r"no option of activation is its quick_gelu"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ("OPT", {"word_embed_proj_dim": 16}, r"its word_embed_proj_dim=16"),
    ],
)
def test_what_no_option_is_is_refused(name: str, changed: dict[str, Any], lacking: str, tmp_path: Path) -> None:
    getattr(transformers, f"{name}Config")(**{**MODELS[name], **changed}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"init_from: .*{lacking}"):
        options_of(read_source(tmp_path))


def test_weights_without_a_place_are_refused() -> None:
    """Phi's head has a bias; 0 is what a head without one has."""
    model = made("Phi")
    source = read_source_of(model)
    decoder = reference(source, options_of(source))
    weights = model.state_dict() | {"lm_head.bias": torch.ones(101)}
    with pytest.raises(ValueError, match=r"init_from: lm_head.bias is not neutral, and a Phi has no place for it here"):
        restored(decoder, source.architecture, weights)


def read_source_of(model: Any) -> Any:
    with patch("transformers.AutoConfig.from_pretrained", lambda *_, **__: model.config):
        return read_source(Path("nowhere"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, with a tokenizer that has fewer tokens than the model has rows."""
    place = saved(made("Llama", vocab_size=320), tmp_path_factory.mktemp("hub") / "llama")
    (place / "tokenizer.json").write_text(BpeTokenizer(vocab_size=300).train(["some text, and more"]).to_json())
    return place


def tiny_from(folder: Path, corpus: Path, shards: Path, *typed: str) -> list[str]:
    """Arguments of a tiny run, without sizes: those of the folder take their place."""
    lines = [line for line in tiny(corpus, shards, *typed) if not line.startswith("model") or line in typed]
    return with_options([f"init_from={folder}", *(line for line in lines if line not in {"tokenizer=byte"} - {*typed})])


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_run_from_a_folder_and_its_export(strategy: str, folder: Path, text_corpus: Path, tmp_path: Path) -> None:
    """A step with a learning rate of nearly nothing leaves the weights, byte for byte; no resume reads them."""
    place, run_dir = shutil.copytree(folder, tmp_path / "there"), tmp_path / "run"
    small = ("optimizer.lr=1.0e-30", "callbacks=default", "model.context_length=32", f"strategy={strategy}")
    arguments = tiny_from(place, text_corpus, tmp_path / "shards", *small)
    assert {"init_from.architecture=Llama", "attention=gqa", "tokenizer=huggingface"} <= {*arguments}
    train_here(arguments, run_dir)
    out = export(config.compose([f"run={run_dir}"], "export"))
    before, after = (load_file(each / "model.safetensors") for each in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        json.loads((out / "tokenizer.json").read_text())["model"]
        == json.loads((place / "tokenizer.json").read_text())["model"]
    )

    for file in ("config.json", "model.safetensors"):
        (place / file).unlink()
    with pytest.raises(ConfigError, match=r"^resume: the run has made all its 2 steps: raise the budget[^\n]*$"):
        train_here([*arguments, f"resume={run_dir}"], tmp_path / "new")


def problems_of(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        plan_of(config.plain(config.compose(arguments)))
    return str(refused.value).splitlines()


def test_all_contradictions_are_named(folder: Path, text_corpus: Path, tmp_path: Path) -> None:
    typed = ("model.n_layers=3", "attention=mha", "norm.eps=0.01", "model.context_length=128", "tokenizer=byte")
    typed += ("batch.micro_size=1",)
    found = problems_of(tiny_from(folder, text_corpus, tmp_path, *typed))
    assert found == [
        "model.context_length: 128 is not what init_from is made for: 64 tokens: model.context_length=64",
        "model.n_layers: 3 is not what init_from has: leave it out, or give model.n_layers=2",
        "attention.n_kv_heads: null is not what init_from has: leave it out, or give attention.n_kv_heads=2",
        "norm.eps: 0.01 is not what init_from has: leave it out, or give norm.eps=1.0e-06",
        f"tokenizer: 257 of its tokens are not those of init_from: leave it out, or give tokenizer=huggingface "
        f"tokenizer.path={folder}",
    ]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["experiment=gpt2"], r"position.*is not what init_from has"),
        (
            ["parametrization=mup", "parametrization.base_d_model=32"],
            r"^parametrization: would give learning rates for",
        ),
        (["attention=mla"], r"attention._target_: .* is not what init_from has: leave it out, or give attention=gqa"),
        (["block=parallel"], r"block._target_: .* give block=pre"),
    ],
)
def test_choices_that_are_other_models(
    typed: list[str], message: str, folder: Path, text_corpus: Path, tmp_path: Path
) -> None:
    found = problems_of(tiny_from(folder, text_corpus, tmp_path, *typed))
    assert any(re.search(message, line) for line in found), found


def test_choices_that_are_the_same_in_other_words(folder: Path, text_corpus: Path, tmp_path: Path) -> None:
    """And those that are of training only."""
    typed = (
        "attention=gqa",
        "attention.n_kv_heads=0.5",
        "model.vocab_multiple=64",
        "attention.dropout=0.1",
        "dropout=gpt2",
    )
    plan_of(
        config.plain(config.compose(tiny_from(folder, text_corpus, tmp_path, *typed, "attention.document_mask=true")))
    )


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (lambda place: (place / "config.json").write_text("{"), r"init_from: .*config.json cannot be read"),
        (
            lambda place: (place / "config.json").write_text('{"model_type": "mamba"}'),
            r"holds a Mamba, which has",
        ),
        (lambda place: (place / "config.json").unlink(), r"init_from: .* holds no config.json: give a folder"),
        (lambda place: (place / "model.safetensors").unlink(), r"init_from: the weights .*it has no \*.safetensors"),
        (
            lambda place: (place / "model.safetensors").write_bytes(b"cut off"),
            r"init_from: the weights in .* cannot",
        ),
        (lambda place: (place / "tokenizer.json").unlink(), r"tokenizer.path=.* cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(
    damaging: Callable[[Path], object], message: str, folder: Path, text_corpus: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(folder, tmp_path / "copy")
    damaging(place)
    with pytest.raises(ConfigError, match=message):
        plan_of(config.plain(config.compose(tiny_from(place, text_corpus, tmp_path / "shards"))))


def test_a_missing_weight_is_refused(folder: Path, text_corpus: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(place / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"init_from: .* 1 of its weights are missing .*up_proj"):
        train_here(tiny_from(place, text_corpus, tmp_path / "shards"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_hub_is_asked_after_saying_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in: nothing is fetched here."""
    with patch("huggingface_hub.snapshot_download", lambda name, **_: str(folder)):
        assert f"init_from.path={folder}" in with_options(["init_from=somebody/llama", "seed=2"])
    said = capsys.readouterr().out
    assert said.index("somebody/llama is no folder here: fetching it from the Hugging Face hub") < said.index(
        "Llama in"
    )
    with (
        patch("huggingface_hub.snapshot_download", side_effect=OSError("offline")),
        pytest.raises(ConfigError, match=r"somebody/llama is no folder here, and could not be fetched .*offline"),
    ):
        with_options(["init_from=somebody/llama"])


def test_a_run_is_no_folder_to_begin_with(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run")
    with pytest.raises(ConfigError, match=r"init_from: .* is a run: go on with it by resume="):
        with_options([f"init_from={tmp_path}"])


@pytest.mark.parametrize(("word", "said"), [("resume", "type resume=auto"), ("scratch", "leave it out")])
def test_words_of_nanogpt_are_no_models_of_the_hub(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"init_from: {word} is no folder here; {said}"):
        with_options([f"init_from={word}"])


def test_on_the_command_line(folder: Path, text_corpus: Path, tmp_path: Path) -> None:
    lines = (f"init_from={folder}", "dry_run=true", "model.n_layers=3", "data=text", f"data.path={text_corpus}")
    done = programs.run("train.py", *lines)
    printed = done.stdout + done.stderr
    assert done.returncode == 2
    assert f"init_from: the Llama in {folder} is model.d_model=32" in printed
    assert "model.n_layers 3 is not what init_from has: leave it out, or give model.n_layers=2" in printed
    assert "Traceback" not in printed


def test_options_of_ones_own_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "init_from").mkdir()
    (tmp_path / "init_from" / "zeros.yaml").write_text("# Zeros.\n_target_: mine.Zeros\n")
    arguments = [f"--config-dir={tmp_path}", "init_from=zeros"]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    assert with_options(arguments) == arguments
