"""Filters that compare documents: the same text again, and nearly the same. They compare on the disk."""

import hashlib
import re
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from thunderhead.core.types import Fraction, NonNegativeInt, PositiveInt
from thunderhead.corpus import common_keys
from thunderhead.corpus.curation import Filter

_SCHEME = "affine32"  # of datasketch ≥ 2: hash values are 4 bytes
_BLOCK = 1 << 16  # documents that are looked at together

Signatures = npt.NDArray[np.uint32]


@dataclass(eq=False, kw_only=True)
class ExactDuplicates(Filter):
    """Keep the first of the documents with one text: equal after Unicode NFC, in lower case, spaces run together."""

    normalize: bool = True  # false: equal byte by byte

    def inspect(self, text: str) -> bytes:
        if self.normalize:
            text = " ".join(unicodedata.normalize("NFC", text).lower().split())
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def decide(self, evidence: Iterator[bytes], folder: Path) -> Iterator[str | None]:
        with Table(evidence, "<u8", 2, folder) as digests:
            repeated = digests.column("repeated", np.bool_)
            for later, _, _ in common_keys.later(digests.blocks(), len(digests), digests.folder):
                repeated[later] = True
            yield from _told(repeated, "same text as an earlier document")


@dataclass(eq=False, kw_only=True)
class NearDuplicates(Filter):
    """Remove a document that shares most of its word n-grams with an earlier one: MinHash with banding.

    A document's signature is bands · rows minima of hashed n-grams. Each is compared with the first and the last one
    before it that agree with it in all rows of some band, and goes if the signatures' agreement, an estimate of the
    Jaccard similarity J, reaches the threshold, whether or not the earlier one stays (it may be a duplicate, too: the
    first of a family always stays). A pair of similarity J agrees in a band with probability 1 - (1 - J^rows)^bands;
    the estimate's standard error is sqrt(J (1 - J) / (bands · rows)), at most 0.047 for 14 · 8. The defaults are
    FineWeb's (2406.17557, section 3.4: 5-grams, 14 bands of 8), which takes any agreement in a band for a duplicate.

    Memory does not grow with the corpus. On the disk, a document takes 4 · bands · rows bytes twice for the time being.
    """

    threshold: Fraction = 0.75  # similarity from which a document is a duplicate
    ngram: PositiveInt = 5  # words in a shingle; a shorter text is one shingle
    bands: PositiveInt = 14
    rows: PositiveInt = 8
    seed: NonNegativeInt = 1  # of the hash functions

    def __post_init__(self) -> None:
        # Drawing the hash functions takes longer than hashing a short text.
        self._functions = MinHash(self.width, seed=self.seed, scheme=_SCHEME).permutations

    @property
    def width(self) -> int:
        """Numbers in a signature."""
        return self.bands * self.rows

    def inspect(self, text: str) -> Signatures:
        functions = self._functions
        signature = MinHash(self.width, seed=self.seed, permutations=functions, scheme=_SCHEME)
        signature.update_batch(shingle.encode() for shingle in shingles(text, self.ngram))
        return np.asarray(signature.hashvalues, dtype=np.uint32)

    def decide(self, evidence: Iterator[Signatures], folder: Path) -> Iterator[str | None]:
        enough = f"{self.threshold:g} or more" if self.threshold > 0 else f"a band of {self.rows} minima"
        reason = f"{enough} of its {self.ngram}-grams shared with an earlier document"
        with Table(evidence, "<u4", self.width, folder) as signatures:
            similar = signatures.column("similar", np.bool_)
            for later, _ in self.pairs(signatures):
                similar[later] = True
            yield from _told(similar, reason)

    def pairs(self, signatures: "Table") -> Iterator[tuple[common_keys.Numbers, common_keys.Numbers]]:
        """Yield documents that are near duplicates of earlier ones, and those, in no order; a pair may come again."""
        for band in range(self.bands):
            columns = slice(band * self.rows, (band + 1) * self.rows)
            keys = (_mixed(block[:, columns]) for block in signatures.blocks())
            for later, *earlier in common_keys.later(keys, len(signatures), signatures.folder):
                for others in earlier:
                    for some in _slices(len(later)):
                        same = signatures.agreement(later[some], others[some]) >= self.threshold
                        yield later[some][same], others[some][same]


class Table:
    """A row of numbers for each document, in a file that is deleted afterwards."""

    def __init__(self, rows: Iterator[Any], dtype: str, width: int, folder: Path):
        self._rows, self._dtype, self._width, self._place = rows, dtype, width, folder

    def __enter__(self) -> "Table":
        self.folder = self._place / "compared"
        shutil.rmtree(self.folder, ignore_errors=True)  # of a call that was killed
        self.folder.mkdir()
        with open(self.folder / "rows", "wb") as file:
            while some := list(islice(self._rows, _BLOCK)):
                file.write(b"".join(some))
        row = self._width * np.dtype(self._dtype).itemsize
        self._size = (self.folder / "rows").stat().st_size // row
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def __len__(self) -> int:
        return self._size

    def _all(self) -> npt.NDArray[Any]:
        if self._size == 0:  # which cannot be mapped
            return np.empty((0, self._width), self._dtype)
        return np.memmap(self.folder / "rows", self._dtype, "r", shape=(self._size, self._width))

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the rows of all documents, some at a time."""
        for block in _slices(self._size):
            yield np.array(self._all()[block])  # mapped anew: what was read before does not count as memory

    def agreement(self, some: common_keys.Numbers, others: common_keys.Numbers) -> npt.NDArray[np.float64]:
        """The share of equal numbers in the rows of documents."""
        rows = self._all()
        return np.asarray((rows[some] == rows[others]).mean(axis=1))

    def column(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A number for each document, 0 at first, in a file."""
        if self._size == 0:
            return np.empty(0, dtype)
        return np.memmap(self.folder / name, dtype, "w+", shape=(self._size,))


def _told(marks: npt.NDArray[np.bool_], reason: str) -> Iterator[str | None]:
    """The reason for each document that is marked, else None."""
    for block in _slices(len(marks)):
        yield from (reason if marked else None for marked in marks[block])


def _slices(n: int) -> Iterator[slice]:
    return (slice(begin, begin + _BLOCK) for begin in range(0, n, _BLOCK))


def _mixed(rows: Signatures) -> common_keys.Keys:
    """A hash of 64 bits, (documents, 1), of some numbers each."""
    mixed = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed[:, None]


def shingles(text: str, n: int) -> set[str]:
    """The n-grams of the words (runs of letters, digits and _, in lower case); all words together if they are fewer."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(len(words) - n, 0) + 1)}
