"""`profile=true`: where the time of a step goes."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from thunderhead.training import display

WARM_UP = 5  # steps in which allocators, caches and compilers settle
RECORDED = 3  # steps
ROWS = 15  # of the printed table


class ProfileSteps(Callback):
    """Record RECORDED optimizer steps, after WARM_UP of them, with torch.profiler.

    `folder` gets a trace of each rank, *.pt.trace.json, for https://ui.perfetto.dev and TensorBoard's profiler plugin,
    and table.txt, all operators by their own time. The slowest are printed. Short runs are recorded from earlier on.

    Args:
        folder: made when the trace is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._first: int | None = None
        self._profiler: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the steps."""
        left = trainer.max_steps - trainer.global_step
        self._first = trainer.global_step + max(0, min(WARM_UP, left - RECORDED))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin with the first micro-batch of the first step."""
        if trainer.global_step == self._first and self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu(trainer) else [])]
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End with the last one."""
        assert self._first is not None
        if self._profiler is not None and trainer.global_step >= self._first + RECORDED:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run with fewer steps has shown all that it has."""
        if self._profiler is not None:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        assert self._profiler is not None
        profiler, self._profiler, self._first = self._profiler, None, -1
        profiler.stop()
        tensorboard_trace_handler(str(self.folder), worker_name=f"rank{trainer.global_rank}")(profiler)
        if not trainer.is_global_zero:
            return
        operators = profiler.key_averages()
        on_gpu = _on_gpu(trainer)
        times = {row.key: (row.self_device_time_total if on_gpu else row.self_cpu_time_total) for row in operators}
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        (self.folder / "table.txt").write_text(operators.table(sort_by=key, row_limit=-1))
        display.show_profile(
            sorted(((row.key, row.count, times[row.key]) for row in operators), key=lambda row: -row[2])[:ROWS],
            total=sum(times.values()),
            folder=self.folder,
        )


def _on_gpu(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"  # a machine may have a GPU that this run does not use
