"""A filter in a module that is quickly imported, by the processes that inspect."""

from typing import Any

from thunderhead.corpus.curation import Filter


class LongWords(Filter):
    """Removes documents with a word of more than so many characters, and remembers which it was asked about."""

    def __init__(self, longest: int):
        self.longest, self.asked = longest, []

    def settings(self) -> dict[str, Any]:
        return {"longest": self.longest}

    def inspect(self, text: str) -> int:
        return max(map(len, text.split()))

    def keep(self, document_id: str, evidence: int) -> str | None:
        self.asked.append(document_id)
        return f"words > {self.longest}" if evidence > self.longest else None

    def reset(self) -> None:
        self.asked.clear()
