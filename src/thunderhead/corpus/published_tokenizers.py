"""Tokenizers that somebody else trained, read from files: tokenizer.json of Hugging Face, and tiktoken's encodings."""

import base64
import functools
import itertools
import json
import re
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import tokenizers
from annotated_types import Ge, Lt

from thunderhead import extras, word_patterns
from thunderhead.core.config import first_line
from thunderhead.core.tokenizer import EOS, MAX_VOCAB_SIZE, Tokenizer, Tokens
from thunderhead.core.types import PathText
from thunderhead.corpus.byte_level import byte_level, with_eos

# How published tokenizers spell the end of a document, the likeliest first: GPT-2, Llama 2, Llama 3, Gemma …
_EOS_SPELLINGS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|endofdocument|>", "<|end▁of▁sentence|>")
_CONTEXTS = ("{0}", " {0}", "{0} ", "a {0} b", "a{0}b", "{0}{0}", "{0} {0}", '("{0}")', "\n{0}\n")  # of EOS in a text
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how SentencePiece spells a byte that is in no other token

# tiktoken's encodings by the name of their file: how words are split, and the id of <|endoftext|>; as in
# tiktoken_ext/openai_public.py of tiktoken 0.14, where they are bound to a download.
_ENCODINGS = {
    **dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), (word_patterns.GPT2, 50256)),
    "cl100k_base": (word_patterns.CL100K, 100257),
    "o200k_base": (word_patterns.O200K, 199999),
}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers`. No text becomes a special token, not even its spelling."""

    vocab_size = eos_id = 0  # until `_load` knows

    def _load(self, tokenizer: tokenizers.Tokenizer, eos: str = EOS) -> None:
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size, self.eos_id = _size(self._vocabulary.values()), self._vocabulary[eos]
        self._tokenizer, self._encoder, self._eos = tokenizer, _for_text(tokenizer), eos
        for each in (self._tokenizer, self._encoder):
            each.encode_special_tokens = True  # the spelling of EOS in a text is text (files do not keep this)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of all text that the vocabulary does not hold, if there is such a token."""
        model = json.loads(self._tokenizer.to_str())["model"]
        found: int | None = self._vocabulary.get(model.get("unk_token"), model.get("unk_id"))
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        # np.array refuses an id that the type cannot hold, where astype would wrap around.
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:  # a panic in Rust, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tokenizer.path: this tokenizer gives up on a text: {error}") from None
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        # EOS by hand: decoders that join words put spaces around it, or take it for text.
        parts = []
        for is_eos, group in itertools.groupby(map(int, ids), key=self.eos_id.__eq__):
            some = list(group)
            parts.append(self._eos * len(some) if is_eos else self._tokenizer.decode(some, skip_special_tokens=False))
        return "".join(parts)

    def as_fast(self) -> tokenizers.Tokenizer:
        """Without a published one's template, which would put tokens around each text."""
        content = {**json.loads(self._tokenizer.to_str()), "post_processor": None}
        return tokenizers.Tokenizer.from_str(json.dumps(content))


class PublishedTokenizer(Tokenizer):
    """A tokenizer from a file, which the shards keep a copy of: what `_content` returns, and `_set` takes."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"sha256": self.sha256}

    @abstractmethod
    def _content(self) -> dict[str, Any]: ...

    _set: Callable[..., None]

    def to_json(self) -> str:
        return json.dumps({"type": self.name, **self._content()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        content = json.loads(text)
        if content.pop("type", None) != cls.name:
            raise ValueError(f"not a tokenizer of the kind {cls.name}")
        tokenizer = cls.__new__(cls)
        tokenizer._set(**content)
        return tokenizer


class HuggingFaceTokenizer(PublishedTokenizer, LibraryTokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`, used as it is; EOS after each document is all that is added.

    A tokenizer that lower cases, normalises characters or has an unknown token loses text. Its bits per byte are of all
    bytes, while it has to predict only what it keeps: they flatter it. Raises ValueError if there is no such file, it
    is no tokenizer, EOS is not found, or text can spell EOS.

    Args:
        path: the file, or the folder that holds it (and, where EOS is not named, tokenizer_config.json).
        eos: spelling of the token that ends a document; null: as tokenizer_config.json says, or one of the usual.
    """

    name = "huggingface"

    def __init__(self, *, path: PathText, eos: str | None = None):
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        text = _read(file, "a tokenizer.json, or the folder that holds one").decode("utf-8", "replace")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer.path={path} is no tokenizer.json ({first_line(error)})") from None
        self._prepare(tokenizer, _find_eos(tokenizer, eos or _configured_eos(file.parent), path))

    def _prepare(self, tokenizer: tokenizers.Tokenizer, eos: str) -> None:
        added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if eos not in added:  # a token like any other, which text may need
            self._load(tokenizer, eos)
            self._refuse_spelled()
        if eos not in added or not added[eos].special:
            tokenizer.add_special_tokens([eos])  # already in the vocabulary: keeps its id, and is special from now on
        self._load(tokenizer, eos)
        self._refuse_spelled()

    def _refuse_spelled(self) -> None:
        texts = [context.format(self._eos) for context in _CONTEXTS]
        if any(self.eos_id in ids for ids in self.encode_batch(texts)):
            remedy = "name another, or one that the file has among its added_tokens"
            raise ValueError(f"tokenizer.eos={self._eos} can be spelled by text, which would end documents: {remedy}")

    def _content(self) -> dict[str, Any]:
        return {"eos": self._eos, "tokenizer": json.loads(self._tokenizer.to_str())}

    def _set(self, *, eos: str, tokenizer: dict[str, Any]) -> None:
        self._prepare(tokenizers.Tokenizer.from_str(json.dumps(tokenizer)), eos)


TokenId = Annotated[int, Ge(0), Lt(MAX_VOCAB_SIZE)]


class TiktokenTokenizer(PublishedTokenizer):
    """An encoding of tiktoken from its file of tokens: base64 and rank, a line each. Downloads nothing.

    Args:
        path: the file, named as the encoding is (r50k_base.tiktoken) where `pattern` is null.
        pattern: regular expression that splits text into words; null: the one published for the file's name.
        eos_id: id of <|endoftext|>; null: the one published for the file's name, or the first id after the ranks.
    """

    name = "tiktoken"
    vocab_size = eos_id = 0  # until `_set` knows

    def __init__(self, *, path: PathText, pattern: str | None = None, eos_id: TokenId | None = None):
        file = Path(path).expanduser()
        content = _read(file, "a file of tiktoken's, such as r50k_base.tiktoken")
        try:
            ranks = {token.decode(): int(rank) for token, rank in map(bytes.split, content.splitlines())}
            single = {token for token in ranks if len(base64.b64decode(token, validate=True)) == 1}
        except ValueError as error:
            raise ValueError(f"tokenizer.path={path} is no file of tiktoken's ({error})") from None
        if missing := 256 - len(single):
            raise ValueError(f"tokenizer.path={path} is no file of tiktoken's: {missing} of 256 bytes have no token")
        after = max(ranks.values()) + 1
        if pattern is None:
            if file.stem not in _ENCODINGS:
                unknown = f"how {file.stem} splits words is not known here (known are {', '.join(_ENCODINGS)})"
                raise ValueError(f"tokenizer.path={path}: {unknown}: give tokenizer.pattern=… and tokenizer.eos_id=…")
            pattern, after = _ENCODINGS[file.stem]
        self._set(pattern=pattern, eos_id=after if eos_id is None else eos_id, ranks=ranks)

    def _set(self, *, pattern: str, eos_id: int, ranks: dict[str, int]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ValueError(f"tokenizer=tiktoken needs tiktoken: {extras.install('tiktoken')}") from None
        self._pattern, self.eos_id = pattern, eos_id
        self._ranks = {base64.b64decode(token): rank for token, rank in ranks.items()}
        self._by_id = {rank: token for token, rank in self._ranks.items()}
        if eos_id in self._by_id:
            free = max(self._by_id) + 1
            raise ValueError(f"tokenizer.eos_id={eos_id} is the id of a token of text: {free} is free")
        self._by_id[eos_id] = EOS.encode()
        self.vocab_size = _size(self._by_id)
        try:
            self._encoding = tiktoken.Encoding(
                self.name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={EOS: eos_id}
            )
        except ValueError as error:
            raise ValueError(f"tokenizer.pattern={pattern} is no regular expression ({error})") from None

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.array(ids, dtype=self.dtype) for ids in map(self._encoding.encode_ordinary, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._by_id.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def as_fast(self) -> tokenizers.Tokenizer:
        return with_eos(byte_level(self._ranks, self._pattern), self.eos_id)

    def _content(self) -> dict[str, Any]:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self._ranks.items()}
        return {"pattern": self._pattern, "eos_id": self.eos_id, "ranks": ranks}


def _read(file: Path, wanted: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer.path={file} cannot be read ({error.strerror}): give {wanted}") from None


def _configured_eos(folder: Path) -> str | None:
    """Read eos_token of tokenizer_config.json: a spelling, or an added token as an object."""
    try:
        eos = json.loads((folder / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError):
        return None
    return eos.get("content") if isinstance(eos, dict) else eos


def _size(ids: Iterable[int]) -> int:
    """The size of a vocabulary of these ids, which may have holes."""
    if (size := max(ids) + 1) > MAX_VOCAB_SIZE:
        raise ValueError(f"tokenizer.path: its ids go up to {size - 1:,}, and {MAX_VOCAB_SIZE:,} tokens are the most")
    return size


def _find_eos(tokenizer: tokenizers.Tokenizer, eos: str | None, path: str) -> str:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    known = f"its special tokens are {', '.join(special[:10]) or 'none'}"
    if eos is not None:
        if tokenizer.token_to_id(eos) is None:
            raise ValueError(f"tokenizer.eos={eos} is no token of {path}; {known}")
        return eos
    if found := [spelling for spelling in _EOS_SPELLINGS if spelling in special]:
        return found[0]
    raise ValueError(f"tokenizer.path={path}: which token ends a document? ({known}): give tokenizer.eos=…")


def _for_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that gives text the same ids, except that no text becomes a special token.

    A model may hold special tokens as pieces like others, where their spelling is found, as BERT's and T5's do. In the
    copy they are spelled as nobody can know. What text needs keeps its spelling: a character, and SentencePiece's byte.
    """
    content = json.loads(tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    special = {token["content"] for token in added if token["special"]}
    pieces = {token for token in dict(model["vocab"]).keys() & special if len(token) > 1 and not _BYTE.fullmatch(token)}
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        merges = [(left, right, left + right.removeprefix(prefix)) for left, right in model["merges"]]
        if not model["ignore_merges"]:
            pieces &= {merged for *_, merged in merges}
        model["merges"] = [merge[:2] for merge in merges if pieces.isdisjoint(merge)]
    if not pieces:
        return tokenizer  # a second one of 128,000 tokens takes a second to read
    spelled = {piece: piece + secrets.token_hex() for piece in pieces}
    if isinstance(model["vocab"], list):  # Unigram's
        model["vocab"] = [[spelled.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {spelled.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "unk_token" in model:
        model["unk_token"] = spelled.get(model["unk_token"], model["unk_token"])
    for token in added:
        token["content"] = spelled.get(token["content"], token["content"])
    return tokenizers.Tokenizer.from_str(json.dumps({**content, "post_processor": None}))
