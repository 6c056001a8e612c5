"""Validation on whole documents, chosen by the bytes of their text alone: the same for every tokenizer and context."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thunderhead.core.data.manifest import Shard
from thunderhead.core.data.shards import ShardReader
from thunderhead.core.tokenizer import Tokens


def choose(n_bytes: npt.NDArray[np.int64], wanted: int | None) -> list[int]:
    """Choose documents of `wanted` bytes in all at most (None: all of them), spread evenly over their bytes.

    Of documents in a row, one is taken if those before it have fallen behind their share, and it still fits. If none is
    short enough, the shortest is taken. Returns their numbers, at least one, rising.
    """
    total, passed, taken = int(n_bytes.sum()), 0, 0
    if wanted is None or wanted >= total:
        return list(range(len(n_bytes)))
    chosen = []
    for number, size in enumerate(n_bytes.tolist()):
        if taken * total <= wanted * passed and taken + size <= wanted:
            chosen.append(number)
            taken += size
        passed += size
    return chosen or [int(n_bytes.argmin())]


@dataclass(frozen=True)
class Selection:
    """Documents of a shard that are validated on.

    - numbers: which of the shard's; bytes: of their text; tokens: theirs and an EOS after each, (len(numbers),).
    - starts: where each begins in the shard, tokens from its first chunk's first on, (len(numbers),).
    """

    numbers: list[int]
    bytes: int
    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, documents: npt.NDArray[np.int64], max_bytes: int | None, max_tokens: int | None) -> "Selection":
        """Choose by `choose` documents of `max_bytes` and `max_tokens` at most, but at least one.

        `documents` has the bytes and the tokens of each, (documents, 2), see `Manifest.load_documents`.
        """
        n_bytes, n_tokens = documents.T
        if max_tokens is not None:
            as_bytes = int(n_bytes.sum()) * max_tokens // int(n_tokens.sum())
            max_bytes = as_bytes if max_bytes is None else min(max_bytes, as_bytes)
        numbers = choose(n_bytes, max_bytes)
        if max_tokens is not None:
            fitting = int(np.searchsorted(n_tokens[numbers].cumsum(), max_tokens, side="right"))
            numbers = numbers[: max(1, fitting)]
        starts = n_tokens.cumsum() - n_tokens
        return cls(numbers, int(n_bytes[numbers].sum()), n_tokens[numbers], starts[numbers])

    def blocks(self, context_length: int) -> int:
        """Count the blocks in which each of the tokens is a target once."""
        return -(-int(self.tokens.sum()) // context_length)


class DocumentReader(ShardReader):
    """Read selected documents of a shard as if they were one text: blocks of T+1 tokens, each T after the one before.

    Before the first document there is an EOS, so that each token of each document, its EOS included, is a target in one
    block. Negative numbers are not predicted (`core.module.inputs_and_targets`): the rest of the last block.
    """

    def __init__(
        self,
        file: Callable[[int], Path],
        shard: Shard,
        context_length: int,
        dtype: str,
        *,
        selection: Selection,
        eos_id: int,
    ):
        super().__init__(file, shard, context_length, dtype)
        self._chunk_ends: list[int] = np.cumsum([chunk.tokens for chunk in shard.chunks]).tolist()
        self._starts: list[int] = selection.starts.tolist()
        self._document_ends: list[int] = selection.tokens.cumsum().tolist()  # in the row of the selected
        self._blocks, self._eos_id = selection.blocks(context_length), eos_id

    def __len__(self) -> int:
        return self._blocks

    def chunk_of(self, block: int) -> int:
        """Number the chunk that holds the first target of a block."""
        return self._find(block * self._context_length)[0]

    def view(self, block: int) -> Tokens:
        """Return block `block`, (context_length + 1,) int64."""
        found = np.full(self._context_length + 1, ~self._eos_id)
        before = block * self._context_length - 1  # in the row of the selected tokens; -1 is the EOS before the first
        place, end = max(before, 0), min(before + len(found), self._document_ends[-1])
        while place < end:
            chunk, start, n_left = self._find(place)
            n = min(n_left, end - place)
            tokens = self._open.get(chunk)
            if tokens is None:
                tokens = self._map(chunk)
            found[place - before : place - before + n] = tokens[start : start + n]
            place += n
        return found

    def _find(self, place: int) -> tuple[int, int, int]:
        """Say where a selected token lies: chunk, place in it, and how many tokens its document has from there on."""
        number = bisect.bisect_right(self._document_ends, place)
        n_left = self._document_ends[number] - place
        first = self._document_ends[number - 1] if number else 0
        in_shard = self._starts[number] + place - first
        chunk = bisect.bisect_right(self._chunk_ends, in_shard)
        return chunk, in_shard - (self._chunk_ends[chunk - 1] if chunk else 0), n_left
