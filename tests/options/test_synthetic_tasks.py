"""Synthetic tasks: every answer follows from the tokens before it, and from nothing else."""

from collections import Counter
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core import components, config
from thunderhead.core.components import build
from thunderhead.core.config import CONF_DIR
from thunderhead.core.data.manifest import SplitName
from thunderhead.core.tokenizer import EOS
from thunderhead.options.synthetic_tasks import (
    AssociativeRecall,
    Induction,
    ModularAddition,
    SymbolTokenizer,
    Task,
)
from thunderhead.options.task_data import TaskSequences

TASKS: dict[str, Task] = {
    "induction": Induction(vocabulary=20),
    "associative_recall": AssociativeRecall(keys=8, values=6, pairs=5, gap_power=0.01),
    "modular_addition": ModularAddition(modulus=7, train_fraction=0.6),
}
splits = st.sampled_from(get_args(SplitName))


def copy_after_last_occurrence(before: list[int]) -> int:
    """Who reads the sequence: the token that followed the last token's latest earlier occurrence."""
    earlier = len(before) - 2 - before[-2::-1].index(before[-1])
    return before[earlier + 1]


def add(before: list[int], modulus: int = 7) -> int:
    a, plus, b, equals = before[-4:]
    assert (plus, equals) == (modulus, modulus + 1)
    return (a + b) % modulus


SOLVERS: dict[str, Callable[[list[int]], int]] = {
    "induction": copy_after_last_occurrence,
    "associative_recall": copy_after_last_occurrence,
    "modular_addition": add,
}


@pytest.mark.parametrize("name", TASKS)
@given(split=splits, seed=st.integers(0, 5), n=st.integers(0, 10**9), context_length=st.integers(20, 40))
def test_every_answer_follows_from_what_is_before_it(
    name: str, split: SplitName, seed: int, n: int, context_length: int
) -> None:
    task = TASKS[name]
    task.check(context_length)
    tokens, is_answer = task.sequence(split, seed, n, context_length)
    assert tokens.shape == is_answer.shape == (context_length + 1,)
    assert 0 <= tokens.min() <= tokens.max() <= task.eos_id
    assert tokens[0] == task.eos_id
    assert is_answer.sum() == task.sequence("train", 0, 0, context_length).is_answer.sum() > 0
    for position in np.flatnonzero(is_answer):
        assert SOLVERS[name](tokens[:position].tolist()) == tokens[position]


@pytest.mark.parametrize("name", TASKS)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 10**9))
def test_a_sequence_is_a_function_of_seed_and_number(name: str, seed: int, n: int) -> None:
    task = TASKS[name]

    def made(split: SplitName, seed: int, n: int) -> list[int]:
        return task.sequence(split, seed, n, 32).tokens.tolist()

    assert made("train", seed, n) == made("train", seed, n)
    assert made("val", seed, n) == made("val", seed + 1, n)  # losses of several seeds compare
    assert made("train", seed, n) != made("val", seed, n)
    assert len({tuple(made("train", s, k)) for s in (seed, seed + 1) for k in (n, n + 1)}) > 1


def test_rows_of_induction_have_all_lengths() -> None:
    """The offset of the copy cannot be learnt by heart: each length from T/4 to T/2 occurs, about as often."""
    task, context_length = Induction(vocabulary=40), 64
    lengths = []
    for n in range(1700):
        tokens = task.sequence("train", 1, n, context_length).tokens[1:].tolist()
        lengths.append(tokens.index(tokens[0], 1))
        assert len(set(tokens)) == lengths[-1]  # a row has no symbol twice
    counts = Counter(lengths)
    assert sorted(counts) == list(range(16, 33))
    # of 100 expected, 5 standard deviations
    assert all(50 < count < 150 for count in counts.values())


def test_answers_are_spread_over_all_possible_ones() -> None:
    for name, task in TASKS.items():
        answers: Counter[int] = Counter()
        for n in range(400):
            tokens, is_answer = task.sequence("train", 1, n, 32)
            answers.update(tokens[is_answer].tolist())
        assert len(answers) == task.possible_answers
        if name == "modular_addition":
            continue  # 29 equations have 7 answers as it happens
        expected = sum(answers.values()) / task.possible_answers
        # answers of a sequence depend on each other: far from the few per cent of independent draws
        assert all(0.75 * expected < count < 1.25 * expected for count in answers.values()), name


