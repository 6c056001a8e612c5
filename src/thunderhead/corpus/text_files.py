"""Reading text files of several kinds piece by piece, cutting long texts, and saying what is wrong with which file."""

import codecs
import difflib
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from encodings.aliases import aliases
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": None}  # Arrow's codecs; xz is Python's own
ARCHIVES = (".tar", ".zip")
MAX_RECORD_BYTES = 1 << 26
"""Of a line of .jsonl or a text of .parquet: 64 MiB, which no text has, but a packed file of zeros."""
_BLOCK_BYTES = 1 << 16  # read at a time
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"} | {
    codecs.BOM_UTF16_BE: "utf-16"
}
_DAMAGE = (
    *(OSError, pa.ArrowInvalid, lzma.LZMAError, zlib.error, EOFError, tarfile.TarError, zipfile.BadZipFile),
    *(RuntimeError, NotImplementedError),  # zipfile's, of encryption and unknown compression
)


def kind_of(name: str) -> tuple[str, str]:
    """Say how a file is packed ("": not), and the suffix of what is in it, in lower case: (.gz, .txt) of A.TXT.GZ."""
    stem, end = os.path.splitext(name.lower().replace(".tgz", ".tar.gz"))
    return (end, os.path.splitext(stem)[1]) if end in PACKED else ("", end)


def cut(pieces: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Join pieces of text, and cut them at line ends to texts as long as possible, of at most `max_bytes` of UTF-8.

    A line that is itself longer is cut between characters. Nothing is lost: the joined texts equal the joined pieces,
    bytes that are no UTF-8 ("surrogateescape") included.
    """
    if max_bytes is None:
        whole = "".join(pieces)
        if whole:
            yield whole
        return
    held = b""
    for piece in pieces:
        held += piece.encode(errors="surrogateescape")
        start = 0
        while len(held) - start > max_bytes:
            end = held.rfind(b"\n", start, start + max_bytes) + 1
            if end == 0:
                end = start + max_bytes
                while held[end] & 0xC0 == 0x80 and end > start + max_bytes - 3:  # in the middle of a character
                    end -= 1
            yield held[start:end].decode(errors="surrogateescape")
            start = end
        held = held[start:]
    if held:
        yield held.decode(errors="surrogateescape")


def decoded(parts: Iterator[bytes], file: Path | str, encoding: str = "utf-8", errors: str = "strict") -> Iterator[str]:
    """Decode blocks, cut anywhere, without a byte order mark; a ValueError says at which byte they are no such text.

    Text has no NUL: it is refused as well, but for errors="surrogateescape", with which nothing is.
    """
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    offset = 0  # of the next byte to read
    begun, more = False, True
    head = b""
    is_utf8, refuses_nul = encoding == "utf-8", errors != "surrogateescape"
    while more:
        with named_errors(file):
            part = next(parts, b"")
        more = part != b""
        head = head or part
        pending = len(decoder.getstate()[0])  # bytes of a character that the last part ended in
        nul = part.find(b"\0") if is_utf8 and refuses_nul else -1  # before decoding: that it is binary says more
        try:
            text = decoder.decode(part, final=not more) if nul < 0 else ""
        except UnicodeDecodeError as error:
            place = f"({error.reason} at byte {offset - pending + error.start})"
            raise ValueError(f"{file}: not {_spelled(encoding)} text {place}{_seems(head, encoding)}") from None
        if nul >= 0 or (refuses_nul and "\0" in text):
            place = f"(NUL at byte {offset + max(nul, 0)})"
            raise ValueError(f"{file}: binary, not {_spelled(encoding)} text {place}{_seems(head, encoding)}")
        offset += len(part)
        if text:
            yield text if begun else text.removeprefix("\ufeff")
            begun = True


def _spelled(encoding: str | None) -> str:
    return str(encoding).upper() if str(encoding).startswith("utf") else str(encoding)


def _seems(head: bytes, encoding: str) -> str:
    """Hint at what text that begins so may be: by its byte order mark, or as charset-normalizer finds likely."""
    from charset_normalizer import from_bytes

    other = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if other is None and (best := from_bytes(head).best()) is not None and best.coherence:
        other = "cp1252" if "cp1252" in best.could_be_from_charset else best.encoding.replace("_", "-")
    return f": perhaps it is {_spelled(other)}, then say encoding={other}" if other not in (None, encoding) else ""


def _is_of_text(encoding: str) -> bool:
    try:
        return bool(codecs.lookup(encoding)._is_text_encoding)
    except LookupError:
        return False


def check_encoding(encoding: str) -> None:
    """Refuse what is no encoding of text, by a ValueError that names the nearest."""
    if not _is_of_text(encoding):
        known = {name.replace("_", "-") for name in {*aliases, *aliases.values()} if _is_of_text(name)}
        near = difflib.get_close_matches(encoding.lower().replace("_", "-"), sorted(known), n=1)
        other = f"did you mean {near[0]}?" if near else "there are utf-8, utf-16, latin-1 …"
        raise ValueError(f"encoding={encoding} is no encoding of text; {other}")


def is_readable(text: str) -> bool:
    """Say whether a text has no bytes that could not be decoded ("surrogateescape"), and no NUL."""
    return "\0" not in text and is_encodable(text)


def is_encodable(text: str) -> bool:
    """Say whether a text has only characters, and no half of a surrogate pair, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Reported(io.FileIO):
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: Path, on_read: Callable[[int], None]):
        super().__init__(file, "rb")
        self._on_read, self._left = on_read, file.stat().st_size

    def readinto(self, buffer: Any) -> int | None:
        read = super().readinto(buffer)
        told = min(read or 0, self._left)  # some are read twice: the directory of a .zip
        self._left -= told
        self._on_read(told)
        return read

    def close(self) -> None:
        if not self.closed:
            self._on_read(self._left)  # none needed them
            self._left = 0
        super().close()


