"""`profile=true`: where the time of a step goes."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from thunderhead import disk
from thunderhead.training import display

WARM_UP = 5  # steps in which allocators, caches and compilers settle
RECORDED = 3  # steps
ROWS = 15  # of the printed table


class ProfileSteps(Callback):
    """Record RECORDED optimizer steps, after WARM_UP of them, with torch.profiler.

    `folder` gets a trace of each rank, *.pt.trace.json, for https://ui.perfetto.dev and TensorBoard's profiler plugin,
    and table.txt, all operators by their own time. The slowest are printed. Short runs are recorded from earlier on.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._first = 0
        self._profiler: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = trainer.max_steps - trainer.global_step
        self._first = trainer.global_step + max(0, min(WARM_UP, left - RECORDED))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._first and self._profiler is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _on_gpu(trainer) else [])]
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self._first + RECORDED:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run with fewer steps has shown all that it has."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        with disk.naming(self.folder):
            tensorboard_trace_handler(str(self.folder), worker_name=f"rank{trainer.global_rank}")(profiler)
        if trainer.is_global_zero:
            key = "self_device_time_total" if _on_gpu(trainer) else "self_cpu_time_total"
            operators = profiler.key_averages()
            disk.write_text(self.folder / "table.txt", operators.table(sort_by=key, row_limit=-1))
            own_times = sorted(((row.key, row.count, getattr(row, key)) for row in operators), key=lambda row: -row[2])
            display.show_profile(own_times[:ROWS], total=sum(time for *_, time in own_times), folder=self.folder)


def _on_gpu(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"  # a machine may have a GPU that this run does not use
