"""`python export.py run=…`: a folder that transformers loads by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.module import LanguageModel
from thunderhead.core.tokenizer import EOS, Tokenizer
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer
from thunderhead.release.export import export, fast_tokenizer
from thunderhead.release.sample import generate
from tiny import tiny, train_here

TEXTS = st.text() | st.lists(st.sampled_from([EOS, " ", "\n", "word", "é", "漢字", "\r", "'s", "  ", "\x00"])).map(
    "".join
)


def exported(run_dir: Path, *overrides: str) -> Path:
    return export(config.compose([f"run={run_dir}", *overrides], "export"))


@pytest.fixture(scope="module")
def folder(text_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("exported")
    settings = ("callbacks=default", "tokenizer=bpe", "tokenizer.vocab_size=300", "logger=csv")
    train_here(tiny(text_corpus, run_dir / "shards", *settings), run_dir)
    return exported(run_dir)


def test_the_folder_loads_and_says_the_same(folder: Path) -> None:
    """Logits of the checkpoint, and greedy text, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    decoder = LanguageModel.load_from_checkpoint(folder.parent / "checkpoints" / "last.ckpt").decoder.eval()
    tokens_BT = torch.randint(decoder.vocab_size, (2, decoder.context_length))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens_BT).logits, decoder.logits(tokens_BT), rtol=1e-5, atol=1e-5)
        theirs = model.generate(tokens_BT[:, :8], max_new_tokens=12, do_sample=False)
    ours = generate(decoder, tokens_BT[:, :8], 12, temperature=0, eos_id=decoder.eos_id)
    assert theirs[:, : ours.shape[1]].tolist() == ours.tolist()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_tokenizer_encodes_as_ours(text: str, folder: Path) -> None:
    """EOS' spelling in a text is text, and nothing is added."""
    theirs = _loaded(folder)
    ours = BpeTokenizer.from_json((folder.parent / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [int(token) for token in ours.encode(text)]
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


_tokenizers: dict[Path, Any] = {}


def _loaded(folder: Path) -> Any:
    if folder not in _tokenizers:
        _tokenizers[folder] = AutoTokenizer.from_pretrained(folder)
    return _tokenizers[folder]


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bytes_are_tokens_there_too(text: str) -> None:
    same(ByteTokenizer(), text)


def same(tokenizer: Tokenizer, text: str) -> None:
    ids = [int(token) for token in tokenizer.encode(text)]
    fast = fast_tokenizer(tokenizer, 64)
    assert fast(text)["input_ids"] == ids
    assert fast.decode(ids) == tokenizer.decode(ids)
    assert (fast.eos_token_id, fast.vocab_size <= len(fast)) == (tokenizer.eos_id, True)


def test_the_card_tells_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| class | LlamaForCausalLM |" in card
    assert "nats a token" in card
    assert "python train.py" in card
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == generation["pad_token_id"] == 0
    assert not list(folder.parent.glob(".huggingface.*"))


def test_documents_kept_apart_in_training(run: Callable[..., Path]) -> None:
    """Within one, nothing is different."""
    assert (exported(run("callbacks=default", "attention.document_mask=true")) / "config.json").is_file()


def test_half_the_size(run: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        made = exported(run("callbacks=default"), f"out={tmp_path / dtype}", f"dtype={dtype}")
        sizes[dtype] = (made / "model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes["float32"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16


def test_a_file_for_llama_cpp(folder: Path, tmp_path: Path) -> None:
    """Of the tokenizer that the run trained; its class and how it is loaded stand in the card."""
    made = exported(folder.parent, "format=gguf", f"out={tmp_path / 'small'}")
    fields = GGUFReader(made / "model.gguf").fields
    assert fields["general.name"].contents() == "small"
    assert fields["general.architecture"].contents() == "llama"
    assert fields["tokenizer.ggml.tokens"].contents() == [
        token for token, _ in sorted(_loaded(folder).get_vocab().items(), key=lambda entry: entry[1])
    ]
    card = (made / "README.md").read_text(encoding="utf-8")
    assert "library_name: llama.cpp" in card
    assert "| class | llama, of llama.cpp |" in card
    assert 'Llama("path/to/this/folder/model.gguf")' in card


def test_sizes_of_files(folder: Path, tmp_path: Path) -> None:
    made = exported(folder.parent, f"out={tmp_path / 'out'}", "max_shard_size=20KB")
    sizes = [file.stat().st_size for file in made.glob("*.safetensors")]
    assert len(sizes) > 1
    with pytest.raises(ConfigError, match="max_shard_size: 'five' is no size: write 5GB"):
        exported(folder.parent, f"out={tmp_path / 'other'}", "max_shard_size=five")


def test_what_is_there_is_not_replaced(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: .*huggingface is there already: give another folder"):
        exported(folder.parent)


def test_a_model_without_a_class_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("callbacks=default", "block=peri")
    for kind, nearest in (("huggingface", "Llama"), ("gguf", "llama")):
        with pytest.raises(ConfigError, match=rf"has no class for this model: {nearest} comes nearest.* block=peri"):
            exported(folder, f"out={tmp_path / 'out'}", f"format={kind}")
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]
