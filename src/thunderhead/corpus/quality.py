"""Published rules of quality: Gopher's and C4's, each threshold an argument.

The rules were made for English web pages. Source code breaks many of them: look at the report before training.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thunderhead.core.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from thunderhead.corpus.curation import Rules, letter_words


@dataclass(frozen=True, kw_only=True)
class GopherQuality(Rules):
    """Gopher's quality rules (Rae et al. 2112.11446, appendix A.1.1). Words are what stands between spaces."""

    min_words: NonNegativeInt
    max_words: PositiveInt
    min_mean_word_length: NonNegativeFloat  # characters
    max_mean_word_length: NonNegativeFloat
    max_symbols_per_word: NonNegativeFloat  # number of #, and of ellipses (... or …), each by the number of words
    max_bullet_lines: Fraction  # that begin with one of `bullets`
    max_ellipsis_lines: Fraction  # that end with an ellipsis
    min_alphabetic_words: Fraction  # with at least one letter
    required_words: Sequence[str]
    min_required_words: NonNegativeInt  # so many different ones of them must occur
    bullets: Sequence[str]  # what a bullet point looks like; the paper does not say

    def __post_init__(self) -> None:
        if self.min_required_words > (known := len(set(self.required_words))):
            raise ValueError(f"min_required_words={self.min_required_words} is more than required_words has: {known}")

    def judge(self, text: str) -> str | None:
        words = text.split()
        if len(words) < self.min_words or not words:
            return f"fewer than {max(self.min_words, 1):,} words"
        if len(words) > self.max_words:
            return f"more than {self.max_words:,} words"
        mean_length = sum(map(len, words)) / len(words)
        if mean_length < self.min_mean_word_length:
            return f"mean word length < {self.min_mean_word_length:g}"
        if mean_length > self.max_mean_word_length:
            return f"mean word length > {self.max_mean_word_length:g}"
        for symbol, count in (("#", text.count("#")), ("ellipses", text.count("...") + text.count("…"))):
            if count / len(words) > self.max_symbols_per_word:
                return f"{symbol} > {self.max_symbols_per_word:g} a word"
        lines = _pieces(text.split("\n"))
        if _share(line.startswith(tuple(self.bullets)) for line in lines) > self.max_bullet_lines:
            return f"bullet points > {self.max_bullet_lines:g} of the lines"
        if _share(line.endswith(("...", "…")) for line in lines) > self.max_ellipsis_lines:
            return f"ellipses end > {self.max_ellipsis_lines:g} of the lines"
        if _share(any(map(str.isalpha, word)) for word in words) < self.min_alphabetic_words:
            return f"words with a letter < {self.min_alphabetic_words:g} of the words"
        if len(set(self.required_words).intersection(letter_words(text))) < self.min_required_words:
            return f"fewer than {self.min_required_words} of the words {', '.join(self.required_words)}"
        return None


@dataclass(frozen=True, kw_only=True)
class GopherRepetition(Rules):
    """Gopher's repetition rules (Rae et al. 2112.11446, table A1): too much of the document is said twice.

    Lines and paragraphs (divided by empty lines) are compared without the spaces around them, empty ones left out. One
    that occurred before is a duplicate; character fractions are of the characters of all lines, paragraphs or words.
    Words are what stands between spaces; each is counted once, in however many n-grams it is.
    """

    max_duplicate_lines: Fraction
    max_duplicate_paragraphs: Fraction
    max_duplicate_line_characters: Fraction
    max_duplicate_paragraph_characters: Fraction
    max_top_ngrams: Mapping[PositiveInt, Fraction]  # by n: in the most frequent n-gram, if it occurs twice
    max_duplicate_ngrams: Mapping[PositiveInt, Fraction]  # by n: in n-grams that occurred before

    def judge(self, text: str) -> str | None:
        for unit, pieces in (("line", text.split("\n")), ("paragraph", re.split(r"\n\s*\n", text))):
            share, share_of_characters = duplicates(_pieces(pieces))
            if share > (limit := getattr(self, f"max_duplicate_{unit}s")):
                return f"duplicates > {limit:g} of the {unit}s"
            if share_of_characters > (limit := getattr(self, f"max_duplicate_{unit}_characters")):
                return f"duplicate {unit}s > {limit:g} of the characters"
        lengths, ngrams = _ngrams(text.split(), {*self.max_top_ngrams, *self.max_duplicate_ngrams})
        for n, limit in self.max_top_ngrams.items():
            if n in ngrams and top_share(lengths, ngrams[n], n) > limit:
                return f"the top {n}-gram > {limit:g} of the characters"
        for n, limit in self.max_duplicate_ngrams.items():
            if n in ngrams and duplicate_share(lengths, ngrams[n], n) > limit:
                return f"duplicate {n}-grams > {limit:g} of the characters"
        return None


