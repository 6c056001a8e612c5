"""Tasks of lm-evaluation-harness while a run trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from thunderhead import extras
from thunderhead.core.config import ConfigError
from thunderhead.core.module import LanguageModel
from thunderhead.core.types import NonNegativeInt, PathText, PositiveInt, Problem
from thunderhead.parallel.strategies import whole_weights
from thunderhead.release.command import Loaded
from thunderhead.training import record


class EvaluateTasks(Callback):
    """Do tasks at each validation: their numbers are further metrics of it, val/<task>_<metric>.

    So they are in logs and the summary; what each example gave is kept, and reports compare arms on it, paired by
    example and seed. Nothing else of the run changes. One example of each task is done before training, to find what is
    wrong with it; each rank does all.

    - tasks: names. tasks_path: a folder of task files (.yaml) of one's own.
    - num_fewshot, limit, batch_size: as of evaluate.py.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        tasks_path: PathText | None = None,
        num_fewshot: NonNegativeInt | None = None,
        limit: PositiveInt | None = None,
        batch_size: PositiveInt = 8,
    ):
        self.tasks, self.folder = [*tasks], None if tasks_path is None else Path(tasks_path)
        self.asked = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}

    def problems(self, run: Any) -> list[Problem]:
        """Tasks that nobody knows, and runs that cannot do any."""
        found = whole_weights(run, "tasks are done by whole weights")
        if not self.tasks:
            found.append(Problem("callbacks.tasks.tasks", "names no task: callbacks.tasks.tasks=[lambada_openai]"))
        if self.folder is not None and not self.folder.is_dir():
            message = f"{self.folder} is no folder: give one that holds task files (.yaml)"
            return [*found, Problem("callbacks.tasks.tasks_path", message)]
        try:
            from thunderhead.release.harness import manager_of

            self._manager = manager_of(self.tasks, self.folder)
        except ImportError:
            message = f"needs lm-evaluation-harness: {extras.install('eval')}"
            found.append(Problem("callbacks", message))
        except ConfigError as error:
            found += [Problem("callbacks.tasks.tasks", problem.message) for problem in error.problems]
        return found

    def _numbers(self, trainer: Trainer, pl_module: LightningModule, **changes: Any) -> dict[str, float]:
        from thunderhead.release.harness import evaluate_tasks

        assert isinstance(pl_module, LanguageModel)
        context = trainer.precision_plugin.forward_context
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        loaded = Loaded(pl_module.decoder, tokenizer, pl_module.device, context)
        with isolate_rng(), context():
            found, self._examples = evaluate_tasks(loaded, self.tasks, self._manager, **self.asked | changes)
        return record.scores_of(found)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is wrong with a task before there is anything to lose."""
        pl_module.eval()
        self._numbers(trainer, pl_module, limit=1)
        pl_module.train()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the numbers beside the loss."""
        if not trainer.sanity_checking:
            for name, value in self._numbers(trainer, pl_module).items():
                pl_module.log(f"val/{name}", value, logger=False, sync_dist=False)
            if trainer.is_global_zero:
                place = Path(trainer.default_root_dir)
                record.keep_examples(place, "last", self._examples, trainer.global_step)
