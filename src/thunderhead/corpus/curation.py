"""Which documents are worth training on: filters that say, for each document, why it goes, if it does.

A curation is a mapping of names to filters. They look at a document in the order of the mapping, and the first to give
a reason removes it: later filters never hear of it, so that no document is a duplicate of one that is not there.
"""

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thunderhead.core.types import Fraction, NonNegativeInt, PositiveInt
from thunderhead.corpus.batch_processing import Record

_EXCERPT = 300  # characters
_EXAMPLES = 5  # of each reason


class Filter(ABC):
    """One rule of a curation. Its work has two halves, so that the costly one can run in any process."""

    def settings(self) -> dict[str, Any]:
        """Say as plain values what decisions depend on, for the shards' key: here all arguments, by their names."""
        names = signature(type(self)).parameters
        return {"filter": type(self).__name__, **{name: getattr(self, name) for name in names}}

    @abstractmethod
    def inspect(self, text: str) -> Any:
        """Look at one text by itself, in whatever process: what `decide` needs to know (picklable and small)."""

    @abstractmethod
    def decide(self, evidence: Iterator[Any], folder: Path) -> Iterator[str | None]:
        """Yield for each document, in their order and in one process, None to keep it, or the reason why it goes.

        `evidence` is what `inspect` found in each. `folder` is a place for what does not fit into memory, deleted
        afterwards. Reasons are few: they name a rule and its threshold, not what was found in the document.
        """


class Rules(Filter):
    """A filter that judges each text by itself."""

    @abstractmethod
    def judge(self, text: str) -> str | None:
        """Name the first rule that the text breaks, with its threshold; None: it breaks none."""

    def inspect(self, text: str) -> str | None:
        return self.judge(text)

    def decide(self, evidence: Iterator[str | None], folder: Path) -> Iterator[str | None]:
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


class Inspected(NamedTuple):
    """What filters found in the texts of a batch."""

    n_bytes: list[int]  # of UTF-8
    excerpts: list[str]  # their first characters
    evidence: list[dict[str, Any]]  # by the filter's name, up to the first rule that a text breaks


class Inspect:
    """Show texts to filters."""

    def __init__(self, filters: Mapping[str, Filter]):
        self._filters = dict(filters)

    def __call__(self, texts: list[str]) -> Inspected:
        sizes, excerpts = [len(text.encode()) for text in texts], [text[:_EXCERPT] for text in texts]
        return Inspected(sizes, excerpts, [self._look(text) for text in texts])

    def _look(self, text: str) -> dict[str, Any]:
        evidence: dict[str, Any] = {}
        for name, rule in self._filters.items():
            try:
                evidence[name] = rule.inspect(text)
            except ValueError as error:  # a bug, and no refusal of a setting
                raise RuntimeError(f"curation.filters.{name} fails at the text {text[:60]!r} …") from error
            if isinstance(rule, Rules) and evidence[name] is not None:
                break  # it goes, whatever others find
        return evidence


def curate(
    filters: Mapping[str, Filter],
    sources: Iterable[str],
    inspected: Callable[[], Iterator[Record]],
    kept: Path,
    folder: Path,
) -> dict[str, Any]:
    """Decide about all documents, of which `inspected` gives what `Inspect` found: a byte each in `kept`, 1 to keep it.

    Each filter sees what those before it kept; memory does not grow with their number. Returns the report of what was
    removed, as curation.json has it:

    {"sources": {name: {"documents": n, "kept": n, "removed": {"<filter>: <reason>":
        {"documents": n, "bytes": n, "examples": [{"id": …, "excerpt": first 300 characters}, up to 5]}}}}}
    """
    counts: dict[str, dict[str, Any]] = {source: {"documents": 0, "kept": 0, "removed": {}} for source in sources}
    with open(kept, "wb") as decisions:
        for record in inspected():
            decisions.write(b"\1" * len(record.ids))
            counts[record.source]["documents"] += len(record.ids)
            counts[record.source]["kept"] += len(record.ids)
    if kept.stat().st_size == 0:
        return {"sources": counts}
    stays = np.memmap(kept, np.uint8, "r+")

    def documents() -> Iterator[tuple[int, Record, int]]:
        """Yield those that are there still: number, record and the place in it."""
        number = 0
        for record in inspected():
            for place in range(len(record.ids)):
                if stays[number + place]:
                    yield number + place, record, place
            number += len(record.ids)

    for name, rule in filters.items():
        evidence = (record.result.evidence[place][name] for _, record, place in documents())
        for document, reason in zip_longest(documents(), rule.decide(evidence, folder), fillvalue=...):
            if document is ... or reason is ...:
                raise ValueError(f"curation.filters.{name}: decide must yield an answer for each document, and no more")
            if reason is None:
                continue
            number, record, place = document
            stays[number] = 0
            of_source = counts[record.source]
            of_source["kept"] -= 1
            nothing: dict[str, Any] = {"documents": 0, "bytes": 0, "examples": []}
            removed = of_source["removed"].setdefault(f"{name}: {reason}", nothing)
            removed["documents"] += 1
            removed["bytes"] += record.result.n_bytes[place]
            if len(removed["examples"]) < _EXAMPLES:
                excerpt = record.result.excerpts[place]
                removed["examples"].append({"id": record.ids[place], "excerpt": excerpt})
    stays.flush()
    return {"sources": counts}
