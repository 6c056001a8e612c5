"""What a branch of a block (mixer, feed-forward) says about tensor parallelism, in plain words.

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, Division]

names a division for every submodule that has parameters ("" is the branch itself); it raises ValueError, naming the
setting, if its sizes cannot be divided by n_ranks. The branch gets its input whole on each rank, has the rank's own
heads or hidden dimensions between "columns" and "rows", and returns its output whole.

- columns: a linear layer, of whose outputs each rank computes some.
- rows: a linear layer, of whose inputs each rank has some; its outputs are summed over ranks.
- replicated: each rank holds the parameters whole, and computes with them what all ranks have alike.
- replicated_on_shards: whole, but used on the rank's own heads or dimensions (norms of queries and keys).
- into_shards: an nn.Identity; what goes through it is alike on all ranks, and each uses it for its own heads.
"""

from typing import Literal

Division = Literal["columns", "rows", "replicated", "replicated_on_shards", "into_shards"]


def refuse_uneven(setting: str, count: int, n_ranks: int) -> None:
    """Raise ValueError unless n_ranks divides what a setting counts."""
    if count % n_ranks:
        fitting = f"use a multiple of {n_ranks}, or a tensor_parallel_size of {divisors(count)}"
        raise ValueError(f"{setting}={count} cannot be divided among {n_ranks} tensor-parallel ranks: {fitting}")


def divisors(n: int) -> str:
    """The divisors of n in words: "1, 2 or 4"."""
    *most, last = [str(i) for i in range(1, n + 1) if n % i == 0]
    return f"{', '.join(most)} or {last}" if most else last
