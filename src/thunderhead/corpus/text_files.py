"""Reading text files of several kinds piece by piece, cutting long texts, and saying what is wrong with which file."""

import codecs
import difflib
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

BLOCK_BYTES = 1 << 16  # read at a time
_TELL_EVERY = 1 << 16  # bytes


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
    """Decode the parts (lines, or blocks cut anywhere) of a UTF-8 file, unchanged but for a byte order mark.

    Raises:
        ValueError: a part is binary, not UTF-8, or cannot be decompressed.
    """
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


def tell_reading(parts: Iterator[str], raw: IO[bytes], on_read: Callable[[int], None]) -> Iterator[str]:
    """Pass parts on and tell `on_read`, now and then, how far the file on the disk was read for them."""
    told = 0
    for part in parts:
        yield part
        position = raw.tell()
        if position >= told + _TELL_EVERY:
            on_read(position - told)
            told = position
    on_read(raw.tell() - told)


@contextmanager
def decompressed(raw: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    """Read through a .gz or .zst file; any other file as it is."""
    if suffix == ".gz":
        with gzip.open(raw) as stream:
            yield stream  # type: ignore[misc]  # a GzipFile reads like any binary file
    elif suffix == ".zst":
        # Arrow's reader, as zstandard's takes a file that was cut off for one that ends there.
        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as reader:
            yield io.BufferedReader(reader, 1 << 20)
    else:
        yield raw


@contextmanager
def named_errors(file: Path) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
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