def test_recall_asks_for_each_key_once_and_mostly_soon() -> None:
    near = far = 0
    for n in range(300):
        tokens, is_answer = TASKS["associative_recall"].sequence("train", 1, n, 64)
        pairs = dict(tokens[1:11].reshape(5, 2).tolist())
        asked = tokens[np.flatnonzero(is_answer) - 1].tolist()
        assert sorted(asked) == sorted(pairs)
        # what is neither a pair nor a question is a value
        others = np.delete(tokens[11:], np.flatnonzero(is_answer)[:, None] - 11 - np.array([0, 1]))
        assert others.min() >= 8
        near += int((np.flatnonzero(is_answer) < 24).sum())
        far += int((np.flatnonzero(is_answer) >= 52).sum())
    assert near > 3 * far


def test_modular_addition_validates_on_other_equations() -> None:
    task, seen = TASKS["modular_addition"], {}
    for split in get_args(SplitName):
        found: Counter[tuple[int, int]] = Counter()
        for n in range(100):
            rows = task.sequence(split, 3, n, 31).tokens[1:].reshape(-1)[:30].reshape(5, 6)
            found.update((a, b) for a, _, b, _, _, _ in rows.tolist())
        seen[split] = found
    assert not seen["train"].keys() & seen["val"].keys()
    assert (len(seen["train"]), len(seen["val"])) == (29, 20)  # 0.6 of 49
    # 500 draws: epoch by epoch
    assert set(seen["train"].values()) == {17, 18}
    assert set(seen["val"].values()) == {25}


@pytest.mark.parametrize(
    ("task", "context_length", "message"),
    [
        (
            Induction(vocabulary=15),
            32,
            r"data\.task\.vocabulary=15 is too small for rows of up to .* = 16 .*: raise it",
        ),
        (Induction(vocabulary=16), 7, r"model\.context_length=7 .* use 8 or more"),
        (
            AssociativeRecall(keys=9, values=9, pairs=9, gap_power=1),
            32,
            r"data\.task\.pairs=9 do not fit: use 8 or less",
        ),
        (
            AssociativeRecall(keys=3, values=9, pairs=4, gap_power=1),
            32,
            r"data\.task\.pairs=4 do not fit: use 3 or less",
        ),
        (ModularAddition(modulus=7, train_fraction=0.5), 5, r"model\.context_length=5 holds no equation: use 6"),
        (ModularAddition(modulus=3, train_fraction=0.01), 32, "leaves no equation to the train split"),
    ],
)
def test_what_does_not_fit_is_refused(task: Task, context_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(context_length)


@pytest.mark.parametrize("name", TASKS)
def test_the_options_fit_the_default_model(name: str) -> None:
    resolved = config.plain(config.compose([f"data={name}"]))
    assert not components.check(resolved)
    task = build(resolved["data"]["task"])
    task.check(resolved["model"]["context_length"])
    assert type(task) is type(TASKS[name])
    assert (CONF_DIR / "data" / f"{name}.yaml").exists()


def test_tokens_that_are_no_answers_are_negative() -> None:
    task = TASKS["induction"]
    dataset = TaskSequences(task, "train", 1, 32)
    batch = dataset.__getitems__([5, 9])
    assert batch.dtype == torch.int64
    assert torch.equal(batch, torch.cat([dataset.__getitems__([5]), dataset.__getitems__([9])]))
    tokens, is_answer = task.sequence("train", 1, 9, 32)
    assert np.array_equal(batch[1].numpy() >= 0, is_answer)
    assert np.array_equal(np.where(is_answer, batch[1].numpy(), ~batch[1].numpy()), tokens)


# --------------------------------------------------------------------------------------------------------------------
# Symbols


@given(st.lists(st.integers(0, 13)))
def test_symbols_are_read_back(ids: list[int]) -> None:
    tokenizer = SymbolTokenizer(TASKS["associative_recall"].symbols)
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids
    again = SymbolTokenizer.from_json(tokenizer.to_json())
    assert again.decode(ids) == tokenizer.decode(ids)
    assert again.sha256 == tokenizer.sha256


def test_what_is_no_symbol_is_refused() -> None:
    tokenizer = SymbolTokenizer(TASKS["modular_addition"].symbols)
    assert tokenizer.encode("3 + 6 =").tolist() == [3, 7, 6, 8]
    assert tokenizer.decode([3, tokenizer.eos_id, 99]) == f"3 {EOS}"
    with pytest.raises(ValueError, match="9 is no symbol of this task: known are 0 … ="):
        tokenizer.encode("9 + 1")
    with pytest.raises(ValueError, match="endoftext"):
        tokenizer.encode(EOS)
    with pytest.raises(ValueError, match="not the symbols"):
        SymbolTokenizer.from_json('{"type": "byte"}')
    assert SymbolTokenizer([str(i) for i in range(65_536)]).encode("65535 0").tolist() == [65_535, 0]
