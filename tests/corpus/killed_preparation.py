"""A preparation to be killed, in a process of its own, which writes down what it does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thunderhead.core.data.manifest import Manifest
from thunderhead.corpus import batches
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.datatrove_engine import Datatrove
from thunderhead.corpus.engines import Local
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.prepare import run
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import BpeTokenizer

LOG, SECONDS = "PREPARATION_LOG", "PREPARATION_SECONDS"  # in the environment: tasks have processes of their own


def note(what: str, n: int) -> None:
    """Write down that something was done to n documents, and take some time."""
    with open(os.environ[LOG], "a") as log:
        log.write(f"{what} {n}\n")
    time.sleep(float(os.environ[SECONDS]))


class Slow(BpeTokenizer):
    name = "bpe"  # by which it is found again

    def train(self, texts):
        note("trained", 1)
        return super().train(texts)

    def encode_batch(self, texts: Sequence[str]):
        note("encoded", len(texts))
        return super().encode_batch(texts)


class Deduplicate(Filter):
    """Removes documents that end as an earlier one did: it must remember the order."""

    def settings(self) -> dict[str, Any]:
        return {"characters": 20}

    def inspect(self, text: str) -> str:
        note("inspected", 1)
        return text[-20:]

    def decide(self, evidence: Iterator[str], folder: Path) -> Iterator[str | None]:
        seen: set[str] = set()
        for end in evidence:
            yield "ends as another" if end in seen else None
            seen.add(end)


def prepare(
    log: str, corpus: str, shards_dir: str, *, seconds: float, processes: int, curate: bool, tasks: int | None = None
) -> Manifest | None:
    """Prepare a folder of text in batches of some documents."""
    os.environ |= {LOG: log, SECONDS: str(seconds)}
    batches.BATCH_CHARACTERS = 5000
    filters = {"duplicates": Deduplicate()} if curate else {}
    made_from = Preparation({"text": LocalText(path=corpus)}, Slow(vocab_size=300), shards_dir, 0.2, filters=filters)
    return run(made_from, Local(processes=processes) if tasks is None else Datatrove(tasks=tasks, workers=2))


class Killable:
    """`prepare` in a process of its own."""

    def __init__(
        self,
        corpus: Path,
        folder: Path,
        *,
        seconds: float,
        processes: int = 1,
        curate: bool = False,
        tasks: int | None = None,
    ):
        self._log = folder / "log"
        settings = {"log": str(self._log), "corpus": str(corpus), "shards_dir": str(folder / "shards")}
        settings |= {"seconds": seconds, "processes": processes, "curate": curate, "tasks": tasks}
        folder_of_this = str(Path(__file__).parent)
        program = f"import sys; sys.path.insert(0, {folder_of_this!r}); import {__name__} as this; this.main()"
        self.process = subprocess.Popen([sys.executable, "-c", program, json.dumps(settings)])

    def kill_after(self, what: str, n: int) -> None:
        """Wait until something was done to n documents in all, and kill -9."""
        self.wait_for(what, n)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait_for(self, what: str, n: int) -> None:
        """Wait until something was done to n documents, by this process and those before."""
        while count(self._log, what) < n:
            assert self.process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)


def count(log: Path, what: str) -> int:
    """Count the documents to which something was done."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    """Prepare by the settings of the command line."""
    prepare(**json.loads(sys.argv[1]))
