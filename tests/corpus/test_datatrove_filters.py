"""datatrove's filters here decide as they do in datatrove's own pipeline, over texts that break each of their rules."""

import importlib.metadata
import importlib.util
import pickle
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pydoc_data.topics import topics
from types import TracebackType
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.run import build_all
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.datatrove_filters import DatatroveFilters

PACKAGES = (
    "numpy",
    "scipy",
    "pydantic",
    "rich",
    "jinja2",
    "trafilatura",
    "tiktoken",
    "spacy",
    "datasets",
    "transformers",
)


def composed(*overrides: str) -> DatatroveFilters:
    nodes = config.plain(config.compose(["curation=fineweb", *overrides], "prepare"))["curation"]["filters"]
    rule = build_all(nodes, "curation.filters", Filter)["fineweb"]
    assert isinstance(rule, DatatroveFilters)
    return rule


FINEWEB = composed()


class Removed:
    """A writer of datatrove's for what its filters remove: why, by the document's id."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.step = ""

    def __enter__(self) -> "Removed":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        self.reasons[document.id] = f"{self.step}: {document.metadata['filter_reason']}"


def by_datatrove(texts: Iterable[str]) -> list[str | None]:
    """What the pipeline of datatrove's examples/fineweb.py says of each text, run by datatrove, filter after filter."""
    removed = Removed()
    steps = [
        GopherRepetitionFilter(exclusion_writer=removed),
        GopherQualityFilter(exclusion_writer=removed),
        C4QualityFilter(filter_no_terminal_punct=False, exclusion_writer=removed),
        FineWebQualityFilter(exclusion_writer=removed),
    ]
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    ids = [document.id for document in documents]
    for step in steps:
        removed.step = type(step).__name__
        documents = list(step.run(iter(documents)))
    return [removed.reasons.get(each) for each in ids]


def words(seed: int, length: int = 6) -> Iterator[str]:
    """Words of no language, hardly one twice."""
    draw = random.Random(seed)
    while True:
        yield "".join(draw.choices("etaoinshrdlucmfwypvbgk", k=length))


def said(n: int, drawn: Iterator[str]) -> str:
    """So many words of it in a row."""
    return " ".join(next(drawn) for _ in range(n))


def lines(n: int, seed: int, size: int = 9, end: str = ".", length: int = 6) -> list[str]:
    """Lines of as many words, two of them English."""
    drawn = words(seed, length)
    return [f"the {said(size - 2, drawn)} of{end}" for _ in range(n)]


def repeating(phrase: str, *further: str) -> str:
    """A phrase thirty times, between other words."""
    drawn = words(1)
    return " ".join([*(f"{next(drawn)} {phrase} {next(drawn)}" for _ in range(30)), *further])


def twice(n: int) -> str:
    """Five phrases of n words, each twice: little more of the text than GopherRepetitionFilter lets be."""
    drawn = words(n)
    phrases = [said(n, drawn) for _ in range(5)]
    n_words = round(5 * n * 6 / 7 / (0.207 - 0.01 * n))  # six of seven characters are letters; 15 % of n=5, 14 % of n=6
    return " ".join([*(f"{next(drawn)} {phrase}" for phrase in phrases * 2), said(n_words - 10 * (n + 1), drawn)])


GOOD = lines(12, seed=0)
LIST = [said(3, words(line, length=10)) for line in range(30)]
BROKEN = {
    "GopherRepetitionFilter: dup_para_frac": "\n\n".join([*GOOD[:3], "a b", "a b", "a b"]),
    "GopherRepetitionFilter: dup_para_char_frac": "\n\n".join([*GOOD[:9], *GOOD[:3]]),
    "GopherRepetitionFilter: dup_line_frac": "\n".join([*GOOD[:3], "a b", "a b", "a b"]),
    "GopherRepetitionFilter: dup_line_char_frac": "\n".join([*GOOD[:9], *GOOD[:3]]),
    "GopherRepetitionFilter: top_2_gram": repeating("seems quite"),
    "GopherRepetitionFilter: top_3_gram": repeating("is it certainly", *lines(20, seed=3)),
    "GopherRepetitionFilter: top_4_gram": repeating("as it is so", *lines(20, seed=3)),
    **{f"GopherRepetitionFilter: duplicated_{n}_n_grams": twice(n) for n in range(5, 11)},
    "GopherQualityFilter: gopher_short_doc": "\n".join(GOOD[:4]),
    "GopherQualityFilter: gopher_below_avg_threshold": said(60, words(5, length=2)),
    "GopherQualityFilter: gopher_above_avg_threshold": "\n".join(lines(12, 5, length=14)),
    "GopherQualityFilter: gopher_too_many_hashes": "\n".join(f"# {line[:20]} # {line[20:]}" for line in GOOD),
    "GopherQualityFilter: gopher_too_many_ellipsis": "\n".join(f"{line[:20]} … {line[20:]} …." for line in GOOD),
    "GopherQualityFilter: gopher_too_many_bullets": "\n".join(f" - {line}" for line in GOOD),
    "GopherQualityFilter: gopher_too_many_end_ellipsis": "\n".join(
        line + ".." * (i % 2) for i, line in enumerate(GOOD)
    ),
    "GopherQualityFilter: gopher_below_alpha_threshold": "\n".join(
        f"{i} {i + 50} {i * i} {x}" for i, x in enumerate(GOOD)
    ),
    "GopherQualityFilter: gopher_enough_stop_words": "\n".join(GOOD).replace("of.", "off."),
    "C4QualityFilter: lorem_ipsum": "\n".join([*GOOD, "Lorem Ipsum dolor sit amet."]),
    "C4QualityFilter: curly_bracket": "\n".join([*GOOD, "void main ( ) {"]),
    "C4QualityFilter: too_few_sentences": "\n".join(lines(4, 6, size=20)),
    "FineWebQualityFilter: line_punct_ratio": "\n".join(lines(12, 7, end="")),
    "FineWebQualityFilter: short_line_ratio": "\n".join(
        [*GOOD[:5], *(f"{line[:20]} {line[21:25]}." for line in LIST[:20])]
    ),
    "FineWebQualityFilter: char_dup_ratio": "\n".join([*GOOD, GOOD[0]]),
    "FineWebQualityFilter: list_ratio": "\n".join(["the end of", *LIST[:26], *(f"{line}." for line in LIST[26:])]),
}


