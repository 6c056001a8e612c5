import gzip
import itertools
import json
import os
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thunderhead.core.config import supplied_names
from thunderhead.corpus.sources import LocalText, StandardLibrary


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def joined(source: LocalText) -> str:
    return "".join(text for _, text in source.documents())


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_plain_file_is_read_unchanged(tmp_path: Path, suffix: str, compression: str) -> None:
    text = "first\r\nsecond naïve\n\n" * 500 + "no end of line"
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](text.encode()))
    source = LocalText(path=str(tmp_path), max_document_bytes=1000)
    source.check()
    parts = [document.text for document in source.documents()]
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(len(part.encode()) <= 1000 for part in parts)
    assert all(part.endswith("\n") for part in parts[:-1])


@pytest.mark.parametrize("compression", COMPRESS)
def test_each_jsonl_record_is_a_document(tmp_path: Path, compression: str) -> None:
    texts = ["one", "zwei\nZeilen", "x" * 5_000, "\ud800 half of a pair"]
    lines = [json.dumps({"body": text}) for text in texts] + [json.dumps({"body": None}), ""]
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(COMPRESS[compression]("\n".join(lines).encode()))
    source = LocalText(path=str(file), text_field="body")
    source.check()
    assert [text for _, text in source.documents()] == [*texts[:3], "\ufffd\ufffd\ufffd half of a pair"]
    assert all(
        len(text.encode()) <= 64
        for _, text in LocalText(path=str(file), text_field="body", max_document_bytes=64).documents()
    )


def test_each_parquet_row_is_a_document(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"text": [*texts, None], "other": range(1001)}), tmp_path / "a.parquet", row_group_size=300)
    source = LocalText(path=str(tmp_path))
    source.check()
    assert [text for _, text in source.documents()] == texts
    assert os.listdir(tmp_path) == ["a.parquet"]  # litdata's own reader would write an index beside it


def test_progress_adds_up_to_the_bytes_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 50_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"line\n" * 50_000))
    pq.write_table(pa.table({"text": ["row"] * 1000}), tmp_path / "c.parquet")
    source = LocalText(path=str(tmp_path))
    told: list[int] = []
    for _ in source.documents(told.append):
        pass
    assert sum(told) == source.disk_bytes()


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/a.txt", ".hidden.txt", ".git/x.txt", "c.bin", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    source = LocalText(path=str(tmp_path))
    assert [text for _, text in source.documents()] == ["a.md", "b.txt", "sub/a.txt"]
    assert joined(LocalText(path=str(tmp_path), suffixes=[".md"])) == "a.md"


def test_memory_is_flat_in_the_size_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(("word " * 20 + "\n") * 200_000)  # 20 MB
    documents = LocalText(path=str(tmp_path)).documents()
    next(documents)
    tracemalloc.start()
    for _ in documents:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


