import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.corpus import overlap
from thunderhead.corpus.overlap import WINDOW, Overlap, windows
from thunderhead.corpus.prepare import prepare, told_overlap
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer


def prose(seed: int, n_words: int = 400) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzäé数", k=draw.randint(2, 9))) for _ in range(n_words)]
    return " ".join(words) + "\n"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_windows_are_of_their_document_alone(seeds: list[int]) -> None:
    """Whatever the batch, a text has the same windows, and as many as expected."""
    texts = [prose(seed) for seed in seeds] + ["short", ""]
    found = windows(texts)
    for number, text in enumerate(texts):
        assert (found.hashes[found.document == number] == windows([text]).hashes).all()
    n_bytes = sum(len(text.encode()) for text in texts)
    assert 0.3 < len(found.hashes) * WINDOW / n_bytes < 3
    assert len(np.unique(found.hashes)) >= 0.9 * len(windows([prose(seed) for seed in set(seeds)]).hashes)


def test_nothing_to_compare() -> None:
    assert len(windows([]).hashes) == len(windows(["", "x" * 63]).hashes) == 0
    nothing = Overlap()
    assert nothing.near_duplicates([(windows([prose(1)]), [False])]) == 0


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.3, 0), (0.7, 1), (1.0, 1)])
def test_half_of_the_text_decides(share: float, expected: int) -> None:
    ours, theirs = prose(1, 2000).split(" "), prose(2, 2000).split(" ")
    mixed = " ".join(ours[: int(share * 2000)] + theirs[int(share * 2000) :])
    found = Overlap()
    found.add_validation(windows([prose(3), mixed]), [False, True])
    assert found.judged == 1
    assert found.near_duplicates([(windows([prose(3), mixed]), [False, True])]) == 0  # not of itself
    assert found.near_duplicates([(windows([prose(4), "preface " + " ".join(ours)]), [False, False])]) == expected


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MOST", 100)
    found = Overlap()
    for seed in range(50):
        found.add_validation(windows([prose(seed)]), [True])
    assert 2 < found.judged < 20
    assert found.near_duplicates([(windows([prose(seed) for seed in range(50)]), [False] * 50)]) == found.judged


def test_near_duplicates_across_the_split_are_told(tmp_path: Path) -> None:
    """Each text once more with another line on top, which by its hash falls to either side."""
    (tmp_path / "corpus").mkdir()
    for number in range(60):
        for edition in range(2):
            file = tmp_path / "corpus" / f"{number:02}-{edition}.txt"
            file.write_text(f"edition {edition} of {number}\n" + prose(number, 20_000))
    settings = {"validation_fraction": 0.3, "processes": 2, "shards_dir": tmp_path / "shards"}
    sources = {"text": LocalText(path=str(tmp_path / "corpus"), max_document_bytes=None)}
    manifest = prepare(sources, ByteTokenizer(), **settings)
    n = manifest.splits["val"]["text"].documents
    told = told_overlap(manifest.folder)
    assert told is not None
    near = int(told.split(" of ")[0])
    assert f"of {n} validation documents" in told
    assert 0.4 * n < near < n
    apart = prepare(sources, ByteTokenizer(), validation="*-1.txt", **settings)  # every text is on both sides
    assert "60 of 60 validation documents" in str(told_overlap(apart.folder))
    clean = {"text": LocalText(path=str(tmp_path / "corpus" / "00-0.txt"))}
    assert told_overlap(prepare(clean, ByteTokenizer(), **settings).folder) is None
