"""GGUF files, read back by transformers and by gguf, and computed by llama.cpp where that is installed."""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from test_huggingface import CHOICES, CONTEXT
from test_huggingface import decoder_of as decoder_of_size
from transformers import AutoModelForCausalLM

from thunderhead.core.model.decoder import Decoder
from thunderhead.core.tokenizer import EOS, Tokenizer
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer
from thunderhead.release.facts import Misfit
from thunderhead.release.llama_cpp import ARCHITECTURES, architecture_of, vocabulary_of, write_gguf
from thunderhead.release.sample import generate

PLAIN = ("model.bias=false", "model.tie_embeddings=true", "parametrization=standard")
RMSNORM, LAYERNORM, ROPE = ("norm=rmsnorm", "block=pre"), ("norm=layernorm", "block=pre"), "position=rope"
GELU, PARTIAL = "activation=gelu activation.approximate=tanh", "position=rope position.fraction=0.5"
EXAMPLES = {
    "llama": ("attention=gqa", ROPE, "activation=swiglu", *RMSNORM),
    "qwen3": ("attention=gqa attention.qk_norm=true", ROPE, "activation=swiglu", "norm.eps=0.000001", *RMSNORM),
    "arcee": ("attention=gqa attention.head_dim=12", ROPE, "activation=relu2", *RMSNORM),
    "gpt2": ("attention=mha", "position=sinusoidal", GELU, *LAYERNORM),
    "gptneox": ("attention=gqa", PARTIAL, GELU, "norm=layernorm", "block=parallel block.shared_norm=false"),
    "nemotron": ("attention=gqa", PARTIAL, "activation=relu2", *LAYERNORM),
    "stablelm": ("attention=gqa", PARTIAL, "activation=swiglu", *LAYERNORM),
    "phi2": ("attention=gqa", ROPE, GELU, "norm=layernorm", "block=parallel"),
    "mpt": ("attention=mha", "position=alibi", GELU, *LAYERNORM),
}
VARIANTS = {
    "llama": ("position=rope position.scaling=linear position.factor=2", "model.bias=true"),
    "arcee": (
        "position=rope position.scaling=llama3 position.factor=4 position.original_context_length=16",
        "attention=gqa attention.qkv_bias=true",
    ),
    "gpt2": ("model.bias=true", "attention=mqa", "position=none"),
    "gptneox": ("block=pre", "model.bias=true"),
    "nemotron": ("model.bias=true", "position=rope position.scaling=ntk position.factor=2"),
    "stablelm": ("block=parallel", "attention=gqa attention.qkv_bias=true"),
    "mpt": ("model.bias=true", "norm=layernorm norm.bias=false", "norm=layernorm norm.elementwise_affine=false"),
}


VOCAB = ByteTokenizer.vocab_size


def decoder_of(choices: Iterable[str], vocab_size: int = VOCAB) -> Decoder:
    return decoder_of_size(choices, vocab_size)


def written(decoder: Decoder, folder: Path, tokenizer: Tokenizer | None = None, **settings: Any) -> Path:
    vocabulary = vocabulary_of(tokenizer or ByteTokenizer(), decoder.vocab_size)
    settings = {"dtype": "float32", "max_shard_size": 10**9} | settings
    write_gguf(decoder, architecture_of(decoder), vocabulary, folder, name="example", **settings)
    return folder / "model.gguf"


def test_each_architecture_has_an_example() -> None:
    assert [architecture.name for architecture in ARCHITECTURES] == [*EXAMPLES]
    for name, choices in EXAMPLES.items():
        assert architecture_of(decoder_of((*PLAIN, *choices))).name == name


@pytest.mark.parametrize("parametrization", ["parametrization=standard", CHOICES[-1][1]], ids=["standard", "mup"])
@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_transformers_reads_the_same_model(name: str, parametrization: str, tmp_path: Path) -> None:
    """Its reader knows two of the architectures at this size; rounding as in test_huggingface."""
    decoder = decoder_of((*PLAIN, *EXAMPLES[name], parametrization))
    file = written(decoder, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    tokens_BT = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours, theirs = decoder.logits(tokens_BT), model(tokens_BT).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_half_the_size_in_files_of_a_size(tmp_path: Path) -> None:
    """Matrices in bfloat16, vectors as they are; together they are all of it."""
    decoder = decoder_of((*PLAIN, *EXAMPLES["llama"]))
    written(decoder, tmp_path, dtype="bfloat16", max_shard_size=10_000)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05}.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for file in files for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert len(kinds) == len(decoder.state_dict())


