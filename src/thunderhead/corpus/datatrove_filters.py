"""Filters of datatrove, with its own code and its own decisions.

datatrove's filters work on one document after the other, and some change its text for those that follow. So a chain of
them is one filter here.
"""

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from typing import Any

from thunderhead import extras
from thunderhead.corpus.curation import Rules

_PACKAGES = ("datatrove", "spacy", "regex")  # spacy cuts a text into words and sentences, for datatrove
_LEFT_OUT = ("exclusion_writer", "batch_size", "keep_fraction", "seed")  # arguments of pipelines, and of chance
_BLIND = {  # filters that need more than a text
    "LambdaFilter": "a function of its document",
    "SamplerFilter": "chance",
    "URLFilter": "the document's URL",
}


@dataclass(frozen=True, kw_only=True)
class DatatroveFilters(Rules):
    """Document filters of datatrove, one after the other, each by its class's name with its arguments.

    The decision is datatrove's own. A filter sees the text as those before it left it: C4QualityFilter takes lines out,
    and FineWebQualityFilter judges the rest. What is kept is kept whole, those lines too: only decisions are taken
    over. Filters need to decide by the text alone; some download a list of words or a model when they first do.
    """

    steps: Mapping[str, Mapping[str, Any]]  # {GopherQualityFilter: {min_doc_words: 100}, …}

    def __post_init__(self) -> None:
        if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
            needed = f"{', '.join(_PACKAGES[:-1])} and {_PACKAGES[-1]}"
            raise ValueError(f"needs the packages {needed}: {extras.install('datatrove')}")
        if not self.steps:
            raise ValueError("steps: names no filter")
        for name, arguments in self.steps.items():
            _check(name, arguments)

    def settings(self) -> dict[str, Any]:
        """Say the steps in their order, and the versions of what decides."""
        versions = {package: importlib.metadata.version(package) for package in ("datatrove", "spacy")}
        steps = [[name, dict(arguments)] for name, arguments in self.steps.items()]
        return {"filter": type(self).__name__, "steps": steps, **versions}

    def judge(self, text: str) -> str | None:
        from datatrove.data import Document
        from datatrove.pipeline.filters.base_filter import get_filter_result

        document = Document(text=text, id="")
        for name, step in self._filters.items():
            [answer] = step.filter_batch([document])
            keeps, reason = get_filter_result(answer)
            if not keeps:
                return f"{name}: {reason}" if reason else name
        return None

    @cached_property
    def _filters(self) -> dict[str, Any]:
        known = _known()
        return {name: known[name](**arguments) for name, arguments in self.steps.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave datatrove's filters behind: each process makes its own."""
        return {"steps": self.steps}


def _known() -> dict[str, Any]:
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters.base_filter import BaseFilter

    return {
        name: kind for name, kind in vars(filters).items() if isinstance(kind, type) and issubclass(kind, BaseFilter)
    }


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if there is no such filter, if it does not take these arguments, or lacks a package."""
    if (what := _BLIND.get(name)) is not None:
        raise ValueError(f"steps.{name}: decides by {what}, and a filter here has the text only")
    known = _known()
    if name not in known:
        raise ValueError(f"steps.{name}: datatrove has no such filter{_hint(name, known.keys() - _BLIND.keys())}")
    kind = known[name]
    takes = {key: each for key, each in signature(kind).parameters.items() if key not in _LEFT_OUT}
    for key in arguments:
        if key not in takes:
            raise ValueError(f"steps.{name}.{key}: is no argument it takes here{_hint(key, takes)}")
    if missing := [key for key, each in takes.items() if each.default is Parameter.empty and key not in arguments]:
        raise ValueError(f"steps.{name}: needs {', '.join(missing)}")
    try:
        kind.__new__(kind)  # looks for the packages it needs, and does nothing else
    except ImportError as error:
        raise ValueError(f"steps.{name}: {error}") from None


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