BAD = {
    "missing": (lambda folder: None, "corpsu", r"does not exist: did you mean .*corpus\?"),
    "empty file": (lambda folder: (folder / "a.txt").write_text(""), "corpus/a.txt", "is empty"),
    "empty folder": (lambda folder: None, "corpus", "folder without any readable file"),
    "unknown suffix": (lambda folder: (folder / "a.pdf").write_text("x"), "corpus/a.pdf", r"names must end in \.txt"),
    "packed parquet": (lambda folder: (folder / "a.parquet.gz").write_text("x"), "corpus", "without any readable file"),
    "NUL": (lambda folder: (folder / "a.txt").write_bytes(b"abc\n\0"), "corpus", r"a\.txt: binary.*NUL at byte 4"),
    "not UTF-8": (
        lambda folder: (folder / "a.txt").write_bytes("é\nnaïve".encode("latin-1")),
        "corpus",
        r"a\.txt: not UTF-8 text .*at byte 0",
    ),
    "cut UTF-8": (
        lambda folder: (folder / "a.txt").write_bytes(b"ab\xc3"),
        "corpus",
        r"unexpected end of data at byte 2",
    ),
    "not gzip": (lambda folder: (folder / "a.txt.gz").write_text("plain"), "corpus", r"a\.txt\.gz: damaged"),
    "cut gzip": (
        lambda folder: (folder / "a.txt.gz").write_bytes(gzip.compress(os.urandom(999).hex().encode())[:-200]),
        "corpus",
        r"a\.txt\.gz: damaged",
    ),
    "cut zstd": (
        lambda folder: (folder / "a.txt.zst").write_bytes(zstd(os.urandom(999).hex().encode())[:-200]),
        "corpus",
        r"a\.txt\.zst: damaged",
    ),
    "not zstd": (lambda folder: (folder / "a.txt.zst").write_text("plain"), "corpus", r"a\.txt\.zst: damaged"),
    "not parquet": (lambda folder: (folder / "a.parquet").write_text("plain"), "corpus", r"a\.parquet: damaged"),
    "not JSON": (lambda folder: (folder / "a.jsonl").write_text("{"), "corpus", r"a\.jsonl, line 1: not JSON"),
    "no object": (
        lambda folder: (folder / "a.jsonl").write_text("[1]"),
        "corpus",
        "an? JSON object is needed, found list",
    ),
    "no field": (
        lambda folder: (folder / "a.jsonl").write_text('{"body": "x"}'),
        "corpus",
        "no field text_field=text; there are: body",
    ),
    "no text": (lambda folder: (folder / "a.jsonl").write_text('{"text": 1}'), "corpus", "text is int, not text"),
    "no column": (
        lambda folder: pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet"),
        "corpus",
        "no field text_field=text; there are: body",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_up_front_in_one_line(tmp_path: Path, case: str) -> None:
    write, path, message = BAD[case]
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus")
    source = LocalText(path=str(tmp_path / path))
    with pytest.raises(ValueError, match=message) as caught:
        source.check()
    assert "\n" not in str(caught.value)


def test_the_offset_of_a_bad_byte_far_into_a_file(tmp_path: Path) -> None:
    good = "naïve\n".encode() * 100_000
    (tmp_path / "a.txt").write_bytes(good + b"\xff")
    with pytest.raises(ValueError, match=f"at byte {len(good)}"):
        list(LocalText(path=str(tmp_path)).documents())


def test_the_fingerprint_changes_with_files_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = LocalText(path=str(tmp_path))
    prints = [source.fingerprint()]
    assert source.fingerprint() == prints[0]
    os.utime(file, ns=(1, 1))
    prints.append(source.fingerprint())
    file.rename(tmp_path / "b.txt")
    prints.append(source.fingerprint())
    prints.append(LocalText(path=str(tmp_path), max_document_bytes=None).fingerprint())
    assert len({json.dumps(fingerprint) for fingerprint in prints}) == 4
    json.dumps(prints)


def test_the_standard_library() -> None:
    names = [
        document.id
        for document in itertools.islice(StandardLibrary(include_code=True, include_topics=False).documents(), 50)
    ]
    assert names[:1] == ["__future__.py"]
    assert names == sorted(names)
    code = StandardLibrary(include_code=True, include_topics=False)._files()
    both = StandardLibrary(include_code=True, include_topics=True)
    assert 600 < len(code) < 1000
    assert len(both._files()) == len(code) + 1  # the file of topics is prose, never code
    assert not any("test" in Path(name).parts or "site-packages" in name for name, _ in code)
    assert both.fingerprint()["python"].endswith(sysconfig.get_config_var("py_version"))
    assert 5e6 < both.disk_bytes() < 30e6


def test_the_topics_are_prose_one_document_each() -> None:
    source = StandardLibrary(include_code=False, include_topics=True)
    source.check()
    documents = {document.id: document.text for document in source.documents()}
    assert 50 < len(documents) < 200
    assert "assert" in documents["topics/assert"]
    assert not any("topics = {" in text for text in documents.values())


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="both false"):
        StandardLibrary(include_code=False, include_topics=False)


def test_the_code_supplies_nothing() -> None:
    for source in (StandardLibrary, LocalText):
        assert supplied_names(source) == []


def test_several_zstd_frames_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one\n") + zstd(b"two\n"))
    assert joined(LocalText(path=str(tmp_path))) == "one\ntwo\n"
