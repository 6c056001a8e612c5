import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thunderhead.core.components import supplied_names
from thunderhead.corpus.python_code import InstalledPackage, StandardLibrary
from thunderhead.corpus.sources import LocalText


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


def joined(source: LocalText) -> str:
    return "".join(text for _, text in source.documents())


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".rst"])
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


@pytest.mark.parametrize("compression", ["", ".xz"])
def test_each_jsonl_record_is_a_document(tmp_path: Path, compression: str) -> None:
    texts = ["one", "zwei\nZeilen", "x" * 5_000]
    lines = [json.dumps({"body": text}) for text in texts] + [json.dumps({"body": None}), ""]
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(COMPRESS[compression]("\n".join(lines).encode()))
    source = LocalText(path=str(file), text_field="body")
    source.check()
    assert [text for _, text in source.documents()] == texts
    assert all(
        len(text.encode()) <= 64
        for _, text in LocalText(path=str(file), text_field="body", max_document_bytes=64).documents()
    )


def test_half_of_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "\\ud83d\\ude00 whole, \\ud83d half"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "\\udc00"}\n{"text": "two"}\n')
    path = str(tmp_path)
    with pytest.raises(ValueError, match=r"a.jsonl, record 2: not text.*b.jsonl, record 1: .*on_error=skip"):
        LocalText(path=path).verify(lambda _: None)
    source = LocalText(path=path, on_error="skip")
    assert [text for _, text in source.documents()] == ["one", "two"]
    assert [row["documents"] for row in source.reading()["skipped"]] == [1, 1]
    replaced = LocalText(path=path, on_error="replace").documents()
    assert [text for _, text in replaced] == ["one", "\U0001f600 whole, \ufffd half", "\ufffd", "two"]


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
    "unknown suffix": (lambda folder: (folder / "a.pdf").write_text("x"), "corpus", r"there are 1 \.pdf \(not one of"),
    "cut bz2": (
        lambda folder: (folder / "a.txt.bz2").write_bytes(bz2.compress(os.urandom(999).hex().encode())[:-200]),
        "corpus",
        r"a\.txt\.bz2: damaged",
    ),
    "cut xz": (
        lambda folder: (folder / "a.txt.xz").write_bytes(lzma.compress(os.urandom(999).hex().encode())[:-200]),
        "corpus",
        r"a\.txt\.xz: damaged",
    ),
    "not zip": (lambda folder: (folder / "a.zip").write_text("plain"), "corpus/a.zip", r"a\.zip: damaged"),
    "not tar": (lambda folder: (folder / "a.tar").write_text("plain"), "corpus/a.tar", r"a\.tar: damaged"),
    "UTF-16": (
        lambda folder: (folder / "a.txt").write_bytes("naïve".encode("utf-16")),
        "corpus",
        r"a\.txt: .*perhaps it is UTF-16, then say encoding=utf-16",
    ),
    "latin-1": (
        lambda folder: (folder / "a.txt").write_bytes(("Große Bären übten später Flöte. " * 20).encode("latin-1")),
        "corpus",
        r"a\.txt: not UTF-8 text .*: perhaps it is cp1252, then say encoding=cp1252",
    ),
    "row of a table": (
        lambda folder: (folder / "a.csv").write_text("text,n\nx\n"),
        "corpus/a.csv",
        "row 2: has 1 value",
    ),
    "column of a table": (
        lambda folder: (folder / "a.tsv").write_text("body\tn\n"),
        "corpus/a.tsv",
        "there are: body, n",
    ),
    "json": (lambda folder: (folder / "a.json").write_text('[{"text": "x"}'), "corpus/a.json", r"a\.json: not JSON"),
    "two files": (
        lambda folder: [(folder / name).write_bytes(b"\xff") for name in ("a.txt", "b.md")],
        "corpus",
        r"a\.txt: .*; .*b\.md: .*on_error=skip",
    ),
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


