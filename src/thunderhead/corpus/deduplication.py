"""Filters that compare documents: the same text again, and nearly the same."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from thunderhead.core.types import Fraction, NonNegativeInt, PositiveInt
from thunderhead.corpus.curation import Filter

_SCHEME = "affine32"  # of datasketch ≥ 2: hash values are 4 bytes


@dataclass(eq=False, kw_only=True)
class ExactDuplicates(Filter):
    """Keep the first of the documents with one text: equal after Unicode NFC, in lower case, spaces run together."""

    normalize: bool = True  # false: equal byte by byte. Memory: about 115 bytes a document, of a set of digests

    def __post_init__(self) -> None:
        self._seen: set[bytes] = set()

    def inspect(self, text: str) -> bytes:
        if self.normalize:
            text = " ".join(unicodedata.normalize("NFC", text).lower().split())
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def keep(self, document_id: str, evidence: bytes) -> str | None:
        if evidence in self._seen:
            return "same text as an earlier document"
        self._seen.add(evidence)
        return None

    def reset(self) -> None:
        self._seen.clear()


@dataclass(eq=False, kw_only=True)
class NearDuplicates(Filter):
    """Remove a document that shares most of its word n-grams with an earlier one: MinHash with banding.

    A document's signature is bands · rows minima of hashed n-grams; documents that agree in all rows of some band are
    compared, and the later goes if the signatures' agreement, an estimate of the Jaccard similarity J, reaches the
    threshold. A pair of similarity J is compared with probability 1 - (1 - J^rows)^bands; the estimate's standard error
    is sqrt(J (1 - J) / (bands · rows)), at most 0.047 for 14 · 8. The defaults are FineWeb's (2406.17557, section 3.4:
    5-grams, 14 bands of 8), which takes any agreement in a band for a duplicate.

    Memory: grows with the documents kept, at about 4 KB each with 14 bands of 8 (a million: 4 GB), most of it in
    datasketch's index. The signature that travels between processes is 4 · bands · rows bytes.
    """

    threshold: Fraction = 0.75  # similarity from which a document is a duplicate
    ngram: PositiveInt = 5  # words in a shingle; a shorter text is one shingle
    bands: PositiveInt = 14
    rows: PositiveInt = 8
    seed: NonNegativeInt = 1  # of the hash functions

    def __post_init__(self) -> None:
        # Drawing the hash functions takes longer than hashing a short text.
        self._functions = MinHash(self.bands * self.rows, seed=self.seed, scheme=_SCHEME).permutations
        self.reset()

    def inspect(self, text: str) -> npt.NDArray[np.uint32]:
        signature = self._minhash()
        signature.update_batch(shingle.encode() for shingle in shingles(text, self.ngram))
        return np.asarray(signature.hashvalues, dtype=np.uint32)

    def keep(self, document_id: str, evidence: npt.NDArray[np.uint32]) -> str | None:
        signature = self._minhash(evidence)
        for earlier in self._index.query(signature):
            if np.mean(self._signatures[earlier] == evidence) >= self.threshold:
                return f"{self.threshold:g} or more of its {self.ngram}-grams shared with an earlier document"
        self._index.insert(len(self._signatures), signature, check_duplication=False)
        self._signatures.append(evidence)
        return None

    def reset(self) -> None:
        # Bands of 4 · rows bytes would be the keys of the index: 8 bytes of hash do, as candidates are compared anyway.
        self._index = MinHashLSH(num_perm=self.bands * self.rows, params=(self.bands, self.rows), hashfunc=_band_key)
        self._signatures: list[npt.NDArray[np.uint32]] = []

    def _minhash(self, values: npt.NDArray[np.uint32] | None = None) -> MinHash:
        size, functions = self.bands * self.rows, self._functions
        return MinHash(size, seed=self.seed, hashvalues=values, permutations=functions, scheme=_SCHEME)


def _band_key(band: bytes) -> bytes:
    return hashlib.blake2b(band, digest_size=8).digest()


def shingles(text: str, n: int) -> set[str]:
    """The n-grams of the words (runs of letters, digits and _, in lower case); all words together if they are fewer."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(len(words) - n, 0) + 1)}
