import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.corpus.text_files import cut, decoded, is_readable, kind_of, nearest, walk

text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(text | st.just("\n")), st.integers(64, 200) | st.none())
def test_cutting_loses_nothing_and_keeps_the_limit(pieces: list[str], max_bytes: int | None) -> None:
    whole = "".join(pieces)
    parts = list(cut(iter(pieces), max_bytes))
    assert "".join(parts) == whole
    assert all(parts)
    assert parts == list(cut([whole], max_bytes))  # however the text was read
    if max_bytes is not None:
        assert all(len(part.encode()) <= max_bytes for part in parts)
        for number, part in enumerate(parts[:-1], start=1):
            line, end, _ = "".join(parts[number:]).partition("\n")
            if part.endswith("\n"):
                assert len((part + line + end).encode()) > max_bytes  # no more lines would have fitted in
            else:
                assert "\n" not in part  # a long line, cut inside
                assert len(part.encode()) > max_bytes - 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("content", ["\ufeffaé数𝄞\nb" * 20, "aé数𝄞\ufeff", ""])
def test_characters_across_the_parts_of_a_file(size: int, content: str) -> None:
    raw = content.encode()
    parts = (raw[i : i + size] for i in range(0, len(raw), size))
    assert "".join(decoded(parts, Path("a.txt"))) == content.removeprefix("\ufeff")


@given(st.binary(max_size=50).map(lambda raw: raw.replace(b"\0", b"x")), st.integers(1, 10))
def test_the_offset_of_the_first_bad_byte(raw: bytes, size: int) -> None:
    parts = (raw[i : i + size] for i in range(0, len(raw), size))
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"at byte {error.start}\\)"):
            list(decoded(parts, Path("a.txt")))
    else:
        assert "".join(decoded(parts, Path("a.txt"))) == raw.decode().removeprefix("\ufeff")


def test_the_nearest_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    assert nearest(tmp_path / "corpsu" / "a.txt") == f": did you mean {tmp_path / 'corpus'}?"
    assert "nothing of a similar name" in nearest(tmp_path / "zzz")


@given(st.lists(st.binary(max_size=40)), st.integers(64, 80))
def test_bytes_that_are_no_text_are_cut_without_loss(parts: list[bytes], max_bytes: int) -> None:
    pieces = [part.decode(errors="surrogateescape") for part in parts]
    found = list(cut(iter(pieces), max_bytes))
    assert "".join(found).encode(errors="surrogateescape") == b"".join(parts)
    assert all(0 < len(piece.encode(errors="surrogateescape")) <= max_bytes for piece in found)


def test_what_is_readable() -> None:
    assert is_readable("naïve 数")
    assert not is_readable("a\0b")
    assert not is_readable(b"a\xff".decode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ("", ".txt")),
        ("A.TXT.GZ", (".gz", ".txt")),
        ("b/c.d/README", ("", "")),
        ("x.tgz", (".gz", ".tar")),
        ("x.Tar.XZ", (".xz", ".tar")),
        ("README.bz2", (".bz2", "")),
        (".gz", ("", "")),
    ],
)
def test_the_kind_of_a_file(name: str, kind: tuple[str, str]) -> None:
    assert kind_of(name) == kind


def test_links_are_followed_once_and_all_else_is_told(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for folder in (corpus / "b", corpus / ".git", other / "deep"):
        folder.mkdir(parents=True)
    for file in (corpus / "b" / "x.txt", corpus / ".git" / "y.txt", corpus / ".hidden", other / "deep" / "z.txt"):
        file.write_text("text")
    (corpus / "b" / "up").symlink_to(corpus)  # a loop
    (corpus / "a").symlink_to(other)
    (corpus / "c").symlink_to(other / "deep")
    (corpus / "file.txt").symlink_to(other / "deep" / "z.txt")
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(corpus / "pipe.txt")
    passed: dict[str, str] = {}
    found = [name for name, _ in walk(corpus, passed=passed.__setitem__)]
    assert found == ["file.txt", "a/deep/z.txt", "b/x.txt"]
    assert passed == {
        ".git": "hidden folder",
        ".hidden": "hidden",
        "gone.txt": "link to nothing",
        "pipe.txt": "no regular file",
        "b/up": "folder that is linked twice",
        "c": "folder that is linked twice",
    }
