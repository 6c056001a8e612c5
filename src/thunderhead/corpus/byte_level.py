"""Bytes, and tiktoken's encodings, as a tokenizer of Hugging Face's `tokenizers`."""

from collections.abc import Mapping

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from thunderhead.core.tokenizer import EOS


def byte_level(ranks: Mapping[bytes, int], pattern: str | None) -> tokenizers.Tokenizer:
    """BPE over bytes that joins the pair of the lowest rank first; `pattern` splits text into words before."""
    spelled = _spelling()

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        fast.pre_tokenizer = bytes_of
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated", invert=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    fast.decoder = decoders.ByteLevel()
    return fast


def with_eos(tokenizer: tokenizers.Tokenizer, eos_id: int) -> tokenizers.Tokenizer:
    """Add EOS as a special token, behind others for ids that nothing has; raises ValueError if it must be before."""
    first = tokenizer.get_vocab_size()
    if eos_id < first:
        raise ValueError(f"its end of document has the id {eos_id}, among the {first} of text")
    tokenizer.add_special_tokens([*(f"<|unused_{n}|>" for n in range(first, eos_id)), EOS])
    return tokenizer


def _spelling() -> dict[int, str]:
    """The character by which GPT-2's vocabularies spell a byte: itself where it can be seen, else one after U+00FF."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs that make a token, by its rank: of the splits of one token, the pair of the lowest ranks first."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:n], token[n:]) for n in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in splits if left in ranks and right in ranks]
        merges += [(left, right) for *_, left, right in sorted(known)]
    return merges
