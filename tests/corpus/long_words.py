"""A filter in a module that is quickly imported, by the processes that inspect."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thunderhead.corpus.curation import Filter


class LongWords(Filter):
    """Removes documents with a word of more than so many characters, and counts those that it was asked about."""

    def __init__(self, longest: int):
        self.longest, self.asked = longest, 0

    def settings(self) -> dict[str, Any]:
        return {"longest": self.longest}

    def inspect(self, text: str) -> int:
        return max(map(len, text.split()))

    def decide(self, evidence: Iterator[int], folder: Path) -> Iterator[str | None]:
        self.asked = 0
        for found in evidence:
            self.asked += 1
            yield f"words > {self.longest}" if found > self.longest else None
