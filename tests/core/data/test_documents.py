"""Validation is the same text for every tokenizer, context, micro-batch and number of ranks: counted from the text."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from thunderhead.core import config
from thunderhead.core.data.documents import Selection, choose
from thunderhead.core.model.loss import IGNORED_TARGET, LossTerms
from thunderhead.core.model_spec import ModelSpec
from thunderhead.core.module import LanguageModel, inputs_and_targets
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.published_tokenizers import HuggingFaceTokenizer
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.text_data import TextData
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer
from tiny import tiny

FRACTION, WANTED = 0.4, 9_000
Make = Callable[..., TextData]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Held out of 80 files of 0.1 to 3 KB in the order of their names: told by the documented rule alone."""
    draw, found = np.random.default_rng(0), []
    (tmp_path / "texts").mkdir()
    for i in range(80):
        words = draw.choice(["Token", "block", "naïve", "数据", "cloud\n", "Ünder"], size=draw.integers(20, 500))
        text = f"{i} " + " ".join(words)
        (tmp_path / "texts" / f"{i:03}.txt").write_text(text, encoding="utf-8")
        if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < FRACTION * 2**64:
            found.append(text)
    return found


@pytest.fixture
def word_piece(tmp_path: Path) -> Tokenizer:
    """One that loses text: case, accents, white space and all words that it does not know."""
    words = ["[UNK]", "[SEP]", "token", "block", "na", "##ive", "cloud", *map(str, range(10))]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    made.add_special_tokens(["[SEP]", "[UNK]"])
    made.save(str(tmp_path / "tokenizer.json"))
    return HuggingFaceTokenizer(path=str(tmp_path / "tokenizer.json"), eos="[SEP]")


@pytest.fixture
def make(texts: list[str], tmp_path: Path) -> Make:
    """Build a data module over the texts in small chunks, with a stand-in for the trainer."""

    def make(tokenizer: Tokenizer, rank: int = 0, world_size: int = 1, **settings: object) -> TextData:
        made_from = {"text": LocalText(path=str(tmp_path / "texts"))}
        manifest = prepare(
            made_from, tokenizer, shards_dir=tmp_path / "shards", validation_fraction=FRACTION, chunk_bytes=5_000
        )
        asked = {"context_length": 64, "micro_batch_size": 3, "max_validation_bytes": WANTED, **settings}
        module = TextData(
            tokenizer=tokenizer, filters={}, sequences_per_step=24, seed=1, sources=made_from,
            shards_dir=str(tmp_path / "shards"), shards_key=manifest.key, validation_fraction=FRACTION, **asked,
        )  # fmt: skip
        module.trainer = SimpleNamespace(
            strategy=SimpleNamespace(
                root_device=torch.device("cpu"),
                distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
            )
        )
        module.setup("fit")
        return module

    return make


def chosen(module: TextData, texts: list[str]) -> list[str]:
    return [texts[number] for number in module.selection("text").numbers]


def batches(module: TextData) -> Iterator[Tensor]:
    (loader,) = module.val_dataloader()
    return iter(loader)


def predicted(module: TextData) -> list[int]:
    """All targets, in their order."""
    found = [inputs_and_targets(batch)[1] for batch in batches(module)]
    return [token for targets in found for token in targets.flatten().tolist() if token != IGNORED_TARGET]


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text).tolist(), tokenizer.eos_id]]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=200), st.integers(1, 40_000))
def test_documents_are_spread_evenly_and_bounded(sizes: list[int], wanted: int) -> None:
    numbers = choose(np.array(sizes), wanted)
    assert numbers == sorted(set(numbers))
    taken = [sizes[number] for number in numbers]
    if wanted >= sum(sizes):
        assert numbers == list(range(len(sizes)))
    elif wanted < min(sizes):
        assert taken == [min(sizes)]
    else:
        assert len(numbers) >= 1
        assert sum(taken) <= wanted
        for end in range(len(sizes)):  # a document ahead of an even share at most, and little behind if they are short
            ahead = sum(sizes[n] for n in numbers if n < end) - sum(sizes[:end]) * wanted / sum(sizes)
            assert ahead <= max(sizes)
            assert ahead >= -2 * max(sizes) or max(sizes) > wanted / 4
    assert choose(np.array(sizes), None) == list(range(len(sizes)))


def test_tokens_bound_them_too() -> None:
    documents = np.array([[10, 4], [10, 8], [10, 4], [10, 3]])
    assert Selection.of(documents, None, 12).numbers == [0, 2]  # spread evenly, as bytes are
    few = Selection.of(documents, 25, 3)
    assert (few.numbers, few.bytes, few.tokens.tolist()) == ([0], 10, [4])  # at least one, and whole


