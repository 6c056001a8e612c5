"""A logger as somebody else would write it: JSON lines in a file, by Lightning's interface alone."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class JsonLines(Logger):
    """One line for the settings, one for each row, one for each text."""

    def __init__(self, save_dir: str, *, file: str = "log.jsonl"):
        super().__init__()
        self._file = Path(save_dir) / file

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._write(settings=params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._write(step=step, **metrics)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._write(text=name, content=text, step=step)

    def _write(self, **content: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(content) + "\n")
