"""Which documents are worth training on: filters that say, for each document, why it goes, if it does.

A curation is a mapping of names to filters. They look at a document in the order of the mapping, and the first to give
a reason removes it: later filters never hear of it, so that no document is a duplicate of one that is not there.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

from thunderhead.core.types import Fraction, NonNegativeInt, PositiveInt
from thunderhead.corpus.sources import Document


class Filter(ABC):
    """One rule of a curation. Its work has two halves, so that the costly one can run in any process."""

    def settings(self) -> dict[str, Any]:
        """Say as plain values what decisions depend on, for the shards' key: here all arguments, by their names."""
        names = signature(type(self)).parameters
        return {"filter": type(self).__name__, **{name: getattr(self, name) for name in names}}

    @abstractmethod
    def inspect(self, text: str) -> Any:
        """Look at one text by itself, in whatever process: what `keep` needs to know (picklable and small)."""

    @abstractmethod
    def keep(self, document_id: str, evidence: Any) -> str | None:
        """Decide, in the order of the documents and in one process: None to keep it, or the reason why it goes.

        Reasons are few: they name a rule and its threshold, not what was found in the document.
        """

    def reset(self) -> None:  # noqa: B027 - most have nothing to forget
        """Forget all documents (before a new pass, and for filters that compare documents only)."""


class Rules(Filter):
    """A filter that judges each text by itself."""

    @abstractmethod
    def judge(self, text: str) -> str | None:
        """Name the first rule that the text breaks, with its threshold; None: it breaks none."""

    def inspect(self, text: str) -> str | None:
        return self.judge(text)

    def keep(self, document_id: str, evidence: str | None) -> str | None:
        return evidence


@dataclass(frozen=True, kw_only=True)
class Length(Rules):
    """Documents neither too short to say anything nor too long to be one text; in bytes of UTF-8."""

    min_bytes: NonNegativeInt
    max_bytes: PositiveInt | None = None  # no limit

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes={self.max_bytes} is less than min_bytes={self.min_bytes}: nothing would stay")

    def judge(self, text: str) -> str | None:
        size = len(text.encode())
        if size < self.min_bytes:
            return f"fewer than {self.min_bytes:,} bytes"
        if self.max_bytes is not None and size > self.max_bytes:
            return f"more than {self.max_bytes:,} bytes"
        return None


@dataclass(frozen=True, kw_only=True)
class CharacterRatios(Rules):
    """What a text consists of: shares of its characters, spaces left out. A text of spaces only has no characters."""

    min_letters: Fraction  # of any script (Unicode categories L and M)
    max_digits: Fraction  # and other numbers (N)
    max_symbols: Fraction  # punctuation and symbols (P, S)
    max_unreadable: Fraction  # control characters, unassigned ones and U+FFFD: a wrong encoding

    def judge(self, text: str) -> str | None:
        shares = _kinds(text)
        if not shares:
            return "no characters but spaces"
        if shares["letters"] < self.min_letters:
            return f"letters < {self.min_letters:g} of the characters"
        for kind in ("digits", "symbols", "unreadable"):
            if shares[kind] > (limit := getattr(self, f"max_{kind}")):
                return f"{kind} > {limit:g} of the characters"
        return None


def _kinds(text: str) -> Counter[str]:
    """Shares of the kinds of characters, spaces left out; empty if there are no others."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[_kind(character)] += count
    del counts["space"]
    return Counter({kind: count / counts.total() for kind, count in counts.items()})


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    if character == "\ufffd":
        return "unreadable"
    major = unicodedata.category(character)[0]
    return {"L": "letters", "M": "letters", "N": "digits", "P": "symbols", "S": "symbols"}.get(major, "unreadable")


@dataclass(frozen=True, kw_only=True)
class Language(Rules):
    """Language by two simple ratios: the script of its letters, and how many of its words are the language's commonest.

    No model and no download, and no probability either: short texts and code have few such words.
    """

    script: str  # beginning of the Unicode names of its letters: LATIN, CYRILLIC, GREEK, ARABIC, DEVANAGARI …
    min_script: Fraction  # of the letters
    common_words: Sequence[str]  # in lower case
    min_common_words: Fraction  # of the words (runs of letters)

    def judge(self, text: str) -> str | None:
        letters = {character: count for character, count in Counter(text).items() if character.isalpha()}
        written = sum(n for character, n in letters.items() if unicodedata.name(character, "").startswith(self.script))
        if not letters or written / sum(letters.values()) < self.min_script:
            return f"letters of {self.script} < {self.min_script:g} of the letters"
        words = letter_words(text)
        common = frozenset(self.common_words)
        if sum(word in common for word in words) / len(words) < self.min_common_words:
            return f"common words < {self.min_common_words:g} of the words"
        return None


def letter_words(text: str) -> list[str]:
    """Runs of letters, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


class Curation:
    """Filters at work on documents in their order; `record` says what they removed, as curation.json does.

    {"sources": {name: {"documents": n, "kept": n, "removed": {"<filter>: <reason>":
        {"documents": n, "bytes": n, "examples": [{"id": …, "excerpt": first 300 characters}, up to 5]}}}}}
    """

    def __init__(self, filters: Mapping[str, Filter], sources: Iterable[str]):
        self._filters = filters
        self.record: dict[str, Any] = {"sources": {s: {"documents": 0, "kept": 0, "removed": {}} for s in sources}}
        for rule in filters.values():
            rule.reset()

    def keep(self, source: str, document: Document, evidence: Mapping[str, Any]) -> bool:
        """Decide about the next document, of which each filter's `inspect` found this evidence, and note it."""
        counts = self.record["sources"][source]
        counts["documents"] += 1
        for name, rule in self._filters.items():
            if (reason := rule.keep(document.id, evidence[name])) is not None:
                nothing: dict[str, Any] = {"documents": 0, "bytes": 0, "examples": []}
                removed = counts["removed"].setdefault(f"{name}: {reason}", nothing)
                removed["documents"] += 1
                removed["bytes"] += len(document.text.encode())
                if len(removed["examples"]) < 5:
                    removed["examples"].append({"id": document.id, "excerpt": document.text[:300]})
                return False
        counts["kept"] += 1
        return True
