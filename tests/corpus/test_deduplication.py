"""Duplicates: exact ones by their text, near ones against the naive Jaccard similarity of all pairs."""

import random
import shutil
import tempfile
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.corpus import common_keys
from thunderhead.corpus.deduplication import ExactDuplicates, NearDuplicates, shingles

SAME = "same text as an earlier document"


def kept(rule: ExactDuplicates | NearDuplicates, texts: list[str]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        reasons = list(rule.decide(map(rule.inspect, texts), Path(folder)))
        assert not list(Path(folder).iterdir())
    assert len(reasons) == len(texts)
    return [i for i, reason in enumerate(reasons) if reason is None]


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def test_exact_duplicates() -> None:
    texts = ["One two", "one  TWO\n", "one twо", "one two.", "cafe\u0301", "caf\u00e9"]  # the third has a Cyrillic о
    assert kept(ExactDuplicates(), texts) == [0, 2, 3, 4]
    assert kept(ExactDuplicates(normalize=False), texts) == [0, 1, 2, 3, 4, 5]
    assert kept(ExactDuplicates(), []) == kept(NearDuplicates(), []) == []


def test_what_a_kill_left_makes_room(tmp_path: Path) -> None:
    rule = ExactDuplicates()
    killed = rule.decide(map(rule.inspect, ["one", "two"]), tmp_path)
    next(killed)
    (left,) = tmp_path.iterdir()
    shutil.copytree(left, tmp_path / "copy")
    killed.close()
    (tmp_path / "copy").rename(left)
    assert list(rule.decide(map(rule.inspect, ["one", "one"]), tmp_path)) == [None, SAME]
    assert not list(tmp_path.iterdir())


@given(st.lists(st.text(max_size=6), max_size=20))
def test_exactly_the_first_of_equal_texts_stays(texts: list[str]) -> None:
    forms = [" ".join(unicodedata.normalize("NFC", text).lower().split()) for text in texts]
    assert kept(ExactDuplicates(), texts) == [i for i, form in enumerate(forms) if form not in forms[:i]]
    assert kept(ExactDuplicates(normalize=False), texts) == [i for i, t in enumerate(texts) if t not in texts[:i]]


@given(st.text(alphabet="ab \n.", max_size=40), st.integers(1, 5))
def test_shingles_equal_a_naive_count(text: str, n: int) -> None:
    words = "".join(c if c in "ab" else " " for c in text).split()
    naive = {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)} or {" ".join(words)}
    assert shingles(text, n) == naive


def versions(n_texts: int, n_words: int) -> list[str]:
    """Texts of random words, each followed by a copy in which some share of the words is replaced."""
    draw = random.Random(3)
    texts = []
    for index in range(n_texts):
        words = [str(draw.randrange(5000)) for _ in range(n_words)]
        texts.append(" ".join(words))
        replaced = (index / n_texts) ** 2 * 0.2  # a word is in 5 shingles
        changed = [str(draw.randrange(5000)) if draw.random() < replaced else word for word in words]
        texts.append(" ".join(changed))
    return texts


def test_near_duplicates_agree_with_naive_jaccard() -> None:
    """All pairs of similarity ≥ 0.9 are found and none below 0.6, which is 3.3 standard errors (0.046) from 0.75.

    A pair of similarity 0.9 escapes all 14 bands of 8 with probability (1 - 0.9^8)^14 = 0.0004; the hash functions are
    fixed, and so is the outcome.
    """
    texts = versions(60, 200)
    rule = NearDuplicates()
    staying = set(kept(rule, texts))
    sets = [shingles(text, 5) for text in texts]
    removed = [i for i in range(len(texts)) if i not in staying]
    for i in removed:
        assert max(jaccard(sets[i], sets[j]) for j in staying if j < i) > 0.6
    for i, j in combinations(sorted(staying), 2):
        assert jaccard(sets[i], sets[j]) < 0.9
    similar = [jaccard(sets[2 * k], sets[2 * k + 1]) for k in range(60)]
    assert sum(s > 0.9 for s in similar) > 5  # the two assertions above are about something
    assert sum(s < 0.6 for s in similar) > 5
    assert any(0.6 < jaccard(sets[i], sets[i - 1]) < 0.9 for i in removed)


