"""Which documents are held out for validation."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thunderhead.corpus.sources import Document, Source

_BY_HASH = "a document is for validation if the first 8 bytes of its text's sha256, over 2**64, are < fraction"
_WHOLE = "; of a text that is cut, the first piece decides for all, where the source keeps it whole"
RULES = {"hash": _BY_HASH + _WHOLE, "tail": "validation is the last fraction of the characters of each source's text"}
_TOGETHER = "; near duplicates, as curation=deduplication finds them, are on the side of the first of them"
_BY_NAME = "files whose name matches are for validation"


def is_validation(text: str, fraction: float) -> bool:
    """Say on which side of the split a document falls: by its text alone, so equal documents never end up on both."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


@dataclass(frozen=True)
class Split:
    """How documents are divided between training and validation.

    `rule` is hash (`fraction` of the documents, by their text), tail (the last `fraction` of the characters of each
    source, a document across the border being cut there), or a pattern of names of files, as PurePath.match reads it;
    of a dataset, the name of one of its splits.
    """

    rule: str
    fraction: float
    together: bool = False  # near duplicates: all on the side of the first of them; for hash

    def __str__(self) -> str:
        return (RULES.get(self.rule) or f"{_BY_NAME}: {self.rule}") + (_TOGETHER if self.together else "")

    def settings(self) -> list[Any]:
        """Return what shards depend on."""
        return [str(self), self.fraction if self.rule in RULES else None]

    def trained_on(self, characters: int) -> int:
        """How many of the first characters of a source the tail leaves for training."""
        return int(characters * (1 - self.fraction))

    def divide(
        self, documents: Iterable["Document"], source: "Source", trained_on: int | None = None
    ) -> Iterator[tuple["Document", bool]]:
        """Yield each document, and whether it is held out; tail needs the characters that are `trained_on`."""
        match self.rule:
            case "hash":
                whole, first = "", ""
                for document in documents:
                    if not source.keeps_whole or document.id.rpartition("#")[0] != whole:
                        whole, first = document.id.rpartition("#")[0], document.text
                    yield document, is_validation(first, self.fraction)
            case "tail":
                assert trained_on is not None
                left = trained_on
                for document in documents:
                    for piece, held_out in ((document.text[:left], False), (document.text[left:], True)):
                        if piece:
                            yield document._replace(text=piece), held_out
                    left = max(0, left - len(document.text))
            case pattern:
                for document in documents:
                    yield document, PurePosixPath(file_of(document.id)).match(pattern)

    def remedy(self, name: str, source: Any, *, lacks_validation: bool) -> str:
        """Say what to change where a split of a source is empty."""
        if self.rule not in RULES:
            return f"data.validation={self.rule} must match some of its files, and not all"
        change = f"{'raise' if lacks_validation else 'lower'} data.validation_fraction={self.fraction}"
        if self.rule == "tail":
            return change
        change = f"set data.validation=tail, which divides a document if need be, or {change}"
        if source.keeps_whole and hasattr(source, "split_by"):
            change += f", or set data.sources.{name}.split_by=piece"
        elif hasattr(source, "max_document_bytes"):
            change += f", or set data.sources.{name}.max_document_bytes (now {source.max_document_bytes}) lower"
        return change


def file_of(document_id: str) -> str:
    """The name of the file that a document is from: what comes before :record and #piece."""
    return re.sub(r"(:\d+)?(#\d+)?$", "", document_id)
