"""Gopher's and C4's rules by hand-computed cases, each at its threshold and beyond, and n-grams by a naive count."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core import config
from thunderhead.core.run import build_all
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.quality import (
    C4,
    GopherQuality,
    GopherRepetition,
    _ngrams,
    duplicate_share,
    duplicates,
    sentences,
    top_share,
)


def published(option: str, name: str) -> object:
    return build_all(
        config.plain(config.compose([f"curation={option}"], "prepare"))["curation"]["filters"],
        "curation.filters",
        Filter,
    )[name]


QUALITY = published("gopher", "gopher_quality")
REPETITION = published("gopher", "gopher_repetition")
C4_RULES = published("c4", "c4")
assert isinstance(QUALITY, GopherQuality)
assert isinstance(REPETITION, GopherRepetition)
assert isinstance(C4_RULES, C4)

PROSE = " ".join(["the", "of", *(f"word{chr(97 + i)}" for i in range(26))] * 2)  # 56 words, all with letters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, None),
        ("", "fewer than 50 words"),
        (" ".join(PROSE.split()[:50]), None),
        (" ".join(PROSE.split()[:49]), "fewer than 50 words"),
        ("the of " * 50_000, "mean word length < 3"),  # 100,000 words are enough, and not too many
        ("the of " * 50_000 + "the", "more than 100,000 words"),
        ("the of " + "abcdefghijk " * 60, "mean word length > 10"),  # 665 / 62 = 10.7
        ("the of " + "abcdefghij " * 60, None),
        (PROSE + " #" * 6, None),  # 6 of 62 = 0.097
        (PROSE + " #" * 7, "# > 0.1 a word"),  # 7 of 63 = 0.111
        (PROSE + " ..." * 7, "ellipses > 0.1 a word"),
        (PROSE + " …" * 7, "ellipses > 0.1 a word"),
        ("\n".join(["- " + PROSE] * 9 + [PROSE]), None),  # 9 of 10 lines: not more than 0.9
        ("\n".join(["- " + PROSE] * 10 + [PROSE]), "bullet points > 0.9 of the lines"),
        ("\n".join([PROSE + "..."] * 3 + [PROSE] * 7), None),
        ("\n".join([PROSE + "..."] * 4 + [PROSE] * 6), "ellipses end > 0.3 of the lines"),
        (PROSE + " 1234" * 14, None),  # 56 of 70 = 0.8
        (PROSE + " 1234" * 15, "words with a letter < 0.8 of the words"),
        (PROSE.replace("of", "xx"), "fewer than 2 of the words the, be, to, of, and, that, have, with"),
        (PROSE.replace("of", "With,"), None),  # letter case and punctuation do not hide a word
    ],
)
def test_gopher_quality(text: str, reason: str | None) -> None:
    assert QUALITY.judge(text) == reason


def test_required_words_that_cannot_occur_are_refused() -> None:
    with pytest.raises(ValueError, match="min_required_words=9 is more than required_words"):
        replace(QUALITY, min_required_words=9)


@pytest.mark.parametrize(
    ("pieces", "shares"),
    [
        ([], (0, 0)),
        (["a", "b"], (0, 0)),
        (["aa", "b", "aa", "aa"], (2 / 4, 4 / 7)),
        (["a", "a", "bbb", "bbb"], (2 / 4, 4 / 8)),
    ],
)
def test_duplicate_pieces(pieces: list[str], shares: tuple[float, float]) -> None:
    assert duplicates(pieces) == pytest.approx(shares)


UNLIKE = [f"{chr(97 + i)}{chr(110 - i)}" for i in range(13)]  # 13 words of 2 characters, no two alike


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", None),
        (" ".join(UNLIKE), None),
        # 3 of 10 lines, each of 2 characters, occurred before: lines at their threshold, characters beyond theirs
        ("\n".join([*UNLIKE[:7], *UNLIKE[:3]]), "duplicate lines > 0.2 of the characters"),
        ("\n".join([*UNLIKE[:6], *UNLIKE[:4]]), "duplicates > 0.3 of the lines"),
        # lines of 20 and 2 characters
        ("\n".join(["x" * 5, *UNLIKE[:5], *["y" * 30], "x" * 5]), None),
        ("\n\n".join([f"{i} {UNLIKE[i]}\n{i + 20}" for i in range(4)] * 2), "duplicates > 0.3 of the lines"),
    ],
)
def test_gopher_repetition_of_lines(text: str, reason: str | None) -> None:
    only_pieces = replace(REPETITION, max_top_ngrams={}, max_duplicate_ngrams={})
    assert only_pieces.judge(text) == reason


def test_gopher_repetition_of_paragraphs() -> None:
    # the same four paragraphs again, with lines that differ in nothing: let lines pass
    paragraphs = [f"{word} one\n{word} two" for word in UNLIKE[:7]]
    lenient = replace(REPETITION, max_duplicate_lines=1.0, max_duplicate_line_characters=1.0, max_top_ngrams={})
    lenient = replace(lenient, max_duplicate_ngrams={})
    assert lenient.judge("\n\n".join(paragraphs)) is None
    assert lenient.judge("\n \n".join(paragraphs + paragraphs[:4])) == "duplicates > 0.3 of the paragraphs"
    assert lenient.judge("\n\n".join(paragraphs + paragraphs[:3])) == "duplicate paragraphs > 0.2 of the characters"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        # of 20 words of 2 characters, 4 lie in "a1 a2", which occurs twice: at the threshold; of 18, beyond
        (["a1", "a2", *UNLIKE[:13], "bb", "a1", "a2", "dd", "ee"], None),
        (["a1", "a2", *UNLIKE[:12], "bb", "a1", "a2", "cc"], "the top 2-gram > 0.2 of the characters"),
        # a 4-gram twice: of 72 characters, 8 lie in the two occurrences of a 2-gram, 12 in a 3-gram's, 16 in a 4-gram's
        ([*UNLIKE[:5], *(w * 2 for w in UNLIKE), *UNLIKE[:5]], "the top 4-gram > 0.16 of the characters"),
    ],
)
def test_gopher_repetition_of_words(words: list[str], reason: str | None) -> None:
    assert REPETITION.judge(" ".join(words)) == reason


def test_duplicate_ngrams_have_their_own_thresholds() -> None:
    no_top = replace(REPETITION, max_top_ngrams={})
    text = " ".join([*UNLIKE[:6], *(f"{w}{w}" for w in UNLIKE[:8]), *UNLIKE[:6]])
    # 6 words of 2 characters again, of 6·2 + 8·4 + 6·2 = 56: 12 / 56 = 0.214 in 5-grams and 6-grams, none in 7-grams
    assert no_top.judge(text) == "duplicate 5-grams > 0.15 of the characters"
    only = {n: limit for n, limit in REPETITION.max_duplicate_ngrams.items() if n >= 7}
    assert replace(no_top, max_duplicate_ngrams=only).judge(text) is None


words_strategy = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=30)


@given(words=words_strategy, n=st.integers(1, 6))
def test_ngram_shares_equal_a_naive_count(words: list[str], n: int) -> None:
    lengths, found = _ngrams(words, {n})
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        assert not found
        return
    total = sum(map(len, words))

    def share(starts: list[int]) -> float:
        covered = {i for start in starts for i in range(start, start + n)}
        return sum(len(words[i]) for i in covered) / total

    again = [i for i, gram in enumerate(grams) if gram in grams[:i]]
    assert duplicate_share(lengths, found[n], n) == pytest.approx(share(again))
    counts = Counter(grams)
    most = max(counts.values())
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    candidates = [g for g, count in counts.items() if count == most and sum(map(len, g)) == longest]
    first = candidates[0]  # Counter keeps the order of first occurrence
    expected = share([i for i, gram in enumerate(grams) if gram == first]) if most > 1 else 0.0
    assert top_share(lengths, found[n], n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("One.", 1),
        ("One. Two! Three?", 3),
        ("Is 3.14 one number?", 1),
        ('He said "no." She left.', 2),
        ("What?! Really...", 2),
        ("No end", 1),
        ('a quotation "ends"', 1),
    ],
)
def test_sentences(line: str, count: int) -> None:
    assert sentences(line) == count


GOOD = "This is a sentence of words."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{GOOD} {GOOD} {GOOD}", None),
        (f"{GOOD}\n{GOOD}\n{GOOD}", None),
        (f"{GOOD}\n{GOOD}", "fewer than 3 sentences in proper lines"),
        (f"{GOOD}\n{GOOD}\n{GOOD} And no end", "fewer than 3 sentences in proper lines"),
        (f"{GOOD}\n{GOOD}\nOnly four words here.", "fewer than 3 sentences in proper lines"),
        (f"{GOOD}\n{GOOD}\nPlease enable JavaScript in your browser.", "fewer than 3 sentences in proper lines"),
        (f"{GOOD}\n{GOOD}\n{GOOD}\nmenu\nlogin", None),
        (f"{GOOD}\n{GOOD}\n{GOOD}\nLorem Ipsum dolor", "contains 'lorem ipsum'"),
        (f"{GOOD}\n{GOOD}\n{GOOD}\nint main() {{", "contains '{'"),
        ("", "fewer than 3 sentences in proper lines"),
    ],
)
def test_c4(text: str, reason: str | None) -> None:
    assert C4_RULES.judge(text) == reason
