"""Datasets of the Hugging Face hub, or of a local folder in the same format, read as a stream by `datasets`."""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from thunderhead import extras
from thunderhead.core.config import first_line
from thunderhead.core.types import PathText, PositiveInt
from thunderhead.corpus.content import listing
from thunderhead.corpus.records import text_of
from thunderhead.corpus.sources import Document, Source
from thunderhead.corpus.text_files import cut, walk

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class HuggingFaceDataset(Source):
    """Records of a dataset, in its order. Only what is read is downloaded, and no copy is kept beside the shards.

    The fingerprint of a dataset on the hub is its name and settings, as asking the hub would need the network in every
    run: give a commit as `revision` to tell its versions apart. Each pass reads the stream anew.
    """

    _: KW_ONLY
    dataset: PathText  # name on the hub (HuggingFaceFW/fineweb-edu), or a folder of .parquet, .jsonl … files
    subset: str | None = None  # its configuration; null: the only one
    split: str = (
        "train"  # that is read; train+validation: one after the other, told apart by data.validation=validation
    )
    revision: str | None = None  # commit, tag or branch; null: main
    text_field: str = "text"  # the column that holds the text
    begins: str | None = None
    """A regular expression, for datasets whose rows are lines: a row that it matches begins a document, and other rows
    belong to the document before. null: a row is a document."""
    max_bytes: PositiveInt | None = None  # stop after so many bytes of text; null: read all
    max_document_bytes: Annotated[int, Ge(64)] | None = None  # cut longer documents at line ends; null: never

    keeps_whole = True

    def __post_init__(self) -> None:
        try:
            self._begins = re.compile(self.begins) if self.begins is not None else None
        except re.error as error:
            raise ValueError(f"begins={self.begins} is no regular expression ({error})") from None

    @property
    def _folder(self) -> Path | None:
        """The local folder; None for a dataset on the hub, whose name is `name` or `owner/name`."""
        path = Path(self.dataset).expanduser()
        named_as_path = self.dataset.startswith((".", "/", "~")) or self.dataset.count("/") > 1
        return path if named_as_path or path.exists() else None

    @property
    def _what(self) -> str:
        return f"{self.dataset} ({', '.join(part for part in (self.subset, self.split) if part)})"

    def fingerprint(self) -> dict[str, Any]:
        names = ("subset", "split", "text_field", "begins", "max_bytes", "max_document_bytes")
        if self._folder is None:
            return self._settings(*names, "dataset", "revision")
        return {**self._settings(*names), **listing(self._files(self._folder), sampled=self.sampled)}

    def _files(self, folder: Path) -> list[tuple[str, Path]]:
        if not folder.is_dir():
            raise ValueError(f"dataset={self.dataset} is no folder, and no name of a dataset on huggingface.co")
        return list(walk(folder))

    def disk_bytes(self) -> int | None:
        return self.max_bytes

    def check(self) -> None:
        if self._folder is not None:
            self._files(self._folder)
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"needs the package datasets: {extras.install('huggingface')}")

    def connect(self) -> None:
        if self._folder is None:
            self._reach_hub()
        for split in self._streams:
            next(self._lines(split), None)

    def _reach_hub(self) -> None:
        """Ask the hub for the dataset, before anything is downloaded."""
        needs = f"dataset={self.dataset} is read from huggingface.co, over the network"
        instead = "use data=text with files of your own, or name a folder"
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
                raise ValueError(f"{needs}, and {variable} is set: unset it, {instead}")
        from huggingface_hub import HfApi

        size = "all of it" if self.max_bytes is None else f"{self.max_bytes / 1e9:,.3g} GB of text"
        _log.warning("Reading %s from huggingface.co: this downloads %s", self._what, size)
        try:
            HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(self.dataset, revision=self.revision, timeout=20)
        except Exception as error:  # whatever the HTTP library of the day raises; the hub says what to do
            raise ValueError(f"{needs}, which does not give it ({' '.join(str(error).split())}): {instead}") from None

    @cached_property
    def _streams(self) -> dict[str, Any]:
        import datasets

        dataset = self.dataset if self._folder is None else str(self._folder)
        load = partial(datasets.load_dataset, dataset, self.subset, revision=self.revision, streaming=True)
        try:
            return {split: load(split=split) for split in self.split.split("+")}
        except Exception as error:  # a ValueError or a class of datasets' own
            raise ValueError(f"{self._what} cannot be read: {first_line(error)}") from None

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows, or raise: ValueError if they cannot be read, ConnectionError if only the network failed."""
        stream = self._streams[split]
        try:
            yield from stream
        except Exception as error:
            if self._folder is not None:
                raise ValueError(f"{self._what} cannot be read: {first_line(error)}") from error
            message = f"{self._what}: reading from huggingface.co failed ({first_line(error)}): start again to go on"
            raise ConnectionError(message) from error

    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        read = 0
        for split in self._streams:
            for first_row, text in self._texts(split):
                size = len(text.encode())
                for part, piece in enumerate(cut([text], self.max_document_bytes)):
                    yield Document(f"{split}:{first_row}#{part}", piece)
                read += size
                on_read(size)
                if self.max_bytes is not None and read >= self.max_bytes:
                    return

    def _texts(self, split: str) -> Iterator[tuple[int, str]]:
        """Yield (number of the first row, text) of each document, without empty ones."""
        begun, held = 0, ""
        for row, text in self._lines(split):
            if self._begins is None or self._begins.search(text):
                if held:
                    yield begun, held
                begun, held = row, ""
            held += text
        if held:
            yield begun, held

    def _lines(self, split: str) -> Iterator[tuple[int, str]]:
        for number, row in enumerate(self._rows(split)):
            if (text := text_of(row, self.text_field, f"{self._what}, row {number} of {split}")) is not None:
                yield number, text
