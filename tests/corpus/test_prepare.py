import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import killed_preparation
import numpy as np
import pytest
from killed_preparation import Killable, count
from long_words import LongWords

from shard_fixtures import digest_of, find_manifest
from thunderhead.core.data.manifest import Manifest, MissingFileError, ShardError
from thunderhead.core.tokenizer import Tokens
from thunderhead.corpus import batches, passes
from thunderhead.corpus.batch_processing import UselessError
from thunderhead.corpus.batches import Batches
from thunderhead.corpus.curation import Length
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.sources import Document, LocalText, check_sources
from thunderhead.corpus.split import is_validation
from thunderhead.corpus.stages import Stages
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer

MakeShards = Callable[..., Manifest]


def test_the_same_text_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    sources = {"text": LocalText(path=str(corpus))}
    digests = []
    for place in ("one", "two"):
        tokenizer = BpeTokenizer(vocab_size=300)
        manifest = prepare(sources, tokenizer, shards_dir=tmp_path / place, validation_fraction=0.2, chunk_bytes=5000)
        verify(manifest)
        digests.append(digest_of(manifest.folder))
    assert digests[0] == digests[1]
    assert {"manifest.json", "tokenizer.json", "text/train/chunk-0-0.bin", "text/val/index.json"} <= set(digests[0])


def test_prepared_once_and_found_again(make_shards: MakeShards, corpus: Path, tmp_path: Path) -> None:
    manifest = make_shards()
    before = {file: file.stat().st_mtime_ns for file in manifest.folder.rglob("*")}
    assert make_shards() == manifest
    assert {file: file.stat().st_mtime_ns for file in manifest.folder.rglob("*")} == before
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2, "chunk_bytes": 20_000}
    sources = {"text": LocalText(path=str(corpus))}
    assert find_manifest(sources, ByteTokenizer(), **settings) == manifest
    # Anything that would give other shards is looked for elsewhere.
    assert find_manifest(sources, BpeTokenizer(vocab_size=300), **settings) is None
    assert find_manifest(sources, ByteTokenizer(), **{**settings, "validation_fraction": 0.1}) is None
    assert find_manifest({"other": sources["text"]}, ByteTokenizer(), **settings) is None
    (corpus / "000.txt").write_text("new")
    assert find_manifest(sources, ByteTokenizer(), **settings) is None


def test_looking_up_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    sources = {"text": LocalText(path=str(corpus))}
    assert find_manifest(sources, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.1) is None
    assert not (tmp_path / "shards").exists()


def test_documents_are_split_by_their_text(make_shards: MakeShards, corpus: Path) -> None:
    (corpus / "copy.txt").write_text((corpus / "000.txt").read_text())
    manifest = make_shards()
    tokenizer = manifest.load_tokenizer()
    written: dict[str, list[str]] = {}
    for split in ("train", "val"):
        ids = []
        for chunk in manifest.splits[split]["text"].chunks:
            raw = (manifest.shard_folder(split, "text") / chunk.filename).read_bytes()
            ids += memoryview(raw)[4 * (chunk.documents + 2) :].cast("H").tolist()
        written[split] = tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    texts = [document.text for document in LocalText(path=str(corpus)).documents()]
    assert sorted(written["train"] + written["val"]) == sorted(texts)
    assert not set(written["train"]) & set(written["val"])
    assert 3 <= len(written["val"]) <= 25  # a fifth of 61, give or take


def test_the_split_follows_the_fraction() -> None:
    held_out = sum(is_validation(str(i), 0.1) for i in range(10_000))
    assert 880 < held_out < 1120  # 1000 ± 4 standard deviations of 30
    # A larger fraction holds out more, never other documents.
    assert all(is_validation(str(i), 0.2) for i in range(1000) if is_validation(str(i), 0.1))