def test_the_tokenizer_is_in_it(tmp_path: Path) -> None:
    tokenizer = BpeTokenizer(vocab_size=300).train(["the cat sat on the mat, and the dog sat on the log"] * 3)
    vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size)
    assert vocabulary["tokenizer_pre"] == "gpt-2"
    assert vocabulary["token_list"][tokenizer.eos_id] == EOS
    assert vocabulary["token_list"][tokenizer.encode(" the")[0]] == "Ġthe"
    assert len(vocabulary["token_merges"]) == tokenizer.vocab_size - 257
    assert [kind.name for kind in vocabulary["token_types"]].count("CONTROL") == 1
    assert vocabulary_of(tokenizer, tokenizer.vocab_size + 3)["token_list"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
    ids=str,
)
def test_tokenizers_that_it_does_not_have(changes: dict[str, Any]) -> None:
    tokenizer = BpeTokenizer(vocab_size=300).train(["the cat sat on the mat"] * 3)
    other = BpeTokenizer.from_json(json.dumps({**json.loads(tokenizer.to_json()), **changes}))
    with pytest.raises(ValueError, match="byte-level BPE"):
        vocabulary_of(other, other.vocab_size)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("attention=gqa attention.window=7", "attention.window=given"),
        ("activation.approximate=none", "function=gelu"),
        ("activation=geglu", "function=gelu"),
        ("block=sandwich", "block=sandwich"),
        ("position=none", "position=none"),
    ],
)
def test_what_it_would_compute_differently_is_refused(choice: str, reason: str) -> None:
    example = "gpt2" if "approximate" in choice else "llama"
    with pytest.raises(Misfit, match=reason):
        architecture_of(decoder_of((*PLAIN, *EXAMPLES[example], choice)))


# --- llama.cpp itself -------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A file loaded by llama-cpp-python; the test is skipped without it."""

    def __init__(self, file: Path):
        module = pytest.importorskip("llama_cpp")
        self.model = module.Llama(
            str(file), n_ctx=CONTEXT, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
        )  # float32

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """(T, V)"""
        self.model.reset()
        self.model.eval(tokens)
        return torch.from_numpy(np.array(self.model.scores[: len(tokens)]))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=True, special=False)
        return ids

    def decode(self, ids: list[int]) -> bytes:
        text: bytes = self.model.detokenize(ids)
        return text


def tolerance(name: str) -> float:
    """Of the largest logit: float32's rounding (5e-7 was seen), and of GELU, a table in float16 there (6e-4)."""
    return 3e-3 if name in {"gpt2", "gptneox", "phi2", "mpt"} else 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, "") for name in EXAMPLES),
        *((name, CHOICES[-1][1]) for name in EXAMPLES),
        *((name, "model.tie_embeddings=false") for name in EXAMPLES),
        *((name, change) for name, changes in VARIANTS.items() for change in changes),
    ],
)
def test_llama_cpp_computes_the_same(name: str, change: str, tmp_path: Path) -> None:
    group = change.partition("=")[0]
    kept = [choice for choice in EXAMPLES[name] if not choice.startswith(f"{group}=")]
    decoder = decoder_of((*PLAIN, *kept, change))
    assert architecture_of(decoder).name == name
    model = LlamaCpp(written(decoder, tmp_path))
    tokens_T = torch.randint(VOCAB - 1, (CONTEXT,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours_TV = decoder.logits(tokens_T[None])[0]
    theirs_TV = model.logits(tokens_T.tolist())
    assert (ours_TV - theirs_TV).abs().max() < tolerance(name) * ours_TV.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_llama_cpp_continues_greedily_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    decoder = decoder_of((*PLAIN, *EXAMPLES[name]))
    model, tokens = LlamaCpp(written(decoder, tmp_path)), [1, 2, 3, 4, 5]
    ours = generate(decoder, torch.tensor([tokens]), CONTEXT - 5, temperature=0.0)[0].tolist()
    for _ in range(CONTEXT - 5):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert tokens == ours[: len(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_llama_cpp_reads_texts_as_the_same_tokens(kind: str, tmp_path: Path) -> None:
    corpus = [*("def f(x):\n    return x + 1\n\n\nclass Word:\n\tpass  # it's 1,234 é漢字 🙂",) * 5]
    tokenizer = ByteTokenizer() if kind == "byte" else BpeTokenizer(vocab_size=350).train(corpus)
    decoder = decoder_of((*PLAIN, *EXAMPLES["llama"]), tokenizer.vocab_size)
    model = LlamaCpp(written(decoder, tmp_path, tokenizer))
    drawn, pieces = random.Random(0), [*corpus[0], EOS, "  ", "'s", "123", "\r\n", "\u3000", "return", "ǅ", "\x00"]
    texts = [corpus[0], EOS, *("".join(drawn.choices(pieces, k=n)) for n in itertools.chain(*[range(1, 40)] * 10))]
    for text in texts:
        ids = [int(token) for token in tokenizer.encode(text)]
        assert model.encode(text) == ids, text
        assert model.decode(ids).decode() == text
