"""Small files that unpack to far more than memory holds: they are read piece by piece, or refused in one line."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thunderhead.corpus import text_files
from thunderhead.corpus.sources import LocalText

READ = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
from thunderhead.corpus.sources import LocalText
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
source = LocalText(path=sys.argv[1])
try:
    source.check()
    print(sum(len(document.text) for document in source.documents()))
except ValueError as error:
    print(error)
"""
MEMBER = 2**26  # bytes


def read(file: Path) -> str:
    """What reading a file gives in a process that may take 600 MiB for it."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def packed(suffix: str, character: bytes, times: int) -> bytes:
    """A file that unpacks to `times` × 64 MiB of a character."""
    one = character * MEMBER
    return times * (gzip.compress(one) if suffix == ".gz" else pa.compress(one, codec="zstd", asbytes=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_text_is_never_whole_in_memory(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(packed(suffix, b"a", 20))
    assert file.stat().st_size < 2_000_000
    assert read(file) == str(20 * MEMBER)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_record_of_ten_gigabytes_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(packed(suffix, b" ", 160))
    assert file.stat().st_size < 11_000_000
    assert read(file) == f"{file}: has a record of more than 64 MiB: cut it into several"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_text_that_many_rows_share_is_in_memory_a_few_times(tmp_path: Path) -> None:
    file, text = tmp_path / "a.parquet", "word " * 1_000_000
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": rows}), file, compression="zstd")
    assert file.stat().st_size < 1_000_000
    assert read(file) == str(400 * len(text))  # 2 GB


def test_a_row_of_a_table_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 2**20)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"other": [{"a": 1, "b": "x" * 2**22}], "text": ["short"]}), file)
    assert [text for _, text in LocalText(path=str(file)).documents()] == ["short"]
    for rows in (["x" * 2**21], ["short"] * 99 + ["x" * 2**21]):
        pq.write_table(pa.table({"text": rows}), file)
        with pytest.raises(ValueError, match=r"a\.parquet.*: has a record of more than 1 MiB: cut it into several$"):
            list(LocalText(path=str(file)).documents())


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' * 100_000, '{"text": "x", "n": ' + "1" * 5000 + "}"])
def test_json_that_python_does_not_read_names_file_and_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "x"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON \("):
        list(LocalText(path=str(file)).documents())
