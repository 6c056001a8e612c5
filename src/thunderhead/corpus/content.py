"""What files hold, told apart by their bytes: so the same text finds its shards wherever and whenever it lies."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from thunderhead.core.data.manifest import sha256_of
from thunderhead.disk import write_text

_REMEMBERED_BYTES = 256 << 20  # hashing less takes a fraction of a second
_PLACES, _BLOCK = 16, 1 << 16  # of a file that is sampled
_SETTLED_SECONDS = 2.0  # a file that changed just now may change again without another time


def listing(files: Sequence[tuple[str, Path]], *, sampled: bool = False) -> dict[str, Any]:
    """Summarise names and bytes of files: of fixed size, and different when a name or a byte is.

    `sampled` looks at the size of a file and 1 MB of it, in 16 places: another byte elsewhere is not noticed.
    Hashes of large corpora are remembered in the user's cache ($XDG_CACHE_HOME/thunderhead), by size, inode and times:
    among them the time of the last change of any kind, which no program can set.
    """
    status = {name: file.stat() for name, file in files}
    total = sum(found.st_size for found in status.values())
    memory = _memory(files) if total >= _REMEMBERED_BYTES else None
    before, now = _recall(memory), time.time()
    hashes, remembered = hashlib.sha256(), {}
    console = Console(stderr=True)
    shown = memory is not None and not before and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("Hashing files (once)", total=total)
        for name, file in files:
            found = status[name]
            stamp = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, *["sampled"] * sampled]
            digest = before.get(f"{name} {stamp}") or (_sampled(file) if sampled else sha256_of(file))
            if now - found.st_ctime > _SETTLED_SECONDS:
                remembered[f"{name} {stamp}"] = digest
            hashes.update(f"{name}\0{digest}\n".encode())
            progress.advance(task, found.st_size)
    if memory is not None and remembered != before:
        with contextlib.suppress(OSError):  # a home that cannot be written to: hashed again the next time
            write_text(memory, json.dumps(remembered))
    return {"files": len(files), "bytes": total, "sha256": hashes.hexdigest()} | ({"sampled": True} if sampled else {})


def _sampled(file: Path) -> str:
    """Hash the size of a file, and blocks of it, from its first byte to its last."""
    size = file.stat().st_size
    if size <= _PLACES * _BLOCK:
        return sha256_of(file)
    hashes = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for place in range(_PLACES):
            stream.seek((size - _BLOCK) * place // (_PLACES - 1))
            hashes.update(stream.read(_BLOCK))
    return hashes.hexdigest()


def _memory(files: Sequence[tuple[str, Path]]) -> Path:
    """Name the file that remembers the hashes of files in one place."""
    name, first = files[0]
    place = hashlib.sha256(str(first.absolute()).removesuffix(name).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "thunderhead" / "hashes" / f"{place}.json"


def _recall(memory: Path | None) -> dict[str, Any]:
    """Read what is remembered; nothing, where that is not there or damaged."""
    try:
        content = json.loads(memory.read_bytes()) if memory is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
