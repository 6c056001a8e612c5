"""How far preparing has come: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import Progress, TextColumn

from thunderhead.corpus.sources import Source
from thunderhead.terminal import TELL_SECONDS, duration, say, size


class Passes(Progress):
    """A progress bar of the pass under way: bytes read, tokens per second, the time left; in a pipe or log, lines."""

    def __init__(self, sources: Mapping[str, Source], *, log: Callable[[str], object] | None = None, tasks: int = 1):
        """`log` is where one of several `tasks`, which share the sources, tells how far it is."""
        sizes = [source.disk_bytes() for source in sources.values()]
        self._bytes = None if None in sizes else sum(filter(None, sizes)) // tasks
        self._say = log or say
        console = Console(stderr=True)
        tokens = TextColumn("{task.fields[tokens]}")
        shown = console.is_terminal and log is None
        super().__init__(*self.get_default_columns(), tokens, console=console, disable=not shown)
        self._told = time.monotonic()

    def begin(self, what: str) -> None:
        for task in self.task_ids:
            self.remove_task(task)
        self.add_task(what, total=self._bytes, tokens="")
        self._tokens = 0

    def add(self, read: int) -> None:
        """Show that `read` more bytes are done."""
        self.update(self.task_ids[0], advance=read)
        self._tell()

    def reach(self, read: int, n_tokens: int = 0) -> None:
        """Show that `read` bytes are done in all, the last of them `n_tokens` tokens."""
        (task,) = self.tasks
        self._tokens += n_tokens
        tokens = f"{self._tokens / 1e6:.1f} M tokens" if self._tokens else ""
        if tokens and task.speed:  # bytes a second, of late
            tokens += f", {task.speed * self._tokens / read / 1e3:,.0f} k/s"
        self.update(task.id, completed=read, tokens=tokens)
        self._tell()

    def _tell(self) -> None:
        if not self.disable or time.monotonic() - self._told < TELL_SECONDS:
            return
        self._told, (task,) = time.monotonic(), self.tasks
        share = f"{task.percentage:.0f} %" if task.total else f"{size(int(task.completed))} read"
        left = f", about {duration(task.time_remaining)} left" if task.time_remaining else ""
        self._say(
            f"  {task.description}: {share}{left}" + (f", {task.fields['tokens']}" if task.fields["tokens"] else "")
        )
