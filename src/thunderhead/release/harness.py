"""Tasks of EleutherAI's lm-evaluation-harness (extra `eval`) by a model of a run or an export.

Its texts are scored as they stand: nothing is put before a context, and EOS stands for an empty one.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from thunderhead.core.config import ConfigError, Problem, first_line, unknown
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.release.command import Loaded
from thunderhead.release.sample import sample_texts
from thunderhead.release.scoring import Window, scored


def _batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[begin : begin + size] for begin in range(0, len(indices), size)]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model as the harness asks for it: `batch_size` texts at a time, the longest first."""

    def __init__(self, loaded: Loaded, batch_size: int):
        super().__init__()
        self.loaded, self.batch_size = loaded, batch_size
        self.max_length = loaded.decoder.context_length

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return [int(token) for token in self.loaded.tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability after its context, cut at the left; whether it is the likeliest."""
        cut, found = [], dict[int, tuple[float, bool]]()
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                longest = f"of {len(continuation):,} tokens is longer than the model's context of {self.max_length:,}"
                raise ValueError(f"a continuation {longest}")
            tokens = [*context, *continuation][-self.max_length - 1 :]
            unasked = [IGNORED_TARGET] * (len(tokens) - 1 - len(continuation))
            cut.append(Window(tokens[:-1], unasked + tokens[len(tokens) - len(continuation) :]))
        order = sorted(range(len(cut)), key=lambda index: -len(cut[index].tokens))
        for batch in _batches(order, self.batch_size):
            nats_B, is_likeliest_B = scored(self.loaded.decoder, [cut[index] for index in batch])
            rows = zip((-nats_B).tolist(), is_likeliest_B.tolist(), strict=True)
            found |= dict(zip(batch, rows, strict=True))
        return [found[index] for index in range(len(cut))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text: the log-probability of all of it, in windows as the harness cuts them."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        cut = [
            (index, utils.make_disjoint_window(window))
            for index, tokens in enumerate(texts)
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        ]
        sums = [0.0] * len(texts)
        scores = self._loglikelihood_tokens([(None, *window) for _, window in cut])
        for (index, _), (logprob, _) in zip(cut, scores, strict=True):
            sums[index] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, from the cache, up to a stop text; contexts are cut at the left to leave room for them."""
        found = dict[int, str]()
        asked = [normalize_gen_kwargs(dict(request.args[1])) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-max(1, self.max_length - own["max_gen_toks"]) :]
            for request, own in zip(requests, asked, strict=True)
        ]
        order = sorted(range(len(prompts)), key=lambda index: (repr(asked[index]), -len(prompts[index])))
        for _, alike in itertools.groupby(order, key=lambda index: repr(asked[index])):
            for batch in _batches([*alike], self.batch_size):
                own = asked[batch[0]]
                settings = {name: own[name] for name in ("top_k", "top_p", "min_p") if own.get(name)}
                texts = sample_texts(
                    *self.loaded[:3],
                    [prompts[index] for index in batch],
                    max_new_tokens=own["max_gen_toks"],
                    temperature=own["temperature"],
                    stop=[text for text in own["until"] if text],
                    only_new=True,
                    **settings,
                )
                found |= dict(zip(batch, texts, strict=True))
        return [found[index] for index in range(len(prompts))]


def manager_of(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """What knows the tasks: those of the files in a folder, and the harness's own if others are asked for.

    Raises ConfigError for names that nobody knows.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))  # reads thousands of files
    if wrong := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError([Problem("tasks", f"{task} {unknown(task, manager.all_tasks)}") for task in wrong])
    return manager


def evaluate_tasks(
    loaded: Loaded, tasks: Sequence[str], manager: TaskManager, *, batch_size: int, **asked: Any
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Of each task, and group of tasks, its metrics and their standard errors; and of each task the examples' scores.

    The latter as `thunderhead.training.record.keep_examples` has them; `asked` is handed on to the harness. Raises
    ConfigError if a task cannot be loaded, or not be done by this model.
    """
    model, found = HarnessModel(loaded, batch_size), dict[str, dict[str, float]]()
    try:
        results: Mapping[str, Any] = simple_evaluate(
            model, tasks=[*tasks], task_manager=manager, log_samples=True, batch_size=batch_size, **asked
        )
    except Exception as error:  # of the harness, of datasets, of the hub: whatever a task runs into
        raise ConfigError([Problem("tasks", f"cannot be evaluated: {first_line(error)}")]) from error
    for task, metrics in results["results"].items():
        numbers = {name.removesuffix(",none"): value for name, value in metrics.items()}
        found[task] = {name: float(v) for name, v in numbers.items() if isinstance(v, int | float)}
    return found, {task: _examples(rows, found[task]) for task, rows in results["samples"].items()}


def _examples(rows: Sequence[Mapping[str, Any]], means: Mapping[str, float]) -> dict[str, Any]:
    """What identifies a task's examples, asked as they were, and of each metric that is a mean its value for each."""
    asked, scores = hashlib.sha256(), dict[str, list[float]]()
    for row in rows:
        asked.update(f"{row['prompt_hash']} {row['target_hash']} {row['filter']}\n".encode())
        for metric in row["metrics"]:
            if isinstance(value := row[metric], Real | np.bool_):
                name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
                scores.setdefault(name, []).append(float(value))
    are_means = {name: math.isclose(np.mean(own), means.get(name, math.nan)) for name, own in scores.items()}
    kept = {name: [int(x) if x.is_integer() else x for x in own] for name, own in scores.items() if are_means[name]}
    return {"examples": asked.hexdigest(), "scores": kept}
