"""Reading text files of several kinds piece by piece, cutting long texts, and saying what is wrong with which file."""

import codecs
import difflib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

PACKED = {".gz": "gzip", ".zst": "zstd"}
MAX_RECORD_BYTES = 1 << 26
"""Of a line of .jsonl or a text of .parquet: 64 MiB, which no text has, but a packed file of zeros."""
_BLOCK_BYTES = 1 << 16  # read at a time


def cut(pieces: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Join pieces of text, and cut them at line ends to texts as long as possible, of at most `max_bytes` of UTF-8.

    A line that is itself longer is cut between characters. Nothing is lost: the joined texts equal the joined pieces.
    """
    if max_bytes is None:
        whole = "".join(pieces)
        if whole:
            yield whole
        return
    held = b""
    for piece in pieces:
        held += piece.encode()
        start = 0
        while len(held) - start > max_bytes:
            end = held.rfind(b"\n", start, start + max_bytes) + 1
            if end == 0:
                end = start + max_bytes
                while held[end] & 0xC0 == 0x80:  # in the middle of a character
                    end -= 1
            yield held[start:end].decode()
            start = end
        held = held[start:]
    if held:
        yield held.decode()


def decoded(parts: Iterator[bytes], file: Path) -> Iterator[str]:
    """Decode parts (lines, or blocks cut anywhere) of UTF-8 without a byte order mark; a ValueError refuses others."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the next byte to read
    begun, more = False, True
    while more:
        with named_errors(file):
            part = next(parts, b"")
        more = part != b""
        pending = len(decoder.getstate()[0])  # bytes of a character that the last part ended in
        if (nul := part.find(b"\0")) >= 0:
            raise ValueError(f"{file}: binary, not UTF-8 text (NUL at byte {offset + nul})")
        try:
            text = decoder.decode(part, final=not more)
        except UnicodeDecodeError as error:
            byte = offset - pending + error.start
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {byte})") from None
        offset += len(part)
        if text:
            yield text if begun else text.removeprefix("\ufeff")
            begun = True


def read(file: Path, on_read: Callable[[int], None], *, by_line: bool) -> Iterator[str]:
    """Yield the text of a file, plain or packed, by lines or in blocks; `on_read` is told of the bytes on the disk."""
    with open(file, "rb", buffering=1 << 20) as raw:
        stream: Any = raw
        if codec := PACKED.get(file.suffix):
            # Arrow's reader, as zstandard's takes a file that was cut off for one that ends there.
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec), 1 << 20)
        told = 0

        def take() -> bytes:
            part: bytes = stream.readline(MAX_RECORD_BYTES + 1) if by_line else stream.read(_BLOCK_BYTES)
            refuse_long(len(part), str(file))
            return part

        for part in decoded(iter(take, b""), file):
            yield part
            if (position := raw.tell()) >= told + _BLOCK_BYTES:
                on_read(position - told)
                told = position
        on_read(raw.tell() - told)


def refuse_long(size: float, where: str) -> None:
    """Refuse a record that would take memory many times its size on the disk, as a packed one may."""
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"{where}: has a record of more than {MAX_RECORD_BYTES >> 20} MiB: cut it into several")


def check_field(names: Iterable[str], field: str, where: object) -> None:
    if field not in names:
        raise ValueError(f"{where}: no field text_field={field}; there are: {', '.join(names)}")


def text_of(record: object, field: str, where: str) -> str | None:
    """Return the text of a record, None if it is null; raises ValueError if it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, found {type(record).__name__}")
    check_field(record, field, where)
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: {field} is {type(text).__name__}, not text")
    refuse_long(len(text or ""), where)
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    return text and text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        raise ValueError(f"{file}: damaged or not a {file.suffix} file ({error})") from None


def walk(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to root, file) sorted by name within each folder, without hidden files and folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                file = Path(folder, name)
                yield file.relative_to(root).as_posix(), file


def listing(files: list[tuple[str, Path]]) -> dict[str, Any]:
    """Summarise names, sizes and times of files: of fixed size, and different when a file is."""
    digest, total = hashlib.sha256(), 0
    for name, file in files:
        status = file.stat()
        total += status.st_size
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return {"files": len(files), "bytes": total, "listing_sha256": digest.hexdigest()}


def nearest(path: Path) -> str:
    """Name what may have been meant by a path that does not exist."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    missing = path.absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(missing, os.listdir(parent), n=1) if parent.is_dir() else []
    return f": did you mean {parent / near[0]}?" if near else f" ({parent} holds nothing of a similar name)"
