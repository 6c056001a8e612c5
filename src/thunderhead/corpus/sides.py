"""Near duplicates on one side of the split: all on the side of the first of them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from thunderhead.corpus.batch_processing import Record
from thunderhead.corpus.deduplication import NearDuplicates, Signatures, Table

_RULE = NearDuplicates()  # as curation=deduplication has it


class Relate:
    """Find what tells near duplicates."""

    def __call__(self, texts: list[str]) -> list[Signatures]:
        return [_RULE.inspect(text) for text in texts]


def settle(related: Callable[[], Iterator[Record]], whole: Mapping[str, bool], sides: Path, folder: Path) -> None:
    """Write a byte for each document, 1 if it is for validation: as the first of its near duplicates was said to be.

    Pieces of a document belong together, too, in sources that keep it `whole`. Duplicates of duplicates do, however far
    they are from the first.
    """
    with Table((signature for record in related() for signature in record.result), "<u4", _RULE.width, folder) as table:
        first = table.column("first", np.int64)  # of each document, one before it to which it belongs, or itself
        held_out = table.column("held_out", np.uint8)

        def root(number: int) -> int:
            while (above := int(first[number])) != number:
                first[number] = number = int(first[above])  # halves the way of the next
            return number

        def join(one: int, other: int) -> None:
            one, other = root(one), root(other)
            first[max(one, other)] = min(one, other)

        number, before = 0, ""
        for record in related():
            for name, is_held_out in zip(record.ids, record.held_out, strict=True):
                first[number], held_out[number] = number, is_held_out
                document = f"{record.source}/{name.rpartition('#')[0]}"
                if whole[record.source] and "#" in name and document == before:
                    join(number, number - 1)
                number, before = number + 1, document
        for later, earlier in _RULE.pairs(table):
            for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
                join(one, other)
        with open(sides, "wb") as file:
            for number in range(len(table)):
                file.write(bytes([held_out[root(number)]]))
