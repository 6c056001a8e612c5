"""What a tokenizer is, and how a trained one is read back."""

import functools
import hashlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from thunderhead.core.trust import is_trusted

EOS = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**24  # far more than any published; there are arrays with a number for each id
# By which manifests name the kinds that come with Thunderhead.
KINDS = {
    "byte": "thunderhead.corpus.trained_tokenizers.ByteTokenizer",
    "bpe": "thunderhead.corpus.trained_tokenizers.BpeTokenizer",
    "huggingface": "thunderhead.corpus.published_tokenizers.HuggingFaceTokenizer",
    "tiktoken": "thunderhead.corpus.published_tokenizers.TiktokenTokenizer",
    "symbols": "thunderhead.options.synthetic_tasks.SymbolTokenizer",
}

Tokens = npt.NDArray[np.uint16 | np.uint32]


def dtype_for(vocab_size: int) -> np.dtype[np.uint16 | np.uint32]:
    """Choose the type of tokens on the disk: two bytes if they hold all ids of the vocabulary, four if not."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.uint32)


class Tokenizer(ABC):
    """What all tokenizers can do. EOS ends a document; no text encodes to it, not even its own spelling."""

    name: ClassVar[str]
    """By which shards name the kind of their tokenizer; of a class that gives none, where it is imported from."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}.{cls.__qualname__}"

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What training depends on besides the text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are 0 … vocab_size - 1, EOS among them."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id that is put after each document."""

    def train(self, texts: Iterable[str]) -> "Tokenizer":
        """Return a tokenizer trained on the texts, the same for the same texts; here one that needs no training."""
        return self

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Encode texts, without EOS."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary are left out."""

    @abstractmethod
    def to_json(self) -> str:
        """Write the trained tokenizer as text."""

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; raises ValueError if it is of another kind."""

    def as_fast(self) -> Any:
        """The same as a `tokenizers.Tokenizer`, with EOS as a special token; raises ValueError if that cannot be."""
        raise ValueError(f"the tokenizer {self.name} has no counterpart among Hugging Face's")

    def encode(self, text: str) -> Tokens:
        """Encode one text, without EOS."""
        return self.encode_batch([text])[0]

    @property
    def dtype(self) -> np.dtype[np.uint16 | np.uint32]:
        """The type of the tokens."""
        return dtype_for(self.vocab_size)

    @functools.cached_property
    def sha256(self) -> str:
        """Tell one trained tokenizer from another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@functools.lru_cache(maxsize=2)  # a run asks several times, and 128,000 tokens take a second or two to read
def load_tokenizer(name: str, text: str) -> Tokenizer:
    """Read what a trained tokenizer's `to_json` wrote; `name` is one of KINDS, or where a trusted class lies.

    Raises ValueError if the kind is unknown or not trusted, or the text is not of this kind.
    """
    try:
        kind = pkgutil.resolve_name(KINDS.get(name, name)) if name in KINDS or is_trusted(name) else None
    except (ImportError, AttributeError, ValueError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Tokenizer)):
        known = ", ".join(KINDS)
        other = f"if you know this class and it can be imported: trust=[{name.rpartition('.')[0] or name}]"
        raise ValueError(f"unknown kind of tokenizer {name}: known are {known}; {other}")
    return kind.from_json(text)