def of_packages() -> list[str]:
    """What packages say of themselves, and their licences: English of people and of lawyers."""
    installed = [importlib.metadata.distribution(name) for name in PACKAGES]
    licences = [file for each in installed for file in each.files or [] if "LICENSE" in file.name.upper()]
    return [str(each.metadata.get_payload()) for each in installed] + [file.read_text() for file in licences]


@pytest.mark.parametrize("reason", BROKEN)
def test_each_rule_can_be_broken(reason: str) -> None:
    assert FINEWEB.judge(BROKEN[reason]) == reason


def test_decisions_are_those_of_datatroves_pipeline() -> None:
    real = [*topics.values(), *of_packages()]
    made = ["\n".join(GOOD), "", " \n", *BROKEN.values()]
    expected = by_datatrove([*made, *real])
    assert [FINEWEB.judge(text) for text in (*made, *real)] == expected
    assert expected[0] is None
    assert expected[len(made) :].count(None) > 4


def test_filters_see_the_text_as_those_before_them_left_it() -> None:
    """C4QualityFilter takes lines of under three words out, which FineWebQualityFilter would count."""
    text = "\n".join([*GOOD, *(said(2, words(line)) for line in range(30))])
    only = {name: arguments for name, arguments in FINEWEB.steps.items() if name == "FineWebQualityFilter"}
    assert replace(FINEWEB, steps=only).judge(text) == "FineWebQualityFilter: short_line_ratio"
    assert [FINEWEB.judge(text)] == by_datatrove([text]) == [None]


def test_a_filter_that_gives_no_reason_is_named() -> None:
    rule = DatatroveFilters(steps={"RegexFilter": {"regex_exp": "[0-9]"}})
    assert (rule.judge("room 9"), rule.judge("no room")) == ("RegexFilter", None)


def test_settings_hold_the_order_and_what_decides() -> None:
    told = FINEWEB.settings()
    assert [name for name, _ in told["steps"]] == list(FINEWEB.steps)
    assert told["steps"][2] == ["C4QualityFilter", {"filter_no_terminal_punct": False}]
    assert told["datatrove"] == importlib.metadata.version("datatrove")
    assert told["spacy"] == importlib.metadata.version("spacy")
    assert replace(FINEWEB, steps=dict(reversed(FINEWEB.steps.items()))).settings() != told


def test_travels_between_processes_without_datatroves_objects() -> None:
    rule = replace(FINEWEB)
    before = pickle.dumps(rule)
    assert rule.judge("short") == "GopherQualityFilter: gopher_short_doc"
    assert pickle.dumps(rule) == before
    copy = pickle.loads(before)
    assert copy == rule
    assert copy.judge("\n".join(GOOD)) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("C4QualitFilter={}", r"steps\.C4QualitFilter: datatrove has no such filter: did you mean C4QualityFilter\?"),
        ("Zebra={}", r"steps\.Zebra: datatrove has no such filter; known: C4BadWordsFilter, .*UnigramLogProbFilter$"),
        ("GopherQualityFilter.min_words=3", r"GopherQualityFilter\.min_words: is no argument .*mean min_doc_words\?"),
        (
            "GopherQualityFilter.exclusion_writer=3",
            r"\.exclusion_writer: is no argument it takes here; known: language, ",
        ),
        (
            "C4BadWordsFilter={keep_fraction: 0.5}",
            r"keep_fraction: is no argument it takes here; known: default_language, ",
        ),
        ("RegexFilter={}", r"steps\.RegexFilter: needs regex_exp$"),
        ("URLFilter={}", r"steps\.URLFilter: decides by the document's URL, and a filter here has the text only$"),
        ("SamplerFilter={rate: 0.1}", r"steps\.SamplerFilter: decides by chance"),
    ],
)
def test_what_is_no_filter_of_datatrove_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^curation\.filters\.fineweb: .*{message}"):
        composed(f"+curation.filters.fineweb.steps.{override}")


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^steps: names no filter$"):
        DatatroveFilters(steps={})


def test_packages_that_one_filter_needs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageFilter, "_requires_dependencies", ["no_such_package"])
    with pytest.raises(ValueError, match=r"^steps\.LanguageFilter: Please install `no_such_package`"):
        DatatroveFilters(steps={"LanguageFilter": {}})


@pytest.mark.parametrize("missing", ["datatrove", "spacy", "regex"])
def test_without_the_extra_the_command_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        ConfigError, match=r"^curation\.filters\.fineweb: needs .* pip install 'datatrove>=\S+' regex 'spacy>=\S+'$"
    ):
        composed()