def test_all_arms_validate_on_the_same_text(make: Make, texts: list[str]) -> None:
    byte, bpe = make(ByteTokenizer()), make(BpeTokenizer(vocab_size=300))
    assert chosen(byte, texts) == chosen(bpe, texts)
    n_bytes = sum(len(text.encode()) for text in chosen(byte, texts))
    assert WANTED - 3_000 < n_bytes == byte.selection("text").bytes == bpe.selection("text").bytes <= WANTED
    assert bytes(token for token in predicted(byte) if token < 256).decode() == "".join(chosen(byte, texts))
    assert bpe.tokenizer is not None
    assert predicted(bpe) == encoded(bpe.tokenizer, chosen(byte, texts))
    assert len(predicted(bpe)) < 0.8 * len(predicted(byte))
    assert byte.validation_text() == bpe.validation_text()
    assert byte.validation_data() != bpe.validation_data()
    longer = make(ByteTokenizer(), context_length=128)
    assert byte.validation_text() == longer.validation_text()
    assert byte.validation_data() != longer.validation_data()  # other tokens before each
    for other in ({"max_validation_bytes": 5_000}, {"max_validation_tokens": 4_000}):
        assert make(ByteTokenizer(), **other).validation_text() != byte.validation_text()
    assert make(ByteTokenizer(), micro_batch_size=8).validation_data() == byte.validation_data()


def test_without_a_bound_all_is_validated_on(make: Make, texts: list[str]) -> None:
    module = make(ByteTokenizer(), max_validation_bytes=None)
    assert predicted(module) == encoded(ByteTokenizer(), texts)
    assert len(module.manifest.splits["val"]["text"].chunks) > 2


@pytest.mark.parametrize("context_length", [1, 64, 128, 20_000])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 3), (1, 8), (2, 3), (4, 8), (3, 2)])
def test_each_token_is_a_target_once(
    make: Make, texts: list[str], context_length: int, world_size: int, micro: int
) -> None:
    sizes = {"context_length": context_length, "micro_batch_size": micro}
    if context_length == 20_000:  # training would be refused
        monkey = pytest.MonkeyPatch()
        monkey.setattr("thunderhead.corpus.shard_data.check_blocks", lambda *_: None)
    modules = [make(ByteTokenizer(), rank, world_size, **sizes) for rank in range(world_size)]
    if context_length == 20_000:
        monkey.undo()
    by_rank = [list(batches(module)) for module in modules]
    assert len({len(found) for found in by_rank}) == 1
    assert len({batch.shape for found in by_rank for batch in found}) == 1
    rows = torch.stack([torch.stack(found) for found in by_rank], dim=1).flatten(0, 2)
    inputs, targets = inputs_and_targets(rows)
    counted = targets[targets != IGNORED_TARGET]
    tokens = torch.tensor(encoded(ByteTokenizer(), chosen(modules[0], texts)))
    assert torch.equal(counted, tokens)
    # what is read is the text itself, from an EOS on, whatever is predicted of it
    assert torch.equal(inputs[targets != IGNORED_TARGET], torch.tensor([256, *tokens[:-1]]))
    assert 0 <= inputs.min() <= inputs.max() <= 256
    n_blocks = math.ceil(len(tokens) / context_length)
    assert len(rows) - n_blocks < world_size * len(by_rank[0]) + world_size  # little is filled up


class Uniform(torch.nn.Module):
    """Each token is as probable as any other; the loss is a mean, NaN of nothing."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, inputs: Tensor, targets: Tensor) -> LossTerms:
        losses = torch.full(targets.shape, math.log(self.vocab_size), dtype=torch.float64)
        loss = losses[targets != IGNORED_TARGET].mean()
        return LossTerms(loss, loss, {})


def measured(modules: list[TextData]) -> dict[str, float]:
    """What the ranks' sums add up to."""
    vocab_size, found = modules[0].vocab_size, dict[str, Tensor]()
    model = LanguageModel(
        ModelSpec.of(config.plain(config.compose(tiny("x", "x")))),
        seed=1, vocab_size=vocab_size, eos_id=0, total_steps=1, metrics=modules[0].validation_metrics,
        sources=modules[0].validation_sources(),
    )  # fmt: skip
    model.decoder = Uniform(vocab_size)  # type: ignore[assignment]
    model.log_dict = lambda values, **_: found.update(values)  # type: ignore[method-assign,assignment]
    for module in modules:
        for number, batch in enumerate(batches(module)):
            model.validation_step(batch, number)
    model.on_validation_epoch_end()
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["byte", "bpe", "word_piece"])
def test_bits_per_byte_are_those_of_the_text(
    make: Make, texts: list[str], word_piece: Tokenizer, name: str, world_size: int
) -> None:
    """Of a model that knows nothing, log2 V bits a token: exactly, also where the tokenizer loses text."""
    tokenizer = {"byte": ByteTokenizer(), "bpe": BpeTokenizer(vocab_size=300), "word_piece": word_piece}[name]
    modules = [make(tokenizer, rank, world_size, context_length=64) for rank in range(world_size)]
    trained = modules[0].tokenizer
    assert trained is not None
    documents = chosen(modules[0], texts)
    n_tokens, n_bytes = len(encoded(trained, documents)), sum(len(text.encode()) for text in documents)
    found = measured(modules)
    assert found["val/loss"] == pytest.approx(math.log(trained.vocab_size), rel=1e-12)
    assert found["val/bits_per_byte"] == pytest.approx(
        math.log2(trained.vocab_size) * n_tokens / n_bytes, rel=1e-9, abs=0
    )
    if name == "word_piece":
        kept = "".join(trained.decode(trained.encode(text)) for text in documents).replace("[UNK]", "")
        assert len(kept.encode()) < 0.7 * n_bytes
