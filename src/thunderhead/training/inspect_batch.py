"""`python inspect_batch.py`: the text that a step of a run was trained on, found again from its record."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig

from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, read_mapping
from thunderhead.core.data.datamodule import TokenDataModule, asked
from thunderhead.core.run import Problems, build_data
from thunderhead.core.tokenizer import EOS, Tokenizer
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText, PositiveInt
from thunderhead.training import record
from thunderhead.training.resume import CHECKPOINTS, recorded_config


def settings(
    *, run: PathText, step: PositiveInt, sequences: PositiveInt | None = None, trust: Sequence[str] = ()
) -> None:
    """The top-level settings, for the check; conf/inspect_batch.yaml says what each does."""


def text_of_batch(config: DictConfig) -> str:
    """The text of each sequence of a step, with its number and source.

    Raises ConfigError if the configuration is refused, the folder is no run's, or its data is gone or has no order.
    """
    resolved = configuration.plain(config)
    if problems := components.check(resolved, settings):
        raise ConfigError(problems)
    trust_typed(resolved)
    folder, step = Path(resolved["run"]), resolved["step"]
    recorded, plan = recorded_config(folder, "run"), read_mapping(folder / "plan.json", "run", record.Planned)
    steps, per_step = plan["steps"], plan["sequences_per_step"]
    if step > steps:
        raise ConfigError([Problem("step", f"{step} is beyond the plan of the run: it has {steps:,} steps")])
    first = first_sample(step, per_step, rollbacks_of(folder))
    shown = range(first, first + min(per_step, resolved["sequences"] or per_step))
    sizes, found = {"context_length": plan["tokens_per_step"] // per_step, "sequences_per_step": per_step}, Problems()
    with found.collect():
        data = _data(record.with_its_shards(recorded, folder), **sizes)
        data.trainer = SimpleNamespace(max_steps=steps)  # type: ignore[assignment]
        dataset: Any = data.train_dataset(steps)
        tokens_BT1 = dataset.__getitems__([*shown])
    found.refuse()
    place = getattr(dataset, "place", None)
    head = f"step {step:,} of {steps:,}: {per_step:,} sequences from {first:,} on, {data.context_length} tokens each"
    parts = [f"{head}; the first {len(shown):,}" if len(shown) < per_step else head]
    for n, tokens_T1 in zip(shown, tokens_BT1, strict=True):
        told = f"── {n:,}" + ("" if place is None else f" · {place(n).source}, block {place(n).block:,}")
        parts += ["", f"{told} {'─' * (100 - len(told))}", _text(tokens_T1, data.tokenizer, asked(data, "eos_id"))]  # type: ignore[attr-defined]
    return "\n".join(parts)


def _data(config: Config, **sizes: int) -> TokenDataModule:
    data = build_data(config, **sizes)
    if not isinstance(data, TokenDataModule) or not isinstance(getattr(data, "tokenizer", None), Tokenizer):
        message = f"{type(data).__name__} has no samples by their number, or no tokenizer to write them with"
        raise ConfigError([Problem("data", message)])
    if not asked(data, "is_prepared"):
        raise ConfigError(
            [Problem("data", "the shards of this run are not there any more: prepare.py makes them again")]
        )
    data.setup("fit")
    return data


def first_sample(step: int, per_step: int, rollbacks: Sequence[dict[str, int]]) -> int:
    """The number of the first sample of a step: after a rollback, the samples that it left out do not count."""
    first = (step - 1) * per_step
    for event in rollbacks:
        if step > event["to"]:
            first = event["next_sample"] + (step - 1 - event["to"]) * per_step
    return first


def rollbacks_of(folder: Path) -> list[dict[str, int]]:
    """What a run has left out, by its summary, or of one that has not ended by its last checkpoint."""
    last = folder / CHECKPOINTS / "last.ckpt"
    if (summary := record.read_summary(folder)) is not None or not last.is_file():
        return list((summary or {}).get("rollbacks", []))
    content = torch.load(last, map_location="cpu", mmap=True, weights_only=True)
    return list(content["callbacks"]["WatchDivergence"]["rollbacks"])


def _text(tokens_T1: torch.Tensor, tokenizer: Tokenizer, eos_id: int | None) -> str:
    documents: list[list[int]] = [[]]
    for token in torch.where(tokens_T1 < 0, ~tokens_T1, tokens_T1).tolist():  # ~id: read, and not predicted
        if token == eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return f"\n{EOS}\n".join(tokenizer.decode(ids) for ids in documents)
