"""In which order the blocks of one source come: a function of the seed and the shards, of nothing else.

Not of the number of devices, workers, the micro-batch or restarts: so the state of the data is one integer, and two
runs with the same seed see the same tokens at the same step.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Sample(NamedTuple):
    """A block of a source, and how often the source was gone through before it."""

    source: str
    epoch: int
    block: int


class Order:
    """Sample k of a source, for any k ≥ 0.

    Each epoch goes through each block once, in a new order of two levels: the chunks are permuted and laid end to end,
    then the blocks within each window of this row are. So reading stays nearly sequential, a window of `window` blocks
    at a time, and a corpus smaller than the window is shuffled entirely. Only the current chunk order and window are
    held in memory, whatever k. `blocks` counts those in each chunk, `window` those that are shuffled together; another
    name of the source or another seed gives another order.
    """

    def __init__(self, source: str, blocks: Sequence[int], *, seed: int, window: int):
        self._source, self._window = source, window
        self._seed = (seed, int.from_bytes(hashlib.sha256(source.encode()).digest()[:8]))
        self._sizes = np.array(blocks, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._total = int(self._sizes.sum())
        assert self._total > 0, "a source without a block was refused before"
        self._shuffled = (-1, -1)  # the epoch and window that the orders below are of

    def __call__(self, k: int) -> Sample:
        """Say which block sample k is."""
        epoch, position = divmod(k, self._total)
        window, offset = divmod(position, self._window)
        if self._shuffled != (epoch, window):
            self._shuffle(epoch, window)
        place = window * self._window + int(self._places[offset])
        i = int(np.searchsorted(self._ends, place, side="right"))
        return Sample(self._source, epoch, place - int(self._ends[i]) + int(self._last[i]))

    def _shuffle(self, epoch: int, window: int) -> None:
        chunks = permutation(len(self._sizes), *self._seed, epoch, 0)
        self._ends = np.cumsum(self._sizes[chunks])  # in the row of the chunks
        self._last = self._starts[chunks] + self._sizes[chunks]  # ends in the shard
        size = min(self._window, self._total - window * self._window)
        self._places = permutation(size, *self._seed, epoch, 1, window)
        self._shuffled = (epoch, window)


def permutation(size: int, *key: int) -> npt.NDArray[np.int64]:
    """Permute 0 … size - 1 by a key of non-negative integers.

    numpy keeps the raw numbers of a bit generator the same for ever (NEP 19), `Generator.permutation` it does not: a
    run must find its order again after numpy is updated.
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(draws, kind="stable")


def spread(number: int, count: int, blocks: int) -> int:
    """Say which block is number `number` of `count` that are spread evenly over `blocks`.

    The selection of a count holds that of each of its divisors.
    """
    return number * blocks // count
