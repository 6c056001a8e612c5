"""Validation text that training has, too: near duplicates that fell on both sides of the split.

Of each document, windows of WINDOW bytes are compared, at places that the bytes themselves choose, so that text which
is the same but for an insertion is seen as such (as content-defined chunks; the windows are GPT-3's n-grams, 2005.14165
appendix C, in bytes).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WINDOW = 64  # bytes: about 12 words
FEWEST = 4  # windows of a document to judge it by; on average there is one in 64 bytes
MOST = 1 << 20
_FACTORS = np.random.default_rng(0).integers(1, 2**63, WINDOW // 8, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class Windows(NamedTuple):
    """Hashes of windows, (n,), and which document of the batch each is of."""

    hashes: npt.NDArray[np.uint64]
    document: npt.NDArray[np.int32]


def windows(texts: Sequence[str]) -> Windows:
    """Choose and hash the windows of texts."""
    encoded = [text.encode() for text in texts]
    raw = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    if len(raw) < WINDOW:
        return Windows(np.empty(0, np.uint64), np.empty(0, np.int32))
    ends = np.cumsum([len(text) for text in encoded])
    chosen = (raw[:-2] * np.uint8(167)) ^ (raw[1:-1] * np.uint8(91)) ^ (raw[2:] * np.uint8(45))
    starts = np.flatnonzero(chosen[: len(raw) - WINDOW + 1] & 63 == 0)
    document = np.searchsorted(ends, starts, side="right")
    inside = starts + WINDOW <= ends[document]
    content = np.lib.stride_tricks.sliding_window_view(raw, WINDOW)[starts[inside]]
    words = np.ascontiguousarray(content).view(np.uint64)
    mixed = (words ^ (words >> np.uint64(29))) * _FACTORS
    hashes = (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    return Windows(hashes, document[inside].astype(np.int32))


class Overlap:
    """Collect the windows of validation first, then those of training; `near_duplicates` counts what is in both.

    So that memory does not grow with the corpus, only the first documents are judged, until they have MOST windows.
    """

    def __init__(self) -> None:
        self._hashes: list[npt.NDArray[np.uint64]] = []
        self._documents: list[npt.NDArray[np.int64]] = []
        self.judged = self._n_windows = 0

    def add_validation(self, found: Windows, held_out: Sequence[bool]) -> None:
        """Keep the windows of the documents of a batch that are held out."""
        if self._n_windows >= MOST:
            return
        numbers, keep = self.judged + np.cumsum(held_out) - 1, np.array(held_out, dtype=bool)[found.document]
        self._hashes.append(found.hashes[keep])
        self._documents.append(numbers[found.document[keep]])
        self._n_windows += int(keep.sum())
        self.judged += sum(held_out)

    def near_duplicates(self, training: Iterable[tuple[Windows, Sequence[bool]]]) -> int:
        """Count the judged documents of which at least half of the windows are in training documents, too."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        document = np.concatenate([np.empty(0, np.int64), *self._documents])
        known, inverse = np.unique(hashes, return_inverse=True)
        seen = np.zeros(len(known), dtype=bool)
        for found, held_out in training:
            ours = found.hashes[~np.array(held_out, dtype=bool)[found.document]]
            if len(known):
                place = np.minimum(np.searchsorted(known, ours), len(known) - 1)
                seen[place[known[place] == ours]] = True
        n_windows = np.bincount(document, minlength=self.judged)
        n_seen = np.bincount(document, weights=seen[inverse].astype(float), minlength=self.judged)
        return int(((n_windows >= FEWEST) & (n_seen >= n_windows / 2)).sum())