def test_the_fingerprint_follows_bytes_names_and_settings_not_times_or_places(tmp_path: Path) -> None:
    """Same names, sizes and times, other text: another corpus. A copy elsewhere, later: the same."""
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "a.txt"
    file.write_text("text one")
    source = LocalText(path=str(file.parent))
    first = source.fingerprint()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copy = tmp_path / "two" / "a.txt"
    os.utime(copy, ns=(1, 1))
    other = LocalText(path=str(copy.parent))
    assert other.fingerprint() == first
    copy.write_text("text two")
    status = file.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (copy.stat().st_size, copy.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    prints = [first, other.fingerprint()]
    file.rename(file.with_name("b.txt"))
    prints.append(source.fingerprint())
    changes = [{"max_document_bytes": None}, {"encoding": "latin-1"}, {"on_error": "replace"}, {"split_by": "document"}]
    prints += [LocalText(path=str(file.parent), **change).fingerprint() for change in changes]  # type: ignore[arg-type]
    assert len({json.dumps(fingerprint) for fingerprint in prints}) == len(prints)


def write_kinds(folder: Path) -> None:
    folder.mkdir()
    (folder / "list.json").write_text(json.dumps([{"text": "one"}, {"text": None}, {"text": "two"}]))
    (folder / "lines.ndjson").write_text('{"text": "three"}\n{"text": "four"}\n')
    (folder / "rows.csv").write_text('n,text\n1,"five, with ""quotes""\nand lines"\n2,six\n')
    (folder / "rows.tsv").write_text("text\tn\nseven\t1\n")
    (folder / "README").write_text("eight")
    (folder / "page.html").write_text("<title>a</title><script>b = 1</script><p>nine &amp; more</p>")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/ten.TXT", "ten")
        archive.writestr("in/picture.png", b"\x89PNG\0")
        archive.writestr("__MACOSX/._ten.TXT", b"\0\5")
        archive.writestr("in/lines.jsonl.gz", gzip.compress(b'{"text": "eleven"}'))
    with tarfile.open(folder / "b.tar.xz", "w:xz") as archive:
        for name, content in (("twelve.txt", b"twelve"), ("inner.zip", b"PK")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "twelve.txt"
        archive.addfile(link)


def test_all_kinds_of_files(tmp_path: Path) -> None:
    write_kinds(tmp_path / "corpus")
    suffixes = [".txt", ".json", ".ndjson", ".jsonl", ".csv", ".tsv", "", ".html", ".zip", ".tar"]
    source = LocalText(path=str(tmp_path / "corpus"), suffixes=suffixes)
    source.check()
    source.verify(lambda _: None)
    told: list[int] = []
    found = {document.id: document.text for document in source.documents(told.append)}
    assert found == {
        "README#0": "eight",
        "a.zip/in/ten.TXT#0": "ten",
        "a.zip/in/lines.jsonl.gz:1#0": "eleven",
        "b.tar.xz/twelve.txt#0": "twelve",
        "lines.ndjson:1#0": "three",
        "lines.ndjson:2#0": "four",
        "list.json:1#0": "one",
        "list.json:3#0": "two",
        "page.html#0": "nine & more",
        "rows.csv:2#0": 'five, with "quotes"\nand lines',
        "rows.csv:3#0": "six",
        "rows.tsv:2#0": "seven",
    }
    assert sum(told) == source.disk_bytes()
    why = "in an archive, and not one of suffixes"
    assert source.reading()["passed_over"] == [
        {"suffix": ".png", "why": why, "files": 1},
        {"suffix": ".txt", "why": "in an archive, and a link or no regular file", "files": 1},
        {"suffix": ".txt", "why": "in an archive, and hidden", "files": 1},
        {"suffix": ".zip", "why": why, "files": 1},
    ]


def test_pages_give_their_main_text(tmp_path: Path) -> None:
    prose = "".join(f"<p>Paragraph {n} of the article has a sentence or two. Here it ends.</p>" for n in range(20))
    body = f"<nav>Home | About</nav><article><h1>Title</h1>{prose}</article><footer>(c) me</footer>"
    (tmp_path / "a.HTM").write_text(f"<html><body>{body}</body></html>")
    text = joined(LocalText(path=str(tmp_path), suffixes=[".htm"]))
    assert text.startswith("Title\nParagraph 0 of the article has a sentence or two.")
    assert text.count("Paragraph") == 20
    assert "Home" not in text


def test_what_is_read_and_what_is_not_is_told(tmp_path: Path) -> None:
    write_kinds(tmp_path / "corpus")
    (tmp_path / "corpus" / "empty.md").write_text("")
    source = LocalText(path=str(tmp_path / "corpus"))
    assert [text for _, text in source.documents()] == ["three", "four"]
    reading = source.reading()
    assert reading["read"] == {".ndjson": 1}
    assert {(row["suffix"], row["why"]) for row in reading["passed_over"]} == {
        *((suffix, "not one of suffixes") for suffix in ("", ".csv", ".html", ".json", ".tar", ".tsv", ".zip")),
        (".md", "empty"),
    }


def test_suffixes_as_people_write_them(tmp_path: Path) -> None:
    suffixes = ["txt", ".JSONL.gz", "", "*.rst".removeprefix("*")]
    assert LocalText(path=str(tmp_path), suffixes=suffixes).suffixes == (".txt", ".jsonl", "", ".rst")


GOOD, BAD_BYTES = "gut und schön\n" * 40, b"ein \xe4 zuviel\n"


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.txt").write_text(GOOD)
    (folder / "mixed.txt").write_bytes(GOOD.encode() + BAD_BYTES + GOOD.encode())
    (folder / "nul.md").write_bytes(b"\x89PNG\0\0")
    (folder / "lines.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": 1}\n{\n{"text": "b"}\n')
    (folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-100])
    source = LocalText(path=str(folder), on_error="skip", max_document_bytes=64)
    source.check()
    source.verify(lambda _: None)
    texts: dict[str, str] = {}
    for document in source.documents():
        name = document.id.partition("#")[0]
        texts[name] = texts.get(name, "") + document.text
    assert texts["good.txt"] == GOOD
    assert (texts["lines.jsonl:1"], texts["lines.jsonl:5"]) == ("a", "b")
    assert texts.keys() <= {"good.txt", "mixed.txt", "lines.jsonl:1", "lines.jsonl:5", "cut.txt.gz"}
    lost = 2 * len(GOOD) - len(texts["mixed.txt"])
    assert 0 < lost < 64  # the good lines of one document
    skipped = {row["file"]: row["documents"] for row in source.reading()["skipped"]}
    assert skipped == {"mixed.txt": 1, "nul.md": 1, "lines.jsonl": 3, "cut.txt.gz": 1}

    with pytest.raises(ValueError, match=r"nul\.md: binary") as caught:
        LocalText(path=str(folder)).verify(lambda _: None)
    assert all(name in str(caught.value) for name in ("mixed.txt", "lines.jsonl", "cut.txt.gz"))  # all at once
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 3: text is int") as caught:
        LocalText(path=str(folder), on_error="replace").verify(lambda _: None)
    assert "nul.md: binary" in str(caught.value)
    assert "mixed.txt" not in str(caught.value)
    replaced = LocalText(path=str(folder / "mixed.txt"), on_error="replace")
    assert joined(replaced) == GOOD + BAD_BYTES.decode(errors="replace") + GOOD


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1251", "shift_jis", "utf-8-sig"])
def test_other_encodings_on_request(tmp_path: Path, encoding: str) -> None:
    text = {"cp1251": "Не было бы счастья\n", "shift_jis": "吾輩は猫である\n"}.get(encoding, "gut und schön\n") * 3000
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert joined(LocalText(path=str(tmp_path), encoding=encoding)) == text


@pytest.mark.parametrize(
    ("encoding", "nearest"), [("utf8x", "utf8"), ("latin-l", "latin-1"), ("base64", "utf-8"), ("rot13", "utf-8")]
)
def test_an_encoding_that_is_none(encoding: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"encoding={encoding} is no encoding of text; .*{nearest}"):
        LocalText(path="x", encoding=encoding)


def test_the_code_supplies_nothing() -> None:
    for source in (StandardLibrary, InstalledPackage, LocalText):
        assert supplied_names(source) == []


def test_several_zstd_frames_are_read_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one\n") + zstd(b"two\n"))
    assert joined(LocalText(path=str(tmp_path))) == "one\ntwo\n"


def test_a_name_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "schön.txt").write_text("text")
    assert joined(LocalText(path=str(tmp_path))) == "text"
    Path(os.fsdecode(bytes(tmp_path) + b"/x\xff.txt")).write_text("text")
    with pytest.raises(ValueError, match=r"the name of the file .*udcff.* is not UTF-8: rename it"):
        joined(LocalText(path=str(tmp_path)))


def test_a_pattern_is_answered_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"patterns are not taken: give the folder, and suffixes=\[\.txt\]"):
        joined(LocalText(path=f"{tmp_path}/*.txt"))
