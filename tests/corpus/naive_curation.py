"""Curation in one loop and one process, to compare with what `prepare` decides in several."""

from collections.abc import Mapping
from typing import Any

from thunderhead.corpus.curation import Curation, Filter
from thunderhead.corpus.sources import Source


def curate(sources: Mapping[str, Source], filters: Mapping[str, Filter]) -> dict[str, Any]:
    """What curation.json should hold, see `Curation`."""
    curation = Curation(filters, sources)
    for name, source in sources.items():
        for document in source.documents():
            curation.keep(name, document, {name: rule.inspect(document.text) for name, rule in filters.items()})
    return curation.record
