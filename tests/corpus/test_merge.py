"""`prepare.py merge=[…]`: several folders of shards as one corpus."""

from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.data.manifest import Manifest
from thunderhead.corpus.command import prepare_corpus
from thunderhead.corpus.shard_files import verify
from thunderhead.training.record import read_summary

Prepare = Callable[..., Path]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Prepare the shards of ten documents that begin with a word."""

    def prepared(word: str, *overrides: str) -> Path:
        folder = tmp_path / "text" / word
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(10):
            (folder / f"{index}.txt").write_text(f"{word} {index} " * 40)
        lines = [f"data.path={folder}", f"data.shards_dir={tmp_path / 'shards'}", "data.validation_fraction=0.3"]
        return prepare_corpus(config.compose(["data=text", "tokenizer=byte", *lines, *overrides], "prepare")).folder

    return prepared


def merged(out: Path, *folders: Path) -> Manifest:
    return prepare_corpus(config.compose([f"merge=[{','.join(map(str, folders))}]", f"out={out}"], "prepare"))


def test_it_holds_what_its_parts_hold(prepare: Prepare, run: Callable[..., Path], tmp_path: Path) -> None:
    folders = [prepare(word) for word in ("one", "two", "three")]
    before = {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")}
    whole = merged(tmp_path / "whole", *folders)
    assert list(whole.sources) == ["text", "text-2", "text-3"]
    verify(whole)
    for folder, name in zip(folders, whole.sources, strict=True):
        part = Manifest.load(folder)
        for split in ("train", "val"):
            assert whole.splits[split][name] == part.splits[split]["text"]  # type: ignore[index]
            file, of_part = (place / split / "chunk-0-0.bin" for place in (whole.folder / name, folder / "text"))
            assert file.read_bytes() == of_part.read_bytes()
            assert file.stat().st_ino == of_part.stat().st_ino  # no copy
    assert {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*")} == before
    trained = run("data=shards", f"data.path={whole.folder}", "model.context_length=16")
    assert read_summary(trained)["steps"] == 2  # type: ignore[index]


def test_merged_shards_are_merged_again(prepare: Prepare, tmp_path: Path) -> None:
    first = merged(tmp_path / "first", prepare("one"), prepare("two"))
    again = merged(tmp_path / "again", first.folder, prepare("three"))
    assert list(again.sources) == ["text", "text-2", "text-3"]
    with pytest.raises(ConfigError, match=r"merge: text of .* is the same text as text of "):
        merged(tmp_path / "more", first.folder, prepare("one"))


def test_a_second_corpus_takes_the_tokenizer_of_the_first(prepare: Prepare, tmp_path: Path) -> None:
    one = prepare("one", "tokenizer=bpe", "tokenizer.vocab_size=260")
    two = prepare("two", "tokenizer=huggingface", f"tokenizer.path={one / 'tokenizer.json'}")
    whole = merged(tmp_path / "whole", one, two)
    assert list(whole.sources) == ["text", "text-2"]


def test_all_that_stands_in_the_way_is_told(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        prepare("one"),
        prepare("two", "data.validation_fraction=0.4", "tokenizer=bpe", "tokenizer.vocab_size=260"),
    )
    with pytest.raises(ConfigError) as refused:
        merged(tmp_path / "out", one, two)
    told = [str(problem) for problem in refused.value.problems]
    assert len(told) == 2
    assert "have different tokenizers: prepare the text of the second anew by the tokenizer of the first" in told[0]
    assert "have different parts that are held out (0.3, 0.4)" in told[1]
    with pytest.raises(ConfigError, match=r"has no manifest.json"):
        merged(tmp_path / "out", one, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"out: .* exists already"):
        merged(tmp_path, one, two)
    (two / "text" / "train" / "chunk-0-0.bin").write_bytes(b"damaged")
    three = prepare("three")
    (three / "text" / "val" / "chunk-0-0.bin").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"merge: .*chunk-0-0.bin has 7 bytes"):
        merged(tmp_path / "out", one, three)
    monkeypatch.setattr(command_line, "invocation_overrides", lambda: ["data=text", "data.path=x"])
    with pytest.raises(ConfigError, match=r"data: is decided by the merged shards"):
        merged(tmp_path / "out", one, three)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.merging"))


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"sources": {}}', '{"validation": null, "sources": null}', "folder"]
)
def test_a_reading_that_is_damaged(content: str, prepare: Prepare, tmp_path: Path) -> None:
    one, two = prepare("one"), prepare("two")
    (file := two / "reading.json").unlink()
    if content == "folder":
        file.mkdir()
    else:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^{file} is damaged \("):
        prepare("two")  # which are prepared already
    with pytest.raises(ConfigError, match=rf"^merge: {file} is damaged \("):
        merged(tmp_path / "out", one, two)
    assert not (tmp_path / "out").exists()
