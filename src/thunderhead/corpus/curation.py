"""Which documents are worth training on: filters that say, for each document, why it goes, if it does.

A curation is a mapping of names to filters. They look at a document in the order of the mapping, and the first to give
a reason removes it: later filters never hear of it, so that no document is a duplicate of one that is not there.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from typing_extensions import override

from thunderhead.core.types import Fraction, NonNegativeInt, PositiveInt
from thunderhead.corpus.sources import Document

EXAMPLES = 5
EXCERPT = 300  # characters


class Filter(ABC):
    """One rule of a curation. Its work has two halves, so that the costly one can run in any process.

    Attributes of the settings say all that the decisions depend on: the shards' key is made from them.
    """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Say what decisions depend on, as plain values."""

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
    """A filter that judges each text by itself; subclasses are dataclasses, whose fields are the settings."""

    @override
    def settings(self) -> dict[str, Any]:
        return {"filter": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def judge(self, text: str) -> str | None:
        """Name the first rule that the text breaks, with its threshold; None: it breaks none."""

    @override
    def inspect(self, text: str) -> str | None:
        return self.judge(text)

    @override
    def keep(self, document_id: str, evidence: str | None) -> str | None:
        return evidence


@dataclass(frozen=True, kw_only=True)
class Length(Rules):
    """Documents neither too short to say anything nor too long to be one text.

    Args:
        min_bytes: at least so many bytes of UTF-8.
        max_bytes: at most so many; null: no limit.
    """

    min_bytes: NonNegativeInt
    max_bytes: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"max_bytes={self.max_bytes} is less than min_bytes={self.min_bytes}: nothing would stay")

    @override
    def judge(self, text: str) -> str | None:
        size = len(text.encode())
        if size < self.min_bytes:
            return f"fewer than {self.min_bytes:,} bytes"
        if self.max_bytes is not None and size > self.max_bytes:
            return f"more than {self.max_bytes:,} bytes"
        return None


@dataclass(frozen=True, kw_only=True)
class CharacterRatios(Rules):
    """What a text consists of: shares of its characters, spaces left out. A text of spaces only has no characters.

    Args:
        min_letters: share of letters, of any script (Unicode categories L and M), at least.
        max_digits: share of digits and other numbers (N) at most.
        max_symbols: share of punctuation and symbols (P, S) at most.
        max_unreadable: share of control characters, unassigned ones and U+FFFD at most: a wrong encoding.
    """

    min_letters: Fraction
    max_digits: Fraction
    max_symbols: Fraction
    max_unreadable: Fraction

    @override
    def judge(self, text: str) -> str | None:
        shares = _kinds(text)
        if not shares:
            return "no characters but spaces"
        if shares["letters"] < self.min_letters:
            return f"letters < {self.min_letters:g} of the characters"
        for kind, limit in (
            ("digits", self.max_digits),
            ("symbols", self.max_symbols),
            ("unreadable", self.max_unreadable),
        ):
            if shares[kind] > limit:
                return f"{kind} > {limit:g} of the characters"
        return None


def _kinds(text: str) -> Counter[str]:
    """Shares of the kinds of characters, spaces left out; empty if there are no others."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[_kind(character)] += count
    total = sum(counts.values()) - counts.pop("space", 0)
    return Counter({kind: count / total for kind, count in counts.items()})


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

    Args:
        script: beginning of the Unicode names of its letters: LATIN, CYRILLIC, GREEK, ARABIC, DEVANAGARI …
        min_script: share of the letters that must be of this script.
        common_words: in lower case.
        min_common_words: share of the words (runs of letters) that must be among `common_words`.
    """

    script: str
    min_script: Fraction
    common_words: Sequence[str]
    min_common_words: Fraction

    @override
    def judge(self, text: str) -> str | None:
        letters = {character: count for character, count in Counter(text).items() if character.isalpha()}
        written = sum(n for character, n in letters.items() if _name(character).startswith(self.script))
        if not letters or written / sum(letters.values()) < self.min_script:
            return f"letters of {self.script} < {self.min_script:g} of the letters"
        words = letter_words(text)
        common = frozenset(self.common_words)
        if sum(word in common for word in words) / len(words) < self.min_common_words:
            return f"common words < {self.min_common_words:g} of the words"
        return None


@lru_cache(maxsize=1 << 16)
def _name(character: str) -> str:
    return unicodedata.name(character, "")


def letter_words(text: str) -> list[str]:
    """Runs of letters, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


# --------------------------------------------------------------------------------------------------------------------
# Filtering, and the record of it


class Removals:
    """What a curation removed: counts by source and reason, and the first examples of each. `to_dict` is curation.json.

    {"sources": {name: {"documents": n, "kept": n, "removed": {"<filter>: <reason>":
        {"documents": n, "bytes": n, "examples": [{"id": …, "excerpt": first 300 characters}, up to 5]}}}}}
    """

    def __init__(self, sources: Iterable[str]):
        self._sources: dict[str, dict[str, Any]] = {s: {"documents": 0, "kept": 0, "removed": {}} for s in sources}

    def add(self, source: str, document: Document, reason: str | None) -> None:
        """Note one document: removed for a reason, as `first_reason` gives it, or kept."""
        counts = self._sources[source]
        counts["documents"] += 1
        if reason is None:
            counts["kept"] += 1
            return
        removed = counts["removed"].setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        removed["documents"] += 1
        removed["bytes"] += len(document.text.encode())
        if len(removed["examples"]) < EXAMPLES:
            removed["examples"].append({"id": document.id, "excerpt": document.text[:EXCERPT]})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as in curation.json."""
        return {"sources": self._sources}


def first_reason(filters: Mapping[str, Filter], document_id: str, evidence: Mapping[str, Any]) -> str | None:
    """Ask the filters in their order: "<filter>: <reason>" of the first that removes the document; None: all keep it.

    Args:
        filters: by name.
        document_id: as the source says.
        evidence: what each filter's `inspect` found, by the same names.
    """
    for name, rule in filters.items():
        if (reason := rule.keep(document_id, evidence[name])) is not None:
            return f"{name}: {reason}"
    return None
