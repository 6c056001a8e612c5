import itertools
import pickle
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core.data.manifest import Manifest
from thunderhead.core.data.order import Order, permutation, spread
from thunderhead.corpus.mixture import spread_over_chunks
from thunderhead.corpus.shard_data import check_blocks

MakeShards = Callable[..., Manifest]
sizes = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)


@given(sizes, st.integers(1, 50), st.integers(0, 2**63))
def test_every_epoch_has_every_block_once(chunks: list[int], window: int, seed: int) -> None:
    order = Order("a", chunks, seed=seed, window=window)
    total = sum(chunks)
    for epoch in range(3):
        samples = [order(n) for n in range(epoch * total, (epoch + 1) * total)]
        assert {(sample.source, sample.epoch) for sample in samples} == {("a", epoch)}
        assert Counter(sample.block for sample in samples) == Counter(range(total))


@given(sizes, st.integers(1, 50), st.lists(st.integers(0, 10**12), min_size=1))
def test_a_sample_does_not_depend_on_what_was_asked_before(chunks: list[int], window: int, asked: list[int]) -> None:
    order = Order("a", chunks, seed=7, window=window)
    for n in asked:
        assert order(n) == Order("a", chunks, seed=7, window=window)(n)


@given(sizes, st.data())
def test_a_part_is_spread_evenly(chunks: list[int], data: st.DataObject) -> None:
    total = sum(chunks)
    count = data.draw(st.integers(1, total))
    part = [spread(number, count, total) for number in range(count)]
    assert len(set(part)) == count
    assert all(0 <= block < total for block in part)
    assert {b - a for a, b in itertools.pairwise(part)} <= {total // count, -(-total // count)}
    chunk_of = [index for index, size in enumerate(chunks) for _ in range(size)]
    found = Counter(chunk_of[block] for block in part)
    assert spread_over_chunks(chunks, count) == [found[index] for index in range(len(chunks))]
    for divisor in (d for d in range(1, count + 1) if count % d == 0):
        assert {spread(number, divisor, total) for number in range(divisor)} <= set(part)
    assert spread_over_chunks(chunks, total) == chunks


def test_windows_hold_a_contiguous_run_of_the_permuted_chunks() -> None:
    chunks, window = [10] * 12, 15
    order = Order("a", chunks, seed=3, window=window)
    found = [order(n).block for n in range(sum(chunks))]
    # An independent statement of the two levels: lay the chunks in the epoch's order, cut windows, compare as sets.
    first_met = list(dict.fromkeys(block // 10 for block in found))
    assert first_met != sorted(first_met)
    assert all(len({block // 10 for block in found[i : i + window]}) <= 3 for i in range(0, len(found), window))
    assert all(found[i : i + window] != sorted(found[i : i + window]) for i in range(0, len(found), window))


def test_epochs_seeds_and_sources_have_orders_of_their_own() -> None:
    def epoch(order: Order, number: int) -> list[int]:
        return [order(n).block for n in range(100 * number, 100 * (number + 1))]

    one = Order("a", [40, 60], seed=1, window=30)
    orders = [
        epoch(one, 0),
        epoch(one, 1),
        epoch(Order("a", [40, 60], seed=2, window=30), 0),
        epoch(Order("b", [40, 60], seed=1, window=30), 0),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_blocks_are_mixed_well_within_a_window() -> None:
    # Positions of a random permutation: neighbours are uncorrelated (standard error 1/sqrt(n) = 0.01).
    order = Order("a", [5000, 5000], seed=0, window=10_000)
    found = np.array([order(n).block for n in range(10_000)])
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.05


def test_the_order_is_the_one_of_the_first_release() -> None:
    # Runs are resumed with later versions of this code, of numpy and on other machines: these numbers must stay.
    assert permutation(8, 1, 2, 3).tolist() == PERMUTATION
    order = Order("stdlib", [5, 3, 4], seed=42, window=6)
    assert [order(n).block for n in range(12)] == FIRST_EPOCH
    assert order(10**15) == ("stdlib", 10**15 // 12, FAR)


PERMUTATION = [1, 3, 7, 5, 2, 0, 4, 6]
FIRST_EPOCH = [2, 8, 4, 0, 3, 1, 9, 11, 7, 5, 10, 6]
FAR = 6


def test_an_order_can_be_sent_to_another_process() -> None:
    order = Order("a", [3, 4], seed=0, window=5)
    again = pickle.loads(pickle.dumps(order))
    assert [again(n) for n in range(20)] == [order(n) for n in range(20)]


def test_blocks_are_counted(make_shards: MakeShards) -> None:
    manifest = make_shards()
    count = sum(manifest.splits["train"]["text"].blocks(64))
    assert count == sum((chunk.tokens - 1) // 64 for chunk in manifest.splits["train"]["text"].chunks)


def test_a_context_longer_than_the_text_says_what_to_change(make_shards: MakeShards) -> None:
    manifest = make_shards(chunk_bytes=2**20)
    train, val = (manifest.splits[split]["text"].tokens for split in ("train", "val"))
    check_blocks(manifest, val)  # it is validated on as it is
    check_blocks(manifest, train - 1)
    with pytest.raises(ValueError, match=r"data\.sources\.text: the training split .*model\.context_length \+ 1"):
        check_blocks(manifest, train)
