"""How far a preparation is, on a terminal."""

import time
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thunderhead.corpus.batch_processing import Batch
from thunderhead.corpus.sources import Source


class Passes:
    """A progress bar for each pass, on a terminal: bytes read, tokens per second, and the time left."""

    def __init__(self, sources: Mapping[str, Source]):
        sizes = [source.disk_bytes() for source in sources.values()]
        self._total = None if None in sizes else sum(size for size in sizes if size is not None)
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Passes":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Begin a pass."""
        self._finish()
        self._bar.add_task(what, total=self._total, tokens="")
        self._tokens = self._tokens_now = 0
        self._begun: float | None = None

    def _finish(self) -> None:
        """Show the pass that ends as complete: whoever trains a tokenizer may need no text."""
        for task in self._bar.tasks[-1:]:
            self._bar.update(task.id, completed=task.total or task.completed, total=task.total or task.completed)

    def advance(self, read: int, *, n_tokens: int = 0, from_before: bool = False) -> None:
        """Show that `read` bytes are done in all. The rate counts what is done now, not before an interruption."""
        self._tokens += n_tokens
        if not from_before:
            self._begun = self._begun or time.monotonic()
            self._tokens_now += n_tokens
        tokens = ""
        if self._tokens:
            seconds = time.monotonic() - self._begun if self._begun is not None else 0.0
            rate = f", {self._tokens_now / seconds / 1e3:,.0f} k/s" if seconds > 0.5 else ""
            tokens = f"{self._tokens / 1e6:.1f} M tokens{rate}"
        self._bar.update(self._bar.tasks[-1].id, completed=read, tokens=tokens)

    def told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and show how far they were read."""
        for batch in batches:
            yield batch
            self.advance(batch.read)