def test_the_estimate_is_unbiased() -> None:
    """The share of equal minima estimates the Jaccard similarity: mean error over pairs within 4 standard errors."""
    texts = versions(40, 150)
    rule = NearDuplicates(bands=16, rows=8)
    errors, variances = [], []
    for a, b in zip(texts[::2], texts[1::2], strict=True):
        truth = jaccard(shingles(a, 5), shingles(b, 5))
        errors.append(float(np.mean(rule.inspect(a) == rule.inspect(b))) - truth)
        variances.append(truth * (1 - truth) / 128)
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.sum(variances)) / len(errors)
    assert max(map(abs, errors)) > 0  # it is an estimate


def test_the_threshold_decides() -> None:
    texts = versions(60, 200)
    counts = [len(kept(NearDuplicates(threshold=threshold), texts)) for threshold in (0.6, 0.75, 0.9)]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(("threshold", "shared"), [(0.0, "a band of 8 minima"), (0.75, "0.75 or more")])
def test_the_reason_says_what_is_shared(threshold: float, shared: str, tmp_path: Path) -> None:
    rule = NearDuplicates(threshold=threshold)
    reasons = rule.decide(map(rule.inspect, ["one text", "one text"]), tmp_path)
    assert list(reasons) == [None, f"{shared} of its 5-grams shared with an earlier document"]


def test_with_threshold_0_any_agreement_of_a_band_is_enough() -> None:
    """As in FineWeb."""
    texts, rule = versions(60, 200), NearDuplicates(threshold=0.0)
    bands = [{(band, tuple(row)) for band, row in enumerate(rule.inspect(text).reshape(14, 8))} for text in texts]
    alone = [i for i, own in enumerate(bands) if all(own.isdisjoint(earlier) for earlier in bands[:i])]
    assert kept(rule, texts) == alone


def test_short_texts_are_compared_as_wholes() -> None:
    rule = NearDuplicates()
    assert kept(rule, ["one two", "One, two!", "one three", "", "..."]) == [0, 2, 3]


def test_a_second_pass_remembers_nothing_and_decides_the_same() -> None:
    texts, rule = versions(30, 100), NearDuplicates()
    first = kept(rule, texts)
    assert kept(rule, texts) == first
    assert len(first) < len(texts)


def test_signatures_are_small_and_the_same_in_every_process() -> None:
    rule, other = NearDuplicates(), NearDuplicates()
    signature = rule.inspect("one two three four five six")
    assert signature.nbytes == 4 * 14 * 8
    assert np.array_equal(signature, other.inspect("one two three four five six"))
    assert not np.array_equal(signature, NearDuplicates(seed=2).inspect("one two three four five six"))


@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([1, 4, 1 << 22]), st.integers(1, 2))
def test_common_keys_equal_a_naive_search(values: list[int], at_once: int, words: int) -> None:
    """In one file or several, in blocks of any size."""
    hashes = np.random.default_rng(0).integers(0, 2**64, (10, words), dtype=np.uint64)
    keys = hashes[values].reshape(-1, words)
    blocks = [keys[:7], keys[7:8], keys[8:]]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(common_keys, "AT_ONCE", at_once)
        parts = list(common_keys.later(iter(blocks), len(keys), Path(folder)))
        assert not list(Path(folder).iterdir())
    found = {int(later): (int(first), int(last)) for part in parts for later, first, last in zip(*part, strict=True)}
    naive = {}
    for number, value in enumerate(values):
        if value in values[:number]:
            naive[number] = (values.index(value), number - 1 - values[:number][::-1].index(value))
    assert found == naive
