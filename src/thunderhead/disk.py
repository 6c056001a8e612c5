"""Files that are written whole, and what a full, read-only or failing disk says: one line with a way out."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from thunderhead.core.config import ConfigError, Problem
from thunderhead.terminal import complain

_FULL = "make room there, or write elsewhere"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOTDIR: "a file is in its way: choose another place",
    errno.EEXIST: "something else is in its way: choose another place",
    errno.EISDIR: "a folder is in the place of a file: move it away, or choose another place",
    errno.ENAMETOOLONG: "a name of it is too long: choose a shorter one",
    errno.ELOOP: "links there lead in a circle: choose another place",
    errno.EROFS: "have it mounted for writing, or write elsewhere",
    errno.EACCES: "change its owner or mode, or write elsewhere",
    errno.EPERM: "change its owner or mode, or write elsewhere",
    errno.EIO: "the disk may be failing: look at the system's log",
    errno.ESTALE: "the file server has forgotten it: mount it anew",
}
_IN_WORDS = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)|\d+ requested and \d+ written")
"""Of shutil, of libraries in Rust as safetensors, and of numpy."""


def _refused(error: BaseException) -> OSError | None:
    """What an error says that a disk refused, if by its number or in these words."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return error
    said = None if isinstance(error, ConfigError) else _IN_WORDS.search(str(error))
    number = int(said[1] or said[2] or errno.ENOSPC) if said else None
    return OSError(number, os.strerror(number)) if number in _REMEDIES else None


def _causes(error: BaseException | None) -> list[OSError]:
    """What a disk refused, also where torch or Lightning tell of it in words of their own."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # what a thread raised again may be its own context
        chain.append(error)
        error = error.__cause__ or error.__context__
    return [cause for cause in map(_refused, chain) if cause is not None]


def problem(error: BaseException | None) -> str | None:
    """Say in one line what a disk refused; None: it is none's fault."""
    found: list[tuple[Any, Any]] = [(cause.filename2 or cause.filename, cause.errno) for cause in _causes(error)]
    if not found:
        return None
    name, number = next((place for place in found if place[0] is not None), found[0])
    why, remedy = os.strerror(number), _REMEDIES[number]
    if name is None:  # what is printed goes to a file, say
        return f"the output, or a file that is not known, could not be written: {why}: {remedy}"
    path = Path(os.fsdecode(name)).absolute()
    there = next(place for place in (path, *path.parents) if os.path.exists(place))  # Path's raises for a long name
    what = "written" if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else "read or written"
    return f"{path} could not be {what}: {why} ({shutil.disk_usage(there).free:,} bytes free there): {remedy}"


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Let errors of the disk within tell of `path`: where a write fails, Python does not know of which file."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            cause.filename = cause.filename or str(path)
        if (refused := _refused(error)) is not None and refused is not error:  # told in a library's words
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Raise ConfigError where the disk ends what is within."""
    try:
        yield
    except OSError as error:
        if (why := problem(error)) is None:
            raise
        raise ConfigError([Problem("", why)]) from error


@contextlib.contextmanager
def told(then: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End this program with one line and status 1 where the disk ends what is within; `then` says how to go on."""
    try:
        yield
    except OSError as error:
        if (why := problem(error)) is None:
            raise
        with contextlib.suppress(OSError):  # where this goes may be full, too
            complain(why + then())
        raise SystemExit(2 if error.errno == errno.ENAMETOOLONG else 1) from None  # of what was typed


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when all is on the disk: readers find the old one or the new one."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock colleagues out
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # of a disk that has become read-only
                os.unlink(temporary)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it."""
    with replacing(path) as file:
        file.write(text.encode())
