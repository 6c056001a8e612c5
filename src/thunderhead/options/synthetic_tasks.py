"""Tasks with known answers, made by rule: they tell architectures apart in minutes, where text takes days.

A sequence of T+1 tokens holds answers, tokens that follow from those before; only these are trained on and measured.
Sequence n is a pure function of the seed and n, as the order of text is (`thunderhead.core.data.order`).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt, Le, Lt

from thunderhead.core.data.manifest import SplitName
from thunderhead.core.data.order import permutation
from thunderhead.core.tokenizer import EOS, Tokenizer, Tokens
from thunderhead.core.types import PositiveFloat, PositiveInt

Symbols = Annotated[int, Gt(0), Le(2**16)]
VALIDATION_SEED = 0  # the same sequences for every seed of a run, so that losses compare
_cached_permutation = lru_cache(maxsize=4)(permutation)


class Sequence1D(NamedTuple):
    """A sequence of T+1 token ids, and which of them are answers."""

    tokens: npt.NDArray[np.int64]
    is_answer: npt.NDArray[np.bool_]


class Task(ABC):
    """A rule that makes sequences. All have equally many answers, so that gradients of micro-batches add up exactly.

    - symbols: how tokens are written, by their ids. One more, the last id, is the end of a document.
    - possible_answers: how many answers are equally likely to who does not read the sequence.
    """

    @property
    @abstractmethod
    def symbols(self) -> Sequence[str]: ...

    @property
    @abstractmethod
    def possible_answers(self) -> int: ...

    @abstractmethod
    def check(self, context_length: int) -> None:
        """Raise ValueError for a context length that the task does not fit in, which says what to change."""

    @abstractmethod
    def sequence(self, split: SplitName, seed: int, n: int, context_length: int) -> Sequence1D:
        """Make sequence n: (context_length + 1,) tokens."""

    @property
    def eos_id(self) -> int:
        """Begins each sequence; nothing is asked of it."""
        return len(self.symbols)

    def summary(self) -> dict[str, Any]:
        """Return name and settings as plain values: the record of a run says what it was trained on."""
        return {"task": type(self).__name__, **asdict(self), "tokenizer": {"name": SymbolTokenizer.name}}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Copying from the context: a row of different random symbols, said again and again.

    The row has T/4 to T/2 symbols, at random, so that its length must be found in the sequence; answers are the tokens
    from the middle on, each following from the one before it and its earlier occurrence. This takes two layers of
    attention (Olsson et al. 2209.11895: an induction head reads what a previous-token head wrote); who only sees which
    symbols are in the context is right in 1 of T/4 to T/2 cases.
    """

    vocabulary: Symbols  # different symbols, at least T/2

    @property
    def symbols(self) -> Sequence[str]:
        return [f"s{i}" for i in range(self.vocabulary)]

    @property
    def possible_answers(self) -> int:
        return self.vocabulary

    def check(self, context_length: int) -> None:
        if context_length < 8:
            raise ValueError(
                f"data.task: model.context_length={context_length} leaves no room to repeat: use 8 or more"
            )
        if self.vocabulary < (longest := context_length // 2):
            rows = f"rows of up to model.context_length / 2 = {longest} different symbols"
            raise ValueError(f"data.task.vocabulary={self.vocabulary} is too small for {rows}: raise it")

    def sequence(self, split: SplitName, seed: int, n: int, context_length: int) -> Sequence1D:
        key = _key(split, seed, n)
        shortest, longest = context_length // 4, context_length // 2
        period = shortest + int(_draw(1, *key, 0)[0] % np.uint64(longest - shortest + 1))
        row = permutation(self.vocabulary, *key, 1)[:period]
        tokens = np.concatenate(([self.eos_id], np.resize(row, context_length)))
        # The symbol that begins the second round follows from nothing: its place is period + 1 ≤ T/2 + 1.
        return Sequence1D(tokens, np.arange(context_length + 1) > longest + 1)


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2312.04927, section 3): say which value went with a key.

    The sequence begins with pairs of a key and a value; each key comes once again later, at a random place, and the
    answer is its value. Places are drawn by a power law, so that most gaps are short, as in text; what is between are
    random values. As here the next token is the answer, it can be read afterwards, which tells nothing new.
    """

    keys: Symbols  # different ones; a token is a key or a value
    values: Symbols
    pairs: PositiveInt  # in a sequence, at most T/4 and at most `keys`
    gap_power: PositiveFloat  # place x is drawn with a probability proportional to x^(gap_power - 1); 1: all alike

    @property
    def symbols(self) -> Sequence[str]:
        return [*(f"k{i}" for i in range(self.keys)), *(f"v{i}" for i in range(self.values))]

    @property
    def possible_answers(self) -> int:
        return self.values

    def check(self, context_length: int) -> None:
        most = min(context_length // 4, self.keys)
        if self.pairs > most:
            needs = f"4 tokens of model.context_length={context_length} and one of data.task.keys={self.keys}"
            raise ValueError(f"data.task.pairs={self.pairs} do not fit: use {most} or less, as each needs {needs}")

    def sequence(self, split: SplitName, seed: int, n: int, context_length: int) -> Sequence1D:
        key = _key(split, seed, n)
        names = permutation(self.keys, *key, 0)[: self.pairs]
        values = self.keys + (_draw(self.pairs, *key, 1) % np.uint64(self.values)).astype(np.int64)
        places = (context_length - 2 * self.pairs) // 2
        # The first of exponential waiting times, whose rates are the weights: drawing without putting back.
        uniform = (_draw(places, *key, 2) + 1.0) / 2.0**64
        waiting = -np.log(uniform) * np.arange(1, places + 1) ** (1 - self.gap_power)
        chosen = 1 + 2 * self.pairs + 2 * np.argsort(waiting, kind="stable")[: self.pairs]
        # The earliest places are those of the highest rates: shuffle who is asked where.
        chosen = chosen[permutation(self.pairs, *key, 3)]

        between = self.keys + (_draw(context_length + 1, *key, 4) % np.uint64(self.values)).astype(np.int64)
        tokens, is_answer = between, np.zeros(context_length + 1, dtype=np.bool_)
        tokens[0] = self.eos_id
        tokens[1 : 2 * self.pairs : 2], tokens[2 : 2 * self.pairs + 1 : 2] = names, values
        tokens[chosen], tokens[chosen + 1] = names, values
        is_answer[chosen + 1] = True
        return Sequence1D(tokens, is_answer)


@dataclass(frozen=True, kw_only=True)
class ModularAddition(Task):
    """Equations a + b = c modulo a prime, c the answer (Power et al. 2201.02177), each a document of its own.

    Trained on a fraction of all equations, validated on the others: whether it is the rule that was learnt, or the
    table. Equations come epoch by epoch in new orders; a sequence holds as many as fit. Earlier ones of a sequence can
    be read unless attention.document_mask=true; about 1 in 200 validation equations has b + a = c there.
    """

    modulus: Annotated[int, Ge(3), Le(4096)]  # numbers are 0 … modulus - 1
    train_fraction: Annotated[float, Gt(0), Lt(1)]  # of the modulus² equations
    _LENGTH: ClassVar[int] = 6  # a + b = c EOS

    @property
    def symbols(self) -> Sequence[str]:
        return [*(str(i) for i in range(self.modulus)), "+", "="]

    @property
    def possible_answers(self) -> int:
        return self.modulus

    def check(self, context_length: int) -> None:
        if context_length < self._LENGTH:
            raise ValueError(f"data.task: model.context_length={context_length} holds no equation: use 6 or more")
        for split, equations in self._splits.items():
            if len(equations) == 0:
                empty = f"leaves no equation to the {split} split"
                raise ValueError(f"data.task.train_fraction={self.train_fraction} {empty}")

    @cached_property
    def _splits(self) -> dict[SplitName, npt.NDArray[np.int64]]:
        """Equations as a · modulus + b; the division is the same for all seeds."""
        shuffled = permutation(self.modulus**2, VALIDATION_SEED)
        n_train = round(self.train_fraction * self.modulus**2)
        return {"train": shuffled[:n_train], "val": shuffled[n_train:]}

    def sequence(self, split: SplitName, seed: int, n: int, context_length: int) -> Sequence1D:
        equations, count = self._splits[split], context_length // self._LENGTH
        epochs, positions = np.divmod(np.arange(n * count, (n + 1) * count), len(equations))
        seed = seed if split == "train" else VALIDATION_SEED
        chosen = [_cached_permutation(len(equations), seed, int(e))[p] for e, p in zip(epochs, positions, strict=True)]
        a, b = np.divmod(equations[chosen], self.modulus)
        rows = np.empty((count, self._LENGTH), dtype=np.int64)
        rows[:, 0], rows[:, 2], rows[:, 4] = a, b, (a + b) % self.modulus
        rows[:, 1], rows[:, 3], rows[:, 5] = self.modulus, self.modulus + 1, self.eos_id
        tokens = np.full(context_length + 1, self.eos_id)
        tokens[1 : 1 + rows.size] = rows.ravel()
        is_answer = np.zeros(context_length + 1, dtype=np.bool_)
        is_answer[5 : 1 + rows.size : self._LENGTH] = True
        return Sequence1D(tokens, is_answer)


def _key(split: SplitName, seed: int, n: int) -> tuple[int, int, int]:
    return (0, seed, n) if split == "train" else (1, VALIDATION_SEED, n)


def _draw(size: int, *key: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit numbers by a key; see `thunderhead.core.data.order.permutation` on why raw ones."""
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)


class SymbolTokenizer(Tokenizer):
    """A token is a symbol, and symbols stand apart by spaces: "k3 v7 k1". Text that is no symbol cannot be encoded."""

    name = "symbols"

    def __init__(self, symbols: Sequence[str]):
        self._written = [*symbols, EOS]
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}

    @property
    def settings(self) -> dict[str, Any]:
        return {"symbols": list(self._ids)}

    @property
    def vocab_size(self) -> int:
        return len(self._written)

    @property
    def eos_id(self) -> int:
        return len(self._ids)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        if unknown := sorted({symbol for text in texts for symbol in text.split()} - self._ids.keys()):
            known = f"{self._written[0]} … {self._written[-2]}, with spaces"
            raise ValueError(f"{' '.join(unknown)} is no symbol of this task: known are {known}")
        return [np.array([self._ids[symbol] for symbol in text.split()], dtype=self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self._written[int(i)] for i in ids if int(i) < self.vocab_size)

    def to_json(self) -> str:
        return json.dumps({"type": self.name, **self.settings})

    @classmethod
    def from_json(cls, text: str) -> Self:
        content = json.loads(text)
        if content.get("type") != cls.name:
            raise ValueError("not the symbols of a synthetic task")
        return cls(content["symbols"])
