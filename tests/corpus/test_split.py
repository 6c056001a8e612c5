import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core.data.manifest import Manifest, SplitName
from thunderhead.corpus.curation import Length
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.sources import Document, LocalText, Source
from thunderhead.corpus.split import Split, file_of, is_validation
from thunderhead.corpus.trained_tokenizers import ByteTokenizer


class Texts(Source):
    """Documents as they are given."""

    def __init__(self, *texts: str, keeps_whole: bool = False):
        self.texts, self.keeps_whole = texts, keeps_whole

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def documents(self, on_read: Any = None) -> Any:
        return (Document(f"a.txt#{n}", text) for n, text in enumerate(self.texts))

    def disk_bytes(self) -> int:
        return 0

    def check(self) -> None: ...


def sides(manifest: Manifest, source: str = "text") -> dict[SplitName, str]:
    """The text of each side, EOS left out."""
    found: dict[SplitName, str] = {}
    tokenizer = ByteTokenizer()
    for split in ("train", "val"):
        text = b""
        for chunk in manifest.splits[split][source].chunks:
            raw = (manifest.shard_folder(split, source) / chunk.filename).read_bytes()
            tokens = np.frombuffer(raw[chunk.bytes - 2 * chunk.tokens :], dtype=np.uint16)
            text += bytes(tokens[tokens != tokenizer.eos_id].astype(np.uint8))
        found[split] = text.decode()
    return found


def made(tmp_path: Path, folder: Path, **settings: Any) -> Manifest:
    split = {name: settings.pop(name) for name in ("validation", "validation_fraction") if name in settings}
    source = LocalText(path=str(folder), **settings)
    split = {"validation_fraction": 0.2, **split}
    return prepare({"text": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", processes=1, **split)


@given(st.lists(st.text(min_size=1)), st.floats(0.01, 0.99))
def test_the_tail_is_the_last_fraction_of_the_characters(texts: list[str], fraction: float) -> None:
    """As in nanoGPT's shakespeare_char: data[:int(n * 0.9)] and data[int(n * 0.9):]."""
    whole = "".join(texts)
    source = Texts(*texts)
    split = Split("tail", fraction)
    divided = list(split.divide(source.documents(), source, split.trained_on(len(whole))))
    border = int(len(whole) * (1 - fraction))
    assert "".join(document.text for document, held_out in divided if not held_out) == whole[:border]
    assert "".join(document.text for document, held_out in divided if held_out) == whole[border:]
    assert [held_out for _, held_out in divided] == sorted(held_out for _, held_out in divided)


@given(st.lists(st.text(min_size=1), min_size=1))
def test_pieces_of_a_text_follow_the_first(texts: list[str]) -> None:
    whole, pieces = Texts(*texts, keeps_whole=True), Texts(*texts)
    split = Split("hash", 0.5)
    assert {held for _, held in split.divide(whole.documents(), whole, None)} == {is_validation(texts[0], 0.5)}
    assert [h for _, h in split.divide(pieces.documents(), pieces, None)] == [is_validation(t, 0.5) for t in texts]


@pytest.mark.parametrize(
    ("document_id", "file"),
    [("a/b.txt#0", "a/b.txt"), ("lines.jsonl:12#3", "lines.jsonl"), ("train:7#0", "train"), ("topics/if", "topics/if")],
)
def test_the_file_of_a_document(document_id: str, file: str) -> None:
    assert file_of(document_id) == file


def write_books(folder: Path, n: int, kind: str = "txt") -> list[str]:
    """Books of 40 KB, more than one document each."""
    folder.mkdir()
    texts = [f"book {number}, and so on\n" * 2000 for number in range(n)]
    for number, text in enumerate(texts):
        if kind == "txt":
            (folder / f"{number:03}.txt").write_text(text)
        else:
            with open(folder / "all.jsonl", "a") as file:
                file.write(json.dumps({"text": text}) + "\n")
    return texts


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_files_and_records_stay_whole_on_one_side(tmp_path: Path, kind: str) -> None:
    texts = write_books(tmp_path / "corpus", 50, kind)
    manifest = made(tmp_path, tmp_path / "corpus")
    found = sides(manifest)
    assert sorted(map(len, found.values()))[0] > 0
    for text in texts:
        assert (text in found["train"]) != (text in found["val"])
    assert manifest.splits["train"]["text"].documents > 2 * 30  # they are cut none the less


def test_few_files_are_divided_and_on_request_kept_whole(tmp_path: Path) -> None:
    texts = write_books(tmp_path / "corpus", 20)
    found = sides(made(tmp_path, tmp_path / "corpus"))
    assert any(text not in found["train"] and text not in found["val"] for text in texts)
    found = sides(made(tmp_path, tmp_path / "corpus", split_by="document"))
    assert all((text in found["train"]) != (text in found["val"]) for text in texts)


def test_a_file_that_is_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in ("train.txt", "valid.txt", "sub/valid.txt", "sub/other.txt"):
        (folder / name).write_text(f"{name}\n" * 3000)
    found = sides(made(tmp_path, folder, validation="valid*.txt"))
    assert set(found["val"].split()) == {"valid.txt", "sub/valid.txt"}
    assert set(found["train"].split()) == {"train.txt", "sub/other.txt"}
    assert set(sides(made(tmp_path, folder, validation="sub/*"))["val"].split()) == {"sub/valid.txt", "sub/other.txt"}
    with pytest.raises(ValueError, match=r"data\.validation=test\.txt must match"):
        made(tmp_path, folder, validation="test.txt")
    assert not [entry for entry in (tmp_path / "shards").iterdir() if entry.name.endswith(".preparing")]


@pytest.mark.parametrize("fraction", [0.1, 0.05])
def test_a_published_split_is_reproduced(tmp_path: Path, fraction: float) -> None:
    """The last 10 % of one file, in pieces or whole, whatever the bytes of its characters."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    text = "".join(f"Zeile {n}: schön, 数 and so on\n" for n in range(3000))
    (folder / "input.txt").write_text(text)
    for max_document_bytes in (None, 1000):
        settings = {"max_document_bytes": max_document_bytes, "validation_fraction": fraction}
        found = sides(made(tmp_path, folder, validation="tail", **settings))
        assert found == {
            "train": text[: int(len(text) * (1 - fraction))],
            "val": text[int(len(text) * (1 - fraction)) :],
        }


def test_the_tail_of_a_source_of_which_filters_keep_nothing(tmp_path: Path) -> None:
    for name, text in (("long", "some text " * 100), ("short", "some text")):
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {name: LocalText(path=str(tmp_path / f"{name}.txt")) for name in ("long", "short")}
    settings = {"validation": "tail", "validation_fraction": 0.1, "filters": {"length": Length(min_bytes=100)}}
    with pytest.raises(ValueError, match=r"^data\.sources\.short: curation\.filters keep none of its documents"):
        prepare(sources, ByteTokenizer(), shards_dir=tmp_path / "shards", processes=1, **settings)


def test_each_rule_is_a_corpus_of_its_own(tmp_path: Path) -> None:
    write_books(tmp_path / "corpus", 10)
    keys = {
        made(tmp_path, tmp_path / "corpus", validation=rule).key for rule in ("hash", "tail", "00[12].txt", "003.txt")
    }
    assert len(keys) == 4
