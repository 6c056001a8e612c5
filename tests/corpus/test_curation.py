"""Filters that judge a text by itself, by hand-computed cases, and the record of what filters removed."""

import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive_curation import curate

from shard_fixtures import find_manifest
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.run import build_all
from thunderhead.core.tokenizer import Tokens
from thunderhead.corpus.batch_processing import Encode
from thunderhead.corpus.curation import CharacterRatios, Filter, Inspect, Language, Length, Rules
from thunderhead.corpus.datatrove_filters import DatatroveFilters
from thunderhead.corpus.deduplication import ExactDuplicates
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer

OPTIONS = sorted(file.stem for file in (CONF_DIR / "curation").glob("*.yaml"))
ENGLISH = ("the", "of", "and")


def composed(*overrides: str) -> dict[str, Filter]:
    return build_all(
        config.plain(config.compose(list(overrides), "prepare"))["curation"]["filters"], "curation.filters", Filter
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1234", "fewer than 5 bytes"),
        ("12345", None),
        ("ééé", None),  # 6 bytes
        ("12345678", None),
        ("123456789", "more than 8 bytes"),
    ],
)
def test_length(text: str, reason: str | None) -> None:
    assert Length(min_bytes=5, max_bytes=8).judge(text) == reason


def test_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes=4 is less than min_bytes=5"):
        Length(min_bytes=5, max_bytes=4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("abc d12 ?!", None),  # of 8 characters: 4 letters, 2 digits, 2 symbols
        ("abc 12 ?!a+", "symbols > 0.3 of the characters"),  # of 9: 4, 2, 3
        ("abcde 123 4", "digits > 0.3 of the characters"),  # of 9: 5, 4
        ("ab 12 ?!", "letters < 0.4 of the characters"),  # of 6: 2
        ("abcd\x00", "unreadable > 0.1 of the characters"),
        ("abcd\ufffd", "unreadable > 0.1 of the characters"),
        ("数据 текст é", None),
        (" \n\t", "no characters but spaces"),
        ("", "no characters but spaces"),
    ],
)
def test_character_ratios(text: str, reason: str | None) -> None:
    rule = CharacterRatios(min_letters=0.4, max_digits=0.3, max_symbols=0.3, max_unreadable=0.1)
    assert rule.judge(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The end of it", None),  # 2 of 4 words
        ("The end is near", "common words < 0.5 of the words"),
        ("the слово", "letters of LATIN < 0.6 of the letters"),  # 3 of 8
        ("123 ...", "letters of LATIN < 0.6 of the letters"),
    ],
)
def test_language(text: str, reason: str | None) -> None:
    rule = Language(script="LATIN", min_script=0.6, common_words=ENGLISH, min_common_words=0.5)
    assert rule.judge(text) == reason


def decided(rule: Filter, *evidence: Any) -> list[str | None]:
    with tempfile.TemporaryDirectory() as folder:
        return list(rule.decide(iter(evidence), Path(folder)))


BY_OPTION = {option: composed(f"curation={option}") for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS)
@given(text=st.text(max_size=400))
def test_every_option_decides_on_any_text(option: str, text: str) -> None:
    """No text makes a filter fail, and what travels between processes gives the same answer."""
    for rule in BY_OPTION[option].values():
        evidence = rule.inspect(text)
        (first,) = decided(rule, pickle.loads(pickle.dumps(evidence)))
        assert decided(rule, evidence) == [first]
        assert first is None or (first and "\n" not in first)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_filter_that_does_not_answer_for_each_document(n: int, tmp_path: Path) -> None:
    class Answers(Length):
        def decide(self, evidence: Any, folder: Path) -> Any:
            return iter([None] * n)

    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    made_from = ({"text": LocalText(path=str(tmp_path / "two.jsonl"))}, ByteTokenizer())
    settings = {"filters": {"mine": Answers(min_bytes=1)}, "validation_fraction": 0.5, "processes": 1}
    with pytest.raises(ValueError, match=r"^curation\.filters\.mine: decide must yield an answer for each document"):
        prepare(*made_from, shards_dir=tmp_path, **settings)


def test_settings_tell_every_argument() -> None:
    for option in OPTIONS:
        nodes = config.plain(config.compose([f"curation={option}"], "prepare"))["curation"]["filters"]
        for name, rule in BY_OPTION[option].items():
            arguments = {key: value for key, value in nodes[name].items() if key != "_target_"}
            if isinstance(rule, DatatroveFilters):  # these and versions: test_datatrove_filters.py
                arguments = {**rule.settings(), "steps": [[*step] for step in arguments["steps"].items()]}
            assert rule.settings() == {"filter": type(rule).__name__, **arguments}
            json.dumps(rule.settings())  # the shards' key is made from them


