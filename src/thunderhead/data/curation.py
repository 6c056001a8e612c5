"""Which documents are worth training on: filters that say, for each document, why it goes, if it does."""

from abc import ABC, abstractmethod
from typing import Any


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
        """Decide, in the order of the documents and in one process: None to keep it, or the reason why it goes."""

    def reset(self) -> None:  # noqa: B027  # most have nothing to forget
        """Forget all documents (before a new pass, and for filters that compare documents only)."""
