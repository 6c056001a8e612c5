import json
import os
import time
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.core.run import build_data
from thunderhead.corpus import content
from thunderhead.corpus.content import listing


def test_a_listing_is_of_fixed_size(tmp_path: Path) -> None:
    files = [(f"{i}", tmp_path / f"{i}") for i in range(100)]
    for _, file in files:
        file.write_text("abc")
    found = listing(files)
    assert (found["files"], found["bytes"], len(found["sha256"])) == (100, 300, 64)


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_REMEMBERED_BYTES", 1)
    monkeypatch.setattr(content, "_SETTLED_SECONDS", 0.0)
    hashed: list[str] = []
    real = content.sha256_of

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return real(file)

    monkeypatch.setattr(content, "sha256_of", counted)
    (tmp_path / "sub").mkdir()
    files = [(name, tmp_path / name) for name in ("a.txt", "sub/b.txt")]
    for _, file in files:
        file.write_text("abc")
    time.sleep(0.05)
    first = listing(files)
    assert listing(files) == first
    assert hashed == ["a.txt", "b.txt"]
    status = files[0][1].stat()
    files[0][1].write_text("abd")
    os.utime(files[0][1], ns=(status.st_atime_ns, status.st_mtime_ns))  # size, name, inode and time as before
    time.sleep(0.05)
    assert listing(files) != first
    assert hashed == ["a.txt", "b.txt", "a.txt"]
    (memory,) = (tmp_path / "cache" / "thunderhead" / "hashes").iterdir()
    for damage in ("", "[1]", json.dumps({"a.txt": 3})):
        memory.write_text(damage)
        assert listing(files)["bytes"] == 6


def test_a_sample_notices_size_and_what_it_reads(tmp_path: Path) -> None:
    """Of a small file every byte, of a large one 16 blocks of 64 KiB; it is told apart from a full hash."""
    file = tmp_path / "a.txt"
    content_ = bytearray(os.urandom(5_000_000))
    file.write_bytes(content_)
    first = listing([("a.txt", file)], sampled=True)
    assert first["sampled"]
    assert first["sha256"] != listing([("a.txt", file)])["sha256"]
    noticed = []
    for place in (0, 200_000, len(content_) - 1):
        content_[place] ^= 1
        file.write_bytes(content_)
        noticed.append(listing([("a.txt", file)], sampled=True) != first)
        content_[place] ^= 1
    assert noticed == [True, False, True]
    file.write_bytes(content_ + b"x")
    assert listing([("a.txt", file)], sampled=True) != first
    small = tmp_path / "b.txt"
    small.write_bytes(b"abc")
    before = listing([("b.txt", small)], sampled=True)
    small.write_bytes(b"abd")
    assert listing([("b.txt", small)], sampled=True) != before


@pytest.mark.parametrize("how", ["full", "sampled"])
def test_the_setting_reaches_the_sources(how: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 100)
    overrides = ["data=text", f"data.path={tmp_path}", f"data.fingerprint={how}"]
    composed = config.plain(config.compose(overrides, "prepare"))
    data = build_data(composed | {"seed": 0}, context_length=1, sequences_per_step=1)
    assert data.problems(None) == []
    (found,) = data._preparation().fingerprints().values()
    assert found.get("sampled", False) == (how == "sampled")


def test_what_changed_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_REMEMBERED_BYTES", 1)
    (tmp_path / "a.txt").write_text("abc")
    listing([("a.txt", tmp_path / "a.txt")])
    assert not (tmp_path / "cache").exists()
