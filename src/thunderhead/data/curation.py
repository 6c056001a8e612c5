"""Which documents are worth training on: filters that say, for each document, why it goes, if it does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from thunderhead.data.sources import Document

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
        """Decide, in the order of the documents and in one process: None to keep it, or the reason why it goes."""

    def reset(self) -> None:  # noqa: B027 - most have nothing to forget
        """Forget all documents (before a new pass, and for filters that compare documents only)."""


class Removals:
    """What a curation removed: counts by source and reason, and the first examples of each. `to_dict` is curation.json.

    {"sources": {name: {"documents": n, "kept": n, "removed": {"<filter>: <reason>":
        {"documents": n, "bytes": n, "examples": [{"id": …, "excerpt": first 300 characters}, up to 5]}}}}}
    """

    def __init__(self) -> None:
        self._sources: dict[str, dict[str, Any]] = {}

    def add_source(self, source: str) -> None:
        """Begin a source: also one without documents is reported."""
        self._sources.setdefault(source, {"documents": 0, "kept": 0, "removed": {}})

    def add(self, source: str, document: Document, reason: str | None) -> None:
        """Note one document: removed for a reason, as `first_reason` gives it, or kept."""
        self.add_source(source)
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
