"""How the work of preparing is shared out, and the options of the group `engine`."""

import dataclasses
from collections.abc import Callable, Iterator

import hydra
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core import components, config
from thunderhead.corpus.batches import share
from thunderhead.corpus.engines import Local
from thunderhead.corpus.sources import Document, Source


class Parts(Source):
    """A source of parts of some sizes."""

    def __init__(self, sizes: list[int]):
        self.sizes = sizes

    def fingerprint(self) -> dict[str, list[int]]:
        return {"sizes": self.sizes}

    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        raise NotImplementedError

    def disk_bytes(self) -> int:
        return sum(self.sizes)

    def part_bytes(self) -> list[int]:
        return self.sizes

    def check(self) -> None: ...


@given(st.lists(st.lists(st.integers(0, 1000), max_size=30), max_size=3), st.integers(1, 40))
def test_every_part_falls_to_one_task_and_in_order(sizes: list[list[int]], tasks: int) -> None:
    sources = {str(number): Parts(parts) for number, parts in enumerate(sizes)}
    shared = [share(sources, rank, tasks) for rank in range(tasks)]
    found = [(int(name), part) for task in shared for name, parts in task.items() for part in parts]
    assert found == [(number, part) for number, parts in enumerate(sizes) for part in range(len(parts))]
    loads = [sum(sizes[int(name)][part] for name, parts in task.items() for part in parts) for task in shared]
    total, largest = sum(map(sum, sizes)), max((size for parts in sizes for size in parts), default=0)
    assert max(loads) <= total / tasks + largest + 1


@pytest.mark.parametrize("option", config.options("engine"))
def test_an_option_names_exactly_what_can_be_set(option: str) -> None:
    composed = config.plain(config.compose([f"engine={option}", "processes=3"], "prepare"))
    engine = components.build(composed["engine"])
    target = hydra.utils.get_class(composed["engine"]["_target_"])
    assert {*composed["engine"]} - {"_target_"} == {field.name for field in dataclasses.fields(target)}
    assert (engine.processes if isinstance(engine, Local) else engine.workers) == 3