def test_the_tokenizer_sees_no_validation_text(tmp_path: Path) -> None:
    lines = [f"{i:05}" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    seen: list[str] = []

    class Spy(ByteTokenizer):
        name = "byte"  # by which it is found again

        def train(self, texts):
            seen.extend(texts)
            return self

    prepare({"a": LocalText(path=str(tmp_path))}, Spy(), shards_dir=tmp_path / "shards", validation_fraction=0.5)
    assert seen == [line for line in lines if not is_validation(line, 0.5)]


def test_several_sources_are_prepared_side_by_side(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text((corpus / "000.txt").read_text() * 20)
    sources = {
        "corpus": LocalText(path=str(corpus)),
        "b": LocalText(path=str(tmp_path / "b.txt"), max_document_bytes=100),
    }
    manifest = prepare(sources, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.3)
    verify(manifest)
    assert set(manifest.splits["train"]) == set(manifest.splits["val"]) == {"corpus", "b"}


def test_too_little_text_to_split_says_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only one document")
    source = LocalText(path=str(tmp_path / "a.txt"))
    with pytest.raises(
        ValueError,
        match=r"data\.sources\.a: .*validation split: set data\.validation=tail, .*raise data\.validation_fraction",
    ) as e:
        prepare({"a": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.01)
    assert "data.sources.a.max_document_bytes (now 16384)" in str(e.value)
    with pytest.raises(ValueError, match=r"training split: .*lower data\.validation_fraction"):
        prepare({"a": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.99999)
    (tmp_path / "a.txt").write_text("\ufeff")
    with pytest.raises(ValueError, match="there is no text in it"):
        prepare({"a": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", validation_fraction=0.1)
    assert [name for name in os.listdir(tmp_path / "shards") if not name.endswith(".lock")] == []


def test_what_is_wrong_with_sources_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    good = LocalText(path=str(tmp_path))
    check_sources({"a": good}, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        check_sources({})
    with pytest.raises(ValueError, match=r"data\.path=other is used by no source"):
        check_sources({"a": good}, path="other")
    with pytest.raises(ValueError, match=r"data\.sources\.\.\./x: use letters"):
        check_sources({"../x": good})
    with pytest.raises(ValueError, match=r"data\.sources\.a\.path=nowhere does not exist"):
        check_sources({"a": LocalText(path="nowhere")})
    with pytest.raises(ValueError, match=r"data\.sources\.a\.path=nowhere does not exist"):
        find_manifest({"a": LocalText(path="nowhere")}, ByteTokenizer(), shards_dir=tmp_path, validation_fraction=0.1)


def test_a_bad_byte_late_in_a_file_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    (corpus / "zzz.txt").write_bytes(b"fine line\n" * 50_000 + b"\0")
    for tokenizer in (ByteTokenizer(), BpeTokenizer(vocab_size=300)):
        with pytest.raises(ValueError, match=r"data\.sources\.text: .*zzz\.txt: binary.* byte 500000"):
            prepare(
                {"text": LocalText(path=str(corpus))},
                tokenizer,
                shards_dir=tmp_path / "shards",
                validation_fraction=0.2,
            )
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / "shards"))


def test_every_file_that_cannot_be_read_is_named_before_work_starts(corpus: Path, tmp_path: Path) -> None:
    class Untouched(ByteTokenizer):
        name = "byte"

        def train(self, texts: Any) -> ByteTokenizer:
            raise AssertionError("work has begun")

    for name in ("000.txt", "zzz.txt"):
        (corpus / name).write_bytes(b"fine line\n" * 50_000 + b"\xff")
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2, "processes": 1}
    sources = {"one": LocalText(path=str(corpus)), "two": LocalText(path=str(corpus / "zzz.txt"))}
    named = r"data\.sources\.one: .*000\.txt: .*zzz\.txt: .*data\.sources\.two: "
    with pytest.raises(ValueError, match=named) as caught:
        prepare(sources, Untouched(), **settings)
    assert "\n" not in str(caught.value)

    manifest = prepare({"text": LocalText(path=str(corpus), on_error="skip")}, ByteTokenizer(), **settings)
    verify(manifest)
    reading = json.loads((manifest.folder / "reading.json").read_bytes())["sources"]["text"]
    assert [(row["file"], row["documents"]) for row in reading["skipped"]] == [("000.txt", 1), ("zzz.txt", 1)]
    assert reading["read"] == {".txt": len(list(corpus.iterdir()))}


def test_finished_work_is_kept_when_something_fails_late(corpus: Path, tmp_path: Path) -> None:
    """As a stream from the network may: the next call goes on where this one was, with the same result."""
    for number in range(100, 120):
        (corpus / f"{number}.txt").write_text(f"line {number}\n" * 40_000)

    class Failing(LocalText):
        fails = True

        def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
            for number, document in enumerate(super().documents(on_read)):
                if self.fails and number > 350:
                    raise ValueError("the source broke off")
                yield document

        def _settings(self, *names: str) -> dict[str, Any]:
            return super()._settings(*names) | {"source": "LocalText"}

    source, settings = Failing(path=str(corpus)), {"validation_fraction": 0.2, "processes": 1}
    with pytest.raises(ValueError, match="broke off"):
        prepare({"text": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", **settings)
    (work,) = (tmp_path / "shards").glob(".*.preparing")
    assert (work / "encoded" / "00000").stat().st_size > 1_000_000
    source.fails = False
    prepare({"text": source}, ByteTokenizer(), shards_dir=tmp_path / "shards", **settings)
    prepare({"text": LocalText(path=str(corpus))}, ByteTokenizer(), shards_dir=tmp_path / "whole", **settings)
    assert digest_of(tmp_path / "shards") == digest_of(tmp_path / "whole")


def test_work_on_text_that_has_changed_is_thrown_away(corpus: Path, tmp_path: Path) -> None:
    """A source whose fingerprint does not tell: the next call begins anew, rather than meet the same for ever."""

    class Told(LocalText):
        breaks_off = True

        def fingerprint(self) -> dict[str, Any]:
            return {"source": "told"}

        def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
            yield from super().documents(on_read)
            if self.breaks_off:
                raise ValueError("the source broke off")

    for number in range(100, 120):
        (corpus / f"{number}.txt").write_text(f"line {number}\n" * 40_000)
    source, settings = Told(path=str(corpus)), {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    with pytest.raises(ValueError, match="broke off"):
        prepare({"text": source}, ByteTokenizer(), processes=1, **settings)
    source.breaks_off = False
    (corpus / "100.txt").write_text("other text\n" * 40_000)
    with pytest.raises(ValueError, match="text changed since the preparation"):
        prepare({"text": source}, ByteTokenizer(), processes=1, **settings)
    verify(prepare({"text": source}, ByteTokenizer(), processes=1, **settings))


def test_decisions_of_filters_that_no_longer_fit_are_thrown_away(corpus: Path, tmp_path: Path) -> None:
    decided = tmp_path / "kept"
    decided.write_bytes(b"\1" * 3)
    with pytest.raises(UselessError, match="changed while they were read"):
        list(Batches({"text": LocalText(path=str(corpus))}, kept=decided))


def test_files_that_change_meanwhile_are_noticed(corpus: Path, tmp_path: Path) -> None:
    class Meddler(ByteTokenizer):
        name = "byte"  # by which it is found again

        def train(self, texts):
            (corpus / "000.txt").write_text("changed")
            return self

    with pytest.raises(ValueError, match="changed while they were read"):
        prepare(
            {"text": LocalText(path=str(corpus))}, Meddler(), shards_dir=tmp_path / "shards", validation_fraction=0.2
        )
    assert all(name.endswith(".lock") for name in os.listdir(tmp_path / "shards"))


def test_a_foreign_folder_is_not_touched(make_shards: MakeShards) -> None:
    folder = make_shards().folder
    (folder / "manifest.json").rename(folder / "mine.txt")
    before = digest_of(folder)
    with pytest.raises(MissingFileError, match="no manifest"):
        make_shards()
    assert digest_of(folder) == before


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    processes: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "thunderhead.corpus.batches.BATCH_CHARACTERS", 5000
    )  # 16 batches: more than stay in one process
    (tmp_path / "b.txt").write_text((corpus / "000.txt").read_text() * 20)
    sources = {
        "corpus": LocalText(path=str(corpus)),
        "b": LocalText(path=str(tmp_path / "b.txt"), max_document_bytes=100),
    }
    digests = []
    for n in (1, processes):
        settings = {"shards_dir": tmp_path / str(n), "validation_fraction": 0.2, "chunk_bytes": 5000}
        manifest = prepare(sources, BpeTokenizer(vocab_size=300), processes=n, **settings)
        verify(manifest)
        digests.append(digest_of(manifest.folder))
    assert digests[0] == digests[1]


def test_after_kill_9_it_goes_on_and_writes_the_same_bytes(
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tell: Callable[..., None],
) -> None:
    monkeypatch.setattr("thunderhead.corpus.batches.BATCH_CHARACTERS", 0)  # set by what follows, and restored
    for name in (killed_preparation.LOG, killed_preparation.SECONDS):
        monkeypatch.setenv(name, "")
    for i in range(0, 60, 6):
        (corpus / f"{i:03}.txt").write_text((corpus / "001.txt").read_text())  # 10 copies
    undisturbed = killed_preparation.prepare(
        str(tmp_path / "other"), str(corpus), str(tmp_path / "undisturbed"), seconds=0, processes=1, curate=True
    )
    folder, log, shards_dir = tmp_path / "killed", tmp_path / "killed" / "log", tmp_path / "killed" / "shards"
    folder.mkdir()
    Killable(corpus, folder, seconds=0.05, processes=2, curate=True).kill_after("inspected", 30)  # of 60
    assert [path.suffix for path in sorted(shards_dir.iterdir())] == [".lock", ".preparing"]
    sources = {"text": LocalText(path=str(corpus))}
    filters = {"duplicates": killed_preparation.Deduplicate()}
    place = {"shards_dir": shards_dir, "validation_fraction": 0.2, "filters": filters}
    assert find_manifest(sources, BpeTokenizer(vocab_size=300), **place) is None
    Killable(corpus, folder, seconds=0.1, processes=1, curate=True).kill_after("encoded", 20)  # of 50
    assert find_manifest(sources, BpeTokenizer(vocab_size=300), **place) is None
    with caplog.at_level(logging.WARNING):
        manifest = killed_preparation.prepare(
            str(log), str(corpus), str(shards_dir), seconds=0, processes=1, curate=True
        )
    (said,) = (text for text in caplog.messages if "left by a preparation that was interrupted" in text)
    tell(tries=2, saw=said)
    assert digest_of(manifest.folder) == digest_of(undisturbed.folder)
    verify(manifest)
    assert manifest.curation["sources"]["text"]["kept"] == 50
    # What was under way at a kill is done again: with two processes at most 5 batches, with one 1; of 4 or 5 documents.
    assert 60 <= count(log, "inspected") <= 60 + 5 * 5
    assert count(log, "trained") == 1
    assert 50 <= count(log, "encoded") <= 50 + 5
    assert [path for path in shards_dir.iterdir() if path.suffix == ".preparing"] == []


def test_ctrl_c_keeps_what_was_done(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(ByteTokenizer):
        name = "byte"  # by which it is found again

        def encode_batch(self, texts):
            raise KeyboardInterrupt

    settings = {"shards_dir": tmp_path, "validation_fraction": 0.2}
    with pytest.raises(KeyboardInterrupt):
        prepare({"text": LocalText(path=str(corpus))}, Interrupted(), **settings)
    (work,) = tmp_path.glob(".*.preparing")
    assert (work / "tokenizer.json").exists()
    assert f"kept in {work}: the same command goes on" in caplog.text
    prepare({"text": LocalText(path=str(corpus))}, ByteTokenizer(), **settings)
    assert not work.exists()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "of other content": lambda file: file.write_bytes(b"{}" + bytes(file.stat().st_size)),
    "gone": lambda file: file.unlink(),
}


def test_what_a_killed_preparation_left_is_made_again_where_it_is_damaged(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(place: Path) -> Manifest:
        return prepare(
            {"text": LocalText(path=str(corpus))},
            BpeTokenizer(vocab_size=300),
            shards_dir=place,
            validation_fraction=0.2,
            filters={"length": Length(min_bytes=2)},
            near_duplicates_together=True,
            processes=1,
        )

    expected = digest_of(make(tmp_path / "undisturbed").folder)
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "_write", Mock(side_effect=OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            make(tmp_path / "killed")
    (work,) = (tmp_path / "killed").glob(".*.preparing")
    left = [str(file.relative_to(work)) for file in work.rglob("*") if file.is_file()]
    assert {"begun.json", "curation.json", "kept", "sides", "tokenizer.json"} <= {*left}
    for name, (kind, damage) in itertools.product(left, DAMAGE.items()):
        place = tmp_path / f"{name}, {kind}".replace("/", "-")
        shutil.copytree(work.parent, place)
        damage(place / work.name / name)
        assert digest_of(make(place).folder) == expected, (name, kind)


def test_shards_lie_in_the_folder_of_their_name(make_shards: MakeShards, corpus: Path) -> None:
    one = make_shards()
    (corpus / "000.txt").write_text("another text")
    other = make_shards()
    shutil.rmtree(other.folder)
    one.folder.rename(other.folder)  # as if it were shards of the other corpus
    with pytest.raises(ShardError, match=f"{other.key} holds {one.key}"):
        make_shards()
    shutil.rmtree(other.folder)
    other.folder.write_text("in the way")
    with pytest.raises(ShardError, match=f"{other.key} is a file"):
        make_shards()


def test_a_folder_of_work_that_is_removed_is_named(corpus: Path, tmp_path: Path) -> None:
    class Cleaned(ByteTokenizer):
        name = "byte"  # by which it is found again

        def encode_batch(self, texts):
            shutil.rmtree(tmp_path / "shards")
            return super().encode_batch(texts)

    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2, "processes": 1}
    with pytest.raises(ValueError, match=r"\.preparing was removed meanwhile"):
        prepare({"text": LocalText(path=str(corpus))}, Cleaned(), **settings)
    assert prepare({"text": LocalText(path=str(corpus))}, ByteTokenizer(), **settings)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_goes_away_meanwhile_is_named(on_error: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not left out: it may be there again when its file system is."""
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 0)
    found = iter(Batches({"text": LocalText(path=str(corpus), on_error=on_error)}))
    next(found)
    (corpus / "059.txt").unlink()
    with pytest.raises(ValueError, match=r"^data\.sources\.text: .*059\.txt is gone since"):
        list(found)


def test_a_kill_before_it_was_said_what_is_begun(make_shards: MakeShards) -> None:
    manifest = make_shards()
    shutil.rmtree(manifest.folder)
    (work := manifest.folder.parent / f".{manifest.key}.preparing").mkdir()
    assert make_shards() == manifest
    assert not work.exists()


def test_of_two_processes_one_prepares_and_the_other_waits(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Killable(corpus, tmp_path, seconds=0.1)
    other.wait_for("encoded", 1)
    with caplog.at_level(logging.WARNING):
        manifest = prepare(
            {"text": LocalText(path=str(corpus))},
            BpeTokenizer(vocab_size=300),
            shards_dir=tmp_path / "shards",
            validation_fraction=0.2,
        )
    assert other.process.wait() == 0
    assert count(tmp_path / "log", "encoded") == 60
    assert "waiting for it" in caplog.text
    verify(manifest)


@pytest.mark.parametrize("processes", [1, 2])
def test_filtered_documents_are_nowhere_and_reported(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thunderhead.corpus.batches.BATCH_CHARACTERS", 40)
    texts = [f"{i:03} " + ("long" * 100 if i % 4 == 0 else "word") for i in range(100)]
    for name, part in (("a", texts[:60]), ("b", texts[60:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    sources = {name: LocalText(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    trained_on: list[str] = []

    class Spy(ByteTokenizer):
        name = "byte"  # by which it is found again

        def train(self, texts):
            trained_on.extend(texts)
            return ByteTokenizer()

    words, ends = LongWords(10), LongWords(4)
    filters = {"words": words, "never": ends}
    place = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    manifest = prepare(sources, Spy(), filters=filters, processes=processes, **place)
    verify(manifest)
    kept = [text for i, text in enumerate(texts) if i % 4 != 0]
    assert trained_on == [text for text in kept if not is_validation(text, 0.2)]
    written = sum(shard.documents for split in manifest.splits.values() for shard in split.values())
    assert written == len(kept) == 75
    assert sum(shard.bytes for split in manifest.splits.values() for shard in split.values()) == 75 * 8
    assert words.asked == 100
    assert ends.asked == 75  # what is gone, later filters never hear of
    report = json.loads((manifest.folder / "curation.json").read_text())
    first = {"id": "a.jsonl:1#0", "excerpt": texts[0][:300]}
    removed = report["sources"]["a"]["removed"]["words: words > 10"]
    assert report["sources"]["a"] == {"documents": 60, "kept": 45, "removed": {"words: words > 10": removed}}
    assert (removed["documents"], removed["bytes"], len(removed["examples"])) == (15, 15 * 404, 5)
    assert removed["examples"][0] == first
    assert report["sources"]["b"]["kept"] == 30
    assert manifest.curation == {"filters": {"words": {"longest": 10}, "never": {"longest": 4}}, **report}
    # Found again by the filters' settings, and by nothing else.
    assert find_manifest(sources, ByteTokenizer(), filters=filters, **place) == manifest
    assert find_manifest(sources, ByteTokenizer(), **place) is None
    assert find_manifest(sources, ByteTokenizer(), filters={"words": words}, **place) is None
    assert find_manifest(sources, ByteTokenizer(), filters={**filters, "words": LongWords(11)}, **place) is None


def test_filters_that_keep_nothing_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.sources\.text: curation\.filters keep none of its documents$"):
        prepare(
            {"text": LocalText(path=str(corpus))},
            ByteTokenizer(),
            filters={"all": LongWords(1)},
            shards_dir=tmp_path / "shards",
            validation_fraction=0.2,
        )


def test_without_filters_there_is_no_report(make_shards: MakeShards) -> None:
    manifest = make_shards()
    assert manifest.curation is None
    assert not (manifest.folder / "curation.json").exists()


def test_preparing_in_a_thread_works(make_shards: MakeShards) -> None:
    thread = threading.Thread(target=make_shards)
    thread.start()
    thread.join()
    verify(make_shards())


def test_a_rank_of_a_distributed_run_writes_the_same_names(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    manifest = make_shards()
    assert manifest.splits["train"]["text"].chunks[0].filename == "chunk-0-0.bin"
    verify(manifest)


class Marking(ByteTokenizer):
    """One of somebody else's, which takes a character for the end of a document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        marked = super().encode_batch(texts)
        return [np.where(tokens == ord("|"), np.uint16(self.eos_id), tokens) for tokens in marked]


def test_an_end_inside_of_a_document_is_refused_by_its_name(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}.txt").write_text(f"text {i}" + ("|" if i in (17, 30) else ""))  # the last token is its own
    settings = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2}
    with pytest.raises(ValueError, match=r"^data\.sources\.mine: 17\.txt#0: .* end of document.*tokenizer\.eos="):
        prepare({"mine": LocalText(path=str(texts))}, Marking(), **settings)
    assert not list(tmp_path.glob("shards/*/manifest.json"))
    for i in (17, 30):
        (texts / f"{i}.txt").unlink()
    assert prepare({"mine": LocalText(path=str(texts))}, Marking(), **settings).eos_id == 256


def test_progress_is_told_in_a_pipe(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes, "TELL_SECONDS", 0.0)
    for number in range(100, 110):
        (corpus / f"{number}.txt").write_text(f"line {number}\n" * 20_000)
    source = {"text": LocalText(path=str(corpus))}
    looking = {"filters": {"length": Length(min_bytes=1)}, "near_duplicates_together": True}
    settings = {"shards_dir": tmp_path, "validation_fraction": 0.2, "processes": 1}
    prepare(source, BpeTokenizer(vocab_size=300), **settings, **looking)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines if "100 %" in line or "99 %" in line][-1] == "Tokenizing"
    looks = ["Curating", "Deciding", "Comparing", "Joining near duplicates"]
    told = [line.split(":")[0].strip() for line in lines]
    assert list(dict.fromkeys(told)) == ["Checking", *looks, "Training the tokenizer", "Tokenizing"]
    assert "M tokens" in lines[-1]
