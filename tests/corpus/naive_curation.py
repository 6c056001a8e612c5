"""Curation in one loop and in memory, to compare with what `prepare` decides in several processes and on the disk."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thunderhead.corpus.curation import Filter
from thunderhead.corpus.sources import Source


def curate(sources: Mapping[str, Source], filters: Mapping[str, Filter]) -> dict[str, Any]:
    """What curation.json should hold, see `thunderhead.corpus.curation.curate`."""
    found = [(name, document) for name, source in sources.items() for document in source.documents()]
    record: dict[str, Any] = {name: {"documents": 0, "kept": 0, "removed": {}} for name in sources}
    for name, _ in found:
        record[name]["documents"] += 1
    for filter_name, rule in filters.items():
        evidence = [rule.inspect(document.text) for _, document in found]
        with tempfile.TemporaryDirectory() as folder:
            reasons = list(rule.decide(iter(evidence), Path(folder)))
        for (name, document), reason in zip(found, reasons, strict=True):
            if reason is not None:
                empty: dict[str, Any] = {"documents": 0, "bytes": 0, "examples": []}
                removed = record[name]["removed"].setdefault(f"{filter_name}: {reason}", empty)
                removed["documents"] += 1
                removed["bytes"] += len(document.text.encode())
                removed["examples"] += [{"id": document.id, "excerpt": document.text[:300]}]
                removed["examples"] = removed["examples"][:5]
        found = [kept for kept, reason in zip(found, reasons, strict=True) if reason is None]
    for name, _ in found:
        record[name]["kept"] += 1
    return {"sources": record}
