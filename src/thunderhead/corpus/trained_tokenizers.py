"""Text to token ids and back: bytes, or byte-level BPE trained on the corpus. Others': `published_tokenizers.py`."""

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import tokenizers
from annotated_types import Ge, Le
from tokenizers import decoders, models, pre_tokenizers, trainers

from thunderhead.core.tokenizer import EOS, Tokenizer, Tokens
from thunderhead.core.types import PositiveInt
from thunderhead.corpus.byte_level import byte_level, with_eos
from thunderhead.corpus.published_tokenizers import LibraryTokenizer


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8: 256 ids, and EOS. Needs no training."""

    name = "byte"
    settings: ClassVar[dict[str, Any]] = {}
    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        known = (EOS.encode() if i == self.eos_id else bytes([i]) if i < self.eos_id else b"" for i in map(int, ids))
        return b"".join(known).decode("utf-8", "replace")

    def as_fast(self) -> tokenizers.Tokenizer:
        return with_eos(byte_level({bytes([byte]): byte for byte in range(256)}, None), self.eos_id)

    def to_json(self) -> str:
        return json.dumps({"type": "byte", "eos": EOS, "eos_id": self.eos_id})

    @classmethod
    def from_json(cls, text: str) -> Self:
        if json.loads(text).get("type") != "byte":
            raise ValueError("not a byte tokenizer")
        return cls()


class BpeTokenizer(LibraryTokenizer):
    """Byte-level BPE trained on the corpus, with GPT-2's way of splitting text into words (Radford et al. 2019, 2.2).

    All 256 bytes are tokens, so every text can be encoded; with EOS they count in `vocab_size`, which a small corpus
    may not fill. It is trained on `sample_bytes` of documents from all over the corpus, chosen by hash and held in
    memory; by then the merges hardly change. `to_json` is the tokenizer.json of Hugging Face's `tokenizers`.
    """

    name = "bpe"

    def __init__(
        self, *, vocab_size: Annotated[int, Ge(257), Le(65_536)] = 8192, sample_bytes: PositiveInt = 200_000_000
    ):
        self._asked, self._sample_bytes = vocab_size, sample_bytes

    @property
    def settings(self) -> dict[str, Any]:
        return {"vocab_size": self._asked, "sample_bytes": self._sample_bytes}

    def train(self, texts: Iterable[str]) -> "BpeTokenizer":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self._asked,
            min_frequency=2,  # a pair seen once is no regularity
            special_tokens=[EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sample(texts, self._sample_bytes), trainer)
        trained = type(self)(**self.settings)
        trained._load(tokenizer)
        return trained

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> Self:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        loaded = cls(vocab_size=tokenizer.get_vocab_size())
        loaded._load(tokenizer)
        return loaded


def sample(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Yield the fewest texts with the smallest hashes that make up `n_bytes` of UTF-8, in their order.

    All of them, if they are fewer. Whatever the length of `texts`, memory holds `n_bytes` and one text more.
    """
    chosen: list[tuple[int, int, bytes]] = []  # a heap, the largest hash first
    total = 0
    for index, text in enumerate(texts):
        content = text.encode()
        order = int.from_bytes(hashlib.sha256(content).digest()[8:16])  # the bytes before decide about validation
        heapq.heappush(chosen, (-order, -index, content))
        total += len(content)
        while total - len(chosen[0][2]) >= n_bytes:
            total -= len(heapq.heappop(chosen)[2])
    chosen.sort(key=lambda entry: -entry[1])
    for _, _, content in chosen:
        yield content.decode()
