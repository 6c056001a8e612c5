"""Near duplicates, and pieces of a document, on one side of the split."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thunderhead.corpus.batch_processing import Record
from thunderhead.corpus.deduplication import NearDuplicates, shingles
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.sides import Relate, settle
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.split import is_validation
from thunderhead.corpus.trained_tokenizers import ByteTokenizer


def texts(n: int, families: int) -> list[str]:
    """Texts of 200 random words; each is of a family, each with one word of its own: they share 186 of 206 5-grams."""
    draw = random.Random(5)
    first = [[str(draw.randrange(9000)) for _ in range(200)] for _ in range(families)]
    found = []
    for number in range(n):
        words = list(first[draw.randrange(families)])
        words[draw.randrange(200)] = f"x{number}"
        found.append(" ".join(words))
    return found


def records(batches: list[tuple[str, list[str], list[str], list[bool]]]) -> list[Record]:
    return [Record(source, ids, held_out, 0, 0, Relate()(documents)) for source, ids, documents, held_out in batches]


def settled(found: list[Record], whole: dict[str, bool], folder: Path) -> list[int]:
    settle(lambda: iter(found), whole, folder / "sides", folder)
    assert [path.name for path in folder.iterdir()] == ["sides"]
    return list((folder / "sides").read_bytes())


def test_a_family_is_on_the_side_of_its_first(tmp_path: Path) -> None:
    """All pairs of similarity ≥ 0.9 are found (see test_deduplication), others by families of such."""
    documents = texts(200, 40)
    held_out = [is_validation(text, 0.3) for text in documents]
    ids = [f"{number}.txt#0" for number in range(200)]
    batches = [("a", ids[:90], documents[:90], held_out[:90]), ("b", ids[90:], documents[90:], held_out[90:])]
    found = settled(records(batches), {"a": True, "b": False}, tmp_path)
    assert found != held_out
    sets = [shingles(text, 5) for text in documents]
    family = list(range(200))
    for later in range(200):
        for earlier in range(later):
            if len(sets[later] & sets[earlier]) / len(sets[later] | sets[earlier]) > 0.75:
                family[later] = family[earlier]
                break
    assert len(set(family)) == 40
    assert found == [held_out[first] for first in family]


def test_pieces_follow_the_first_piece_whatever_they_resemble(tmp_path: Path) -> None:
    """b#1 is near a#0: all of b goes where a is; in a source that is not kept whole, only that piece does."""
    one, two, three = (" ".join(f"{letter}{number}" for number in range(200)) for letter in "abc")
    near = one.replace(one.split()[3], "other", 1)
    batches = [("s", ["a#0", "b#0", "b#1", "c#0"], [one, two, near, three], [True, False, False, False])]
    assert settled(records(batches), {"s": True}, tmp_path) == [1, 1, 1, 0]
    (tmp_path / "sides").unlink()
    assert settled(records(batches), {"s": False}, tmp_path) == [1, 0, 1, 0]


def test_no_documents(tmp_path: Path) -> None:
    assert settled([], {"s": True}, tmp_path) == []


def test_in_the_shards_no_near_duplicate_is_on_the_other_side(tmp_path: Path) -> None:
    documents = texts(300, 60)
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    made_from = ({"text": LocalText(path=str(file))}, ByteTokenizer())
    place = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.3, "processes": 1}
    apart, together = prepare(*made_from, **place), prepare(*made_from, **place, near_duplicates_together=True)
    assert apart.key != together.key
    assert "near duplicates" in together.split_rule
    counts = {}
    for manifest in (apart, together):
        said = json.loads((manifest.folder / "reading.json").read_bytes())["validation"]
        counts[manifest.key] = said["near_duplicates"]
    assert counts[apart.key] > 10
    assert counts[together.key] == 0
    n = {split: by_source["text"].documents for split, by_source in together.splits.items()}
    assert n["train"] + n["val"] == 300
    assert n["val"] > 20


def test_a_kill_when_the_sides_are_settled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_from = ({"text": LocalText(path=str(corpus))}, ByteTokenizer())
    place = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.3, "near_duplicates_together": True}

    def settle_and_die(*arguments: Any) -> None:
        settle(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("thunderhead.corpus.sides.settle", settle_and_die)
    with pytest.raises(KeyboardInterrupt):
        prepare(*made_from, **place, processes=1)
    monkeypatch.undo()
    assert prepare(*made_from, **place, processes=1).splits["val"]["text"].documents > 0


def test_a_signature_has_as_many_numbers_as_the_rule_says() -> None:
    (signature,) = Relate()(["a text"])
    assert signature.shape == (NearDuplicates().width,)
    assert signature.dtype == np.uint32


def test_only_for_a_split_by_hash(tmp_path: Path) -> None:
    from thunderhead.core import config
    from thunderhead.core.run import build_data

    (tmp_path / "a.txt").write_text("text\n" * 100)
    overrides = ["data=text", f"data.path={tmp_path}", "data.validation=tail", "data.near_duplicates=together"]
    composed = config.plain(config.compose(overrides, "prepare"))
    data = build_data(composed | {"seed": 0}, context_length=1, sequences_per_step=1)
    (problem,) = data.problems(None)
    assert problem.path == "data.near_duplicates"
