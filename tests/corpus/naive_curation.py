"""Curation in one loop and one process, to compare with what `prepare` decides in several."""

from collections.abc import Mapping
from typing import Any

from thunderhead.corpus.curation import Filter, Removals, first_reason
from thunderhead.corpus.sources import Source


def curate(sources: Mapping[str, Source], filters: Mapping[str, Filter]) -> dict[str, Any]:
    """What curation.json should hold, see `Removals`."""
    removals = Removals(sources)
    for rule in filters.values():
        rule.reset()
    for name, source in sources.items():
        for document in source.documents():
            evidence = {name: rule.inspect(document.text) for name, rule in filters.items()}
            removals.add(name, document, first_reason(filters, document.id, evidence))
    return removals.to_dict()