@dataclass(frozen=True, kw_only=True)
class C4(Rules):
    """C4's rules for pages (Raffel et al. 1910.10683, section 2.2).

    C4's rules for lines decide how many sentences a page has, as in C4, but do not change its text: a filter keeps or
    removes documents. Left out: removing those lines, and all but one of any three sentences that occur again; the list
    of bad words (`forbidden` takes any); and langdetect's English at 0.99 (see `curation.Language`).
    """

    min_sentences: NonNegativeInt  # of a page, in lines that the next three arguments let stay
    min_words_per_line: NonNegativeInt
    line_ends: Sequence[str]  # a line must end with one of these
    line_forbidden: Sequence[str]  # lines with one of these go, in any case
    forbidden: Sequence[str]  # so do pages with one of these

    def judge(self, text: str) -> str | None:
        lower = text.lower()
        for phrase in self.forbidden:
            if phrase.lower() in lower:
                return f"contains {phrase!r}"
        lines = filter(self._stays, _pieces(text.split("\n")))
        if sum(map(sentences, lines)) < self.min_sentences:
            return f"fewer than {self.min_sentences} sentences in proper lines"
        return None

    def _stays(self, line: str) -> bool:
        return (
            line.endswith(tuple(self.line_ends))
            and len(line.split()) >= self.min_words_per_line
            and not any(phrase.lower() in line.lower() for phrase in self.line_forbidden)
        )


def sentences(line: str) -> int:
    """Count the sentences of a line: at least one, as many as end within: . ! ? with closing marks before a space."""
    return max(len(re.findall(r"[.!?]+[\"'”’»)\]]*(?=\s|$)", line)), 1)


def _pieces(parts: Iterable[str]) -> list[str]:
    return [piece for part in parts if (piece := part.strip())]


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def duplicates(pieces: Sequence[str]) -> tuple[float, float]:
    """Share of the pieces that occurred before, and their share of all characters; 0 and 0 of no pieces."""
    counts = Counter(pieces)
    characters = sum((count - 1) * len(piece) for piece, count in counts.items())
    return (len(pieces) - len(counts)) / max(len(pieces), 1), characters / max(sum(map(len, pieces)), 1)


def _ngrams(words: Sequence[str], sizes: set[int]) -> tuple[npt.NDArray[np.int64], dict[int, npt.NDArray[np.int64]]]:
    """Lengths of the words, and by n which n-gram begins at each word: (words - n + 1,) numbers, equal for equal ones.

    An n-gram is numbered by its first n-1 words and its last: exact, where hashes could collide.
    """
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(word, len(known)) for word in words], dtype=np.int64)
    found, grams = {}, ids
    for n in range(1, min(max(sizes, default=0), len(words)) + 1):
        if n > 1:
            _, grams = np.unique(grams[:-1] * len(known) + ids[n - 1 :], return_inverse=True)
        if n in sizes:
            found[n] = grams
    return np.array([len(word) for word in words], dtype=np.int64), found


def top_share(lengths: npt.NDArray[np.int64], grams: npt.NDArray[np.int64], n: int) -> float:
    """Share of the words' characters that lie in the most frequent n-gram; of equally frequent ones, in the longest."""
    counts = np.bincount(grams)
    most = counts.max()
    if most < 2:
        return 0.0
    starts = np.flatnonzero(counts[grams] == most)
    characters = np.concatenate(([0], np.cumsum(lengths)))
    longest = grams[starts[np.argmax(characters[starts + n] - characters[starts])]]
    return _covered(lengths, np.flatnonzero(grams == longest), n)


def duplicate_share(lengths: npt.NDArray[np.int64], grams: npt.NDArray[np.int64], n: int) -> float:
    """Share of the words' characters that lie in n-grams which occurred before."""
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), dtype=bool)
    again[first] = False
    return _covered(lengths, np.flatnonzero(again), n)


def _covered(lengths: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], n: int) -> float:
    """Share of the characters in words that lie in an n-gram which begins at one of `starts`."""
    covered = np.zeros(len(lengths), dtype=bool)
    for offset in range(n):
        covered[starts + offset] = True
    return float(lengths[covered].sum() / lengths.sum())
