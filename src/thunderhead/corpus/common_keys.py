"""Which documents have a key in common, found on the disk: memory does not grow with the number of documents.

Keys are spread over files by their first bits, so that each file can be sorted in memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

AT_ONCE = 1 << 22  # keys that are sorted in memory: 64 MB of 8 bytes each, with the documents' numbers

Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


def later(keys: Iterable[Keys], n: int, folder: Path) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
    """Find the documents whose key an earlier one has.

    `keys` are uniform hashes, blocks (documents, words) of all n documents in their order; a document's number is its
    place among them. Yields the numbers of such documents, in no order, and of the first and the last one before each
    with its key.
    """
    bits = max(0, (n - 1) // AT_ONCE).bit_length()
    files = [folder / f"keys-{part:04d}" for part in range(1 << bits)]
    number, words = 0, 0
    with ExitStack() as stack:
        streams = [stack.enter_context(open(file, "wb")) for file in files]
        for block in keys:
            words = block.shape[1]
            numbers = np.arange(number, number + len(block), dtype=np.uint64)
            rows = np.column_stack([block, numbers])
            number += len(block)
            if not bits:
                streams[0].write(rows.tobytes())
                continue
            part = block[:, 0] >> np.uint64(64 - bits)
            order = np.argsort(part, kind="stable")
            ends = np.searchsorted(part[order], np.arange(1 << bits), side="right")
            for stream, of_part in zip(streams, np.split(rows[order], ends[:-1]), strict=True):
                stream.write(of_part.tobytes())
    for file in files:
        rows = np.fromfile(file, dtype=np.uint64).reshape(-1, words + 1)
        file.unlink()
        if len(rows):
            yield _repeated(rows)


def _repeated(rows: Keys) -> tuple[Numbers, Numbers, Numbers]:
    *words, numbers = rows.T
    order = np.lexsort(words[::-1])  # stable: of equal keys, the documents in their order
    rows, numbers = rows[order], numbers[order].astype(np.int64)
    again = np.flatnonzero((rows[1:, :-1] == rows[:-1, :-1]).all(axis=1)) + 1
    begins = np.ones(len(rows), dtype=bool)
    begins[again] = False
    first = np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))
    return numbers[again], numbers[first[again]], numbers[again - 1]