@contextmanager
def opened(file: Path, on_read: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """Open a file; `on_read` is told of the bytes on the disk, all of them by the time it is closed."""
    with io.BufferedReader(_Reported(file, on_read), 1 << 20) as raw:
        yield raw


def contents(file: Path | str, raw: IO[bytes]) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Yield (name inside, "" if there is none; unpacked bytes) of a file, plain, packed, or an archive of such.

    Members of archives come in their order, each to be read before the next is asked for; links have no bytes.
    """
    packed, suffix = kind_of(str(file))
    if packed == ".xz":
        raw = lzma.LZMAFile(raw)  # noqa: SIM115 - closed with what it reads
    elif packed:  # Arrow's reader, as zstandard's takes a file that was cut off for one that ends there
        raw = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), PACKED[packed]), 1 << 20)
    if suffix == ".tar":
        with named_errors(file), tarfile.open(fileobj=raw, mode="r|") as archive:
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)) is not None:
                    yield from _inside(member.name, stream)
                elif not member.isdir():
                    yield member.name, None
    elif suffix == ".zip" and not packed:
        with named_errors(file), zipfile.ZipFile(raw) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield from _inside(entry.filename, stream)
    else:
        yield "", raw


def _inside(name: str, stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes] | None]]:
    if kind_of(name)[1] in ARCHIVES:
        yield name, stream  # not looked into: nobody reads this suffix
    else:
        yield name, next(contents(name, stream))[1]


def blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Read a stream block by block."""
    return iter(lambda: stream.read(_BLOCK_BYTES), b"")


def lines(texts: Iterable[str], where: str) -> Iterator[str]:
    """Cut texts at line ends, which are kept; a ValueError refuses a line of more than MAX_RECORD_BYTES."""
    held: list[str] = []
    size = 0
    for text in texts:
        start = 0
        while end := text.find("\n", start) + 1:
            yield "".join([*held, text[start:end]])
            start, size = end, 0
            held.clear()
        held.append(text[start:])
        size += len(text) - start
        refuse_long(size, where)
    if size:
        yield "".join(held)


def refuse_long(size: float, where: str) -> None:
    """Refuse a record that would take memory many times its size on the disk, as a packed one may."""
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"{where}: has a record of more than {MAX_RECORD_BYTES >> 20} MiB: cut it into several")


@contextmanager
def named_errors(file: Path | str) -> Iterator[None]:
    """Say which file is damaged."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        kind = os.path.splitext(str(file))[1]
        raise ValueError(f"{file}: damaged or not a {kind} file ({error})") from None


def walk(
    root: Path, skip: frozenset[str] = frozenset(), passed: Callable[[str, str], None] = lambda name, why: None
) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to root, file) sorted by name within each folder, without hidden files and folders.

    Links are followed, each folder once. `passed` is told the name of all else, and why it is passed over.
    """
    seen: set[tuple[int, int]] = set()

    def refused(error: OSError) -> None:
        passed(os.path.relpath(error.filename, root), f"folder: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=refused, followlinks=True):
        place = Path(folder).relative_to(root)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            passed(place.as_posix(), "folder that is linked twice")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in folders:
            if name in skip or name.startswith("."):
                passed((place / name).as_posix(), "hidden folder" if name.startswith(".") else "folder left out")
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(names):
            file, known = Path(folder, name), (place / name).as_posix()
            if name.startswith("."):
                passed(known, "hidden")
            elif not file.exists():
                passed(known, "link to nothing")
            elif not stat.S_ISREG(file.stat().st_mode):
                passed(known, "no regular file")
            else:
                yield known, file


def nearest(path: Path) -> str:
    """Name what may have been meant by a path that does not exist."""
    if re.search(r"[*?\[]", path.name):
        suffix = f", and suffixes=[{path.suffix}]" if path.suffix else ""
        return f", and patterns are not taken: give the folder{suffix}"
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    missing = path.absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(missing, os.listdir(parent), n=1) if parent.is_dir() else []
    return f": did you mean {parent / near[0]}?" if near else f" ({parent} holds nothing of a similar name)"
