from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.corpus.text_files import cut, decoded, listing, nearest

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


def test_a_listing_is_of_fixed_size(tmp_path: Path) -> None:
    files = [(f"{i}", tmp_path / f"{i}") for i in range(100)]
    for _, file in files:
        file.write_text("abc")
    found = listing(files)
    assert (found["files"], found["bytes"], len(found["listing_sha256"])) == (100, 300, 64)
