"""Synthetic tasks (`thunderhead.options.synthetic_tasks`) as the data of a run."""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import ENDLESS, Draw, TokenDataModule
from thunderhead.core.data.manifest import SplitName
from thunderhead.core.run import Problems
from thunderhead.core.types import PositiveInt
from thunderhead.options.synthetic_tasks import SymbolTokenizer, Task


class TaskSequences(Dataset[Tensor]):
    """Sequences of a task by number; a list of numbers gives a batch (B, T+1) of int64.

    A token that is no answer is written as ~id = -1 - id: to be read, not to be predicted (`core.module`).
    """

    def __init__(self, task: Task, split: SplitName, seed: int, context_length: int):
        self._make = partial(task.sequence, split, seed, context_length=context_length)

    def __len__(self) -> int:
        return ENDLESS

    def __getitems__(self, samples: list[int]) -> Tensor:
        made = [self._make(n) for n in samples]
        return torch.from_numpy(np.stack([np.where(each.is_answer, each.tokens, ~each.tokens) for each in made]))


@dataclass(eq=False, repr=False, kw_only=True)
class TaskData(TokenDataModule):
    """Sequences of a task: there is nothing to prepare, and no end.

    - max_validation_tokens: validate on the first sequences of so many tokens, the same for all seeds.
    """

    task: Task
    max_validation_tokens: PositiveInt = 65_536

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer = SymbolTokenizer(self.task.symbols)
        self.vocab_size, self.eos_id = self.tokenizer.vocab_size, self.tokenizer.eos_id
        self.unigram_entropy = math.log(self.task.possible_answers)  # of who knows only which answers there are

    def problems(self, run: Any) -> list[Problem]:
        found = Problems()
        with found.collect():
            self.setup("fit")
        if getattr(run.budget, "needs_epochs", False):
            found.note(Problem("budget.epochs", "a synthetic task has no epochs: use budget=steps or budget=tokens"))
        return found

    def setup(self, stage: str) -> None:
        self.task.check(self.context_length)

    def draw(self, steps: int) -> Draw:
        return Draw(steps, epochs={})

    def summary(self) -> dict[str, Any]:
        return self.task.summary()

    def validation_metrics(self, source: str) -> dict[str, Any]:
        return {"accuracy": is_most_probable}

    def validation_data(self) -> str:
        content = json.dumps([self.task.summary(), self.max_validation_tokens, self.context_length], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    validation_text = validation_data

    def sample(self, decoder: Any, device: torch.device) -> str:
        return sample_answers(decoder, self.task, device)

    def train_dataset(self, steps: int) -> TaskSequences:
        return TaskSequences(self.task, "train", self.seed, self.context_length)

    def validation_blocks(self) -> dict[str, int]:
        return {"task": max(1, self.max_validation_tokens // self.context_length)}

    def val_dataset(self, source: str) -> TaskSequences:
        return TaskSequences(self.task, "val", self.seed, self.context_length)


def is_most_probable(logits: Tensor, targets: Tensor) -> Tensor:
    """Say whether the most probable token is the target, (B, T) of 0 and 1; NaN where a score is."""
    return (logits.argmax(dim=-1) == targets).float().masked_fill(logits.isnan().any(dim=-1), math.nan)


@torch.inference_mode()
def sample_answers(decoder: Any, task: Task, device: torch.device, sequences: int = 3) -> str:
    """Write the first validation sequences of a task, a line each, with the model's most probable answers.

    A right answer is marked as v7✓, a wrong one shows what the model said instead: v7✗v2.
    """
    symbols, lines, was_training = [*task.symbols, "|"], [], decoder.training
    decoder.eval()
    for n in range(sequences):
        tokens, is_answer = task.sequence("val", 0, n, decoder.context_length)
        logits_TV = decoder.logits(torch.from_numpy(tokens[None, :-1]).to(device))[0]
        written = [symbols[token] for token in tokens]
        for place in np.flatnonzero(is_answer):
            said = int(logits_TV[place - 1].argmax())
            told = symbols[said] if said < len(symbols) else "?"  # a row of a larger vocabulary
            written[place] += "✓" if said == tokens[place] else f"✗{told}"
        lines.append(" ".join(written))
    decoder.train(was_training)
    return "\n".join(lines)