def test_options_compose_and_take_filters_of_ones_own() -> None:
    assert not composed()
    both = composed("curation=[gopher,deduplication]")
    assert list(both) == ["gopher_quality", "gopher_repetition", "exact_duplicates", "near_duplicates"]
    own = composed(
        "curation=gopher", "+curation.filters.mine={_target_: thunderhead.corpus.curation.Length, min_bytes: 9}"
    )
    assert own["mine"].settings()["min_bytes"] == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+curation.filters.mine=3", "^curation.filters.mine: int is no Filter: its _target_ must give"),
        ("+curation.filters.mine={_target_: builtins.dict}", "^curation.filters.mine: dict is no Filter"),
        (
            "+curation.filters.mine={_target_: thunderhead.corpus.curation.Length, min_bytes: 9, max_bytes: 1}",
            "^curation.filters.mine.max_bytes=1 is less than min_bytes=9",
        ),
    ],
)
def test_what_is_no_filter_is_refused(override: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        composed(override)


# --------------------------------------------------------------------------------------------------------------------
# The record


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., dict[str, LocalText]]:
    def write(**sources: list[str]) -> dict[str, LocalText]:
        for source, documents in sources.items():
            (tmp_path / source).mkdir()
            for index, document in enumerate(documents):
                (tmp_path / source / f"{index:03}.txt").write_text(document)
        return {source: LocalText(path=str(tmp_path / source)) for source in sources}

    return write


def test_removals_are_counted_by_the_first_filter_that_gives_a_reason(
    texts: Callable[..., dict[str, LocalText]],
) -> None:
    # "short" is a duplicate, too, but length hears of it first, and exact_duplicates never
    long = "a text that is long enough"
    sources = texts(a=["short", long, "short", long.upper()], b=[long, "another text of some length"])
    rules = {"length": Length(min_bytes=6), "exact": ExactDuplicates()}
    found = curate(sources, rules)
    same = "exact: same text as an earlier document"
    assert found == {
        "sources": {
            "a": {
                "documents": 4,
                "kept": 1,
                "removed": {
                    "length: fewer than 6 bytes": {
                        "documents": 2,
                        "bytes": 10,
                        "examples": [
                            {"id": "000.txt#0", "excerpt": "short"},
                            {"id": "002.txt#0", "excerpt": "short"},
                        ],
                    },
                    same: {
                        "documents": 1,
                        "bytes": len(long),
                        "examples": [{"id": "003.txt#0", "excerpt": long.upper()}],
                    },
                },
            },
            # duplicates are found across sources
            "b": {
                "documents": 2,
                "kept": 1,
                "removed": {
                    same: {"documents": 1, "bytes": len(long), "examples": [{"id": "000.txt#0", "excerpt": long}]}
                },
            },
        }
    }
    assert curate(sources, rules) == found  # nothing is remembered from one pass to the next
    json.dumps(found)


def test_examples_are_few_and_short(texts: Callable[..., dict[str, LocalText]]) -> None:
    found = curate(texts(a=["é" * 1000] * 9), {"length": Length(min_bytes=0, max_bytes=10)})
    removed = found["sources"]["a"]["removed"]["length: more than 10 bytes"]
    assert (removed["documents"], removed["bytes"]) == (9, 18_000)
    assert [example["excerpt"] for example in removed["examples"]] == ["é" * 300] * 5


# --------------------------------------------------------------------------------------------------------------------
# In the shards


def documents(manifest: Manifest) -> int:
    return sum(shard.documents for by_source in manifest.splits.values() for shard in by_source.values())


def test_prepared_shards_hold_what_the_filters_keep(corpus: Path, tmp_path: Path) -> None:
    (corpus / "000.txt").write_text("too short")
    (corpus / "001.txt").write_text((corpus / "002.txt").read_text())
    sources, tokenizer = {"text": LocalText(path=str(corpus))}, ByteTokenizer()
    place = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    filters: dict[str, Filter] = {"length": Length(min_bytes=10), "exact": ExactDuplicates()}
    whole, kept = prepare(sources, tokenizer, **place), prepare(sources, tokenizer, **place, filters=filters)
    assert (documents(whole), documents(kept)) == (60, 58)
    report = json.loads((kept.folder / "curation.json").read_text())
    assert report == curate(sources, filters)
    assert report["sources"]["text"]["kept"] == 58
    # each curation has shards of its own, and finds them again
    assert find_manifest(sources, tokenizer, **place, filters=filters) == kept != whole
    other = {"length": Length(min_bytes=11), "exact": ExactDuplicates()}
    assert find_manifest(sources, tokenizer, **place, filters=other) is None


def test_filters_that_leave_nothing_are_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.text: curation\.filters keep none of its documents"):
        prepare(
            {"text": LocalText(path=str(corpus))},
            ByteTokenizer(),
            shards_dir=tmp_path / "shards",
            validation_fraction=0.2,
            filters={"length": Length(min_bytes=1_000_000)},
        )


class FailsAtC(Rules):
    def judge(self, text: str) -> str | None:
        return str(int(text)) if text.startswith("c") else None


def test_a_bug_of_ones_own_filter_is_no_refused_setting() -> None:
    with pytest.raises(RuntimeError, match=r"curation\.filters\.mine fails at the text 'cde'"):
        Inspect({"mine": FailsAtC()})(["ab", "cde"])


class WithoutC(ByteTokenizer):
    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        raise ValueError(f"no id of {texts[0]!r}")


def test_nor_is_one_of_ones_own_tokenizer() -> None:
    with pytest.raises(RuntimeError, match="tokenizer: encode_batch fails at the 2 texts from 'ab'"):
        Encode(WithoutC())(["ab", "cde"])
