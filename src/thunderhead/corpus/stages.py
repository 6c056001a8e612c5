"""What preparing does, stage by stage, each by one task or shared out among several.

What is done is kept beside the place of the shards until they are complete, so that the next call goes on where a
killed one stopped:

    <shards_dir>/.<key>.preparing/begun.json                          what is prepared, and by how many tasks
                                 /inspected/<task>, kept, curation.json   what filters found and decided, if any
                                 /counted/…                           documents that each task inspected, and related
                                 /measured/<task>                     characters of each source, if its tail is held out
                                 /related/<task>, sides               for near duplicates on one side of the split
                                 /tokenizer.json                      trained
                                 /encoded/<task>                      the tokens of each batch of documents
                                 /shards/…                            becomes <shards_dir>/<key>
"""

import itertools
import json
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from thunderhead import disk
from thunderhead.core.data.manifest import FORMAT, Manifest, Shard, SplitName, TokenizerRecord, sha256_of
from thunderhead.core.environment import hidden, texts
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.batch_processing import (
    Encode,
    Record,
    UselessError,
    Work,
    recorded,
    refuse_ends_inside,
    remembered,
)
from thunderhead.corpus.batches import CHANGED, Batches, share
from thunderhead.corpus.curation import Inspect, curate
from thunderhead.corpus.overlap import Overlap
from thunderhead.corpus.passes import Passes
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.sources import INSIDE, refusal
from thunderhead.disk import write_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """The stages of one preparation. Whatever the number of tasks and of kills, the shards have the same bytes."""

    preparation: Preparation
    key: str
    fingerprints: dict[str, dict[str, Any]]
    work: Path
    tasks: int = 1

    def names(self) -> list[tuple[str, int]]:
        """The stages in their order, and by how many tasks each is done."""
        preparation, one, tasks = self.preparation, 1, self.tasks
        curation = [("inspect", tasks), ("decide", one)] if preparation.filters else []
        tail = [("measure", tasks)] if preparation.validation == "tail" else []
        together = [("relate", tasks), ("settle", one)] if preparation.near_duplicates_together else []
        shared = [("encode", tasks)] if tasks > 1 else []  # one task writes what it encodes
        return [("verify", tasks), *curation, *tail, *together, ("train", one), *shared, ("write", one)]

    def run(self, stage: str, rank: int, passes: Passes, processes: int = 1) -> None:
        """Do one task of a stage, or go on with it; those of the stages before must be done."""
        with disk.naming(self.work):
            getattr(self, f"_{stage}")(rank, passes, processes)

    def _is_done(self, *names: str) -> bool:
        """Whether files that a stage ends with are there as it wrote them; damaged ones are made again."""
        files, seal = [self.work / name for name in names], self.work / f"{names[0]}.sha256"
        if not all(file.exists() for file in (*files, seal)):
            return False
        if seal.read_text(encoding="utf-8", errors="replace") == self._sums(*names):
            return True
        _log.warning("%s is damaged: it is made again", " or ".join(map(str, files)))
        return False

    def _done(self, *names: str) -> None:
        write_text(self.work / f"{names[0]}.sha256", self._sums(*names))

    def _sums(self, *names: str) -> str:
        return "\n".join(sha256_of(self.work / name) for name in names)

    def _verify(self, rank: int, passes: Passes, _: int) -> None:
        """Read what is cheap to read, so that all that is wrong with it is said before work starts."""
        passes.begin("Checking")
        faults: list[str] = []
        mine = self._parts(rank)
        for name, source in self.preparation.sources.items():
            look = partial(source.verify, passes.add, *([mine[name]] if mine else []))
            faults += refusal(name, look) if not mine or mine[name] else []
        if faults:
            raise ValueError("; ".join(faults))

    def _inspect(self, rank: int, passes: Passes, processes: int) -> None:
        if self._is_done("curation.json", "kept"):
            return
        passes.begin("Curating")
        batches = Batches(self.preparation.sources, self._parts(rank))
        self._look(
            "inspected", Inspect(self.preparation.filters), batches, rank=rank, passes=passes, processes=processes
        )

    def _look(self, what: str, work: Work[Any], batches: Batches, *, rank: int, passes: Passes, processes: int) -> None:
        """Remember what a look at a task's documents finds, and how many there are: by that others know their own."""
        n_documents = 0
        for record in remembered(work, batches, processes, self._file(what, rank)):
            n_documents += len(record.ids)
            passes.reach(record.read)
        write_text(self._count(what, rank), str(n_documents))

    def _count(self, what: str, rank: int) -> Path:
        return self.work / "counted" / f"{what}-{rank:05d}"

    def _before(self, what: str, rank: int) -> int:
        """How many documents the tasks before this one have looked at."""
        return sum(int(self._count(what, before).read_text()) for before in range(rank))

    def _decide(self, _rank: int, passes: Passes, _: int) -> None:
        report = self.work / "curation.json"
        if self._is_done("curation.json", "kept"):
            return
        filters, sources = self.preparation.filters, self.preparation.sources
        passes.begin("Deciding")  # each filter reads anew
        inspected = partial(self._again, "inspected", passes)
        record = curate(filters, sources, inspected, self.work / "kept", self.work)
        write_text(report, json.dumps(record, indent=1) + "\n")
        self._done("curation.json", "kept")
        shutil.rmtree(self.work / "inspected")

    def _measure(self, rank: int, passes: Passes, _: int) -> None:
        """Count the characters of each source."""
        passes.begin("Measuring")
        totals = Counter(dict.fromkeys(self.preparation.sources, 0))
        for batch in self._batches(rank):
            totals[batch.source] += sum(len(document.text) for document in batch.documents)
            passes.reach(batch.read)
        write_text(self._file("measured", rank), json.dumps(totals))

    def _relate(self, rank: int, passes: Passes, processes: int) -> None:
        if self._is_done("sides"):
            return
        from thunderhead.corpus.sides import Relate  # datasketch imports SciPy

        passes.begin("Comparing")
        batches = self._batches(rank, split=self.preparation.split)
        self._look("related", Relate(), batches, rank=rank, passes=passes, processes=processes)

    def _settle(self, _rank: int, passes: Passes, _: int) -> None:
        if self._is_done("sides"):
            return
        from thunderhead.corpus.sides import settle

        whole = {name: source.keeps_whole for name, source in self.preparation.sources.items()}
        passes.begin("Joining near duplicates")
        settle(partial(self._again, "related", passes), whole, self.work / "sides", self.work)
        self._done("sides")
        shutil.rmtree(self.work / "related")

    def _train(self, _rank: int, passes: Passes, _: int) -> None:
        """Train the tokenizer on the training split."""
        if self._is_done("tokenizer.json"):
            return
        passes.begin("Training the tokenizer")

        def texts() -> Iterator[str]:
            before, read = 0, 0  # bytes of tasks before, and of this one
            for rank in range(self.tasks):
                for batch in self._split(rank):
                    for document, held_out in zip(batch.documents, batch.held_out, strict=True):
                        if not held_out:
                            yield document.text
                    passes.reach(before + (read := batch.read))
                before, read = before + read, 0

        write_text(self.work / "tokenizer.json", self.preparation.tokenizer.train(texts()).to_json())
        self._done("tokenizer.json")

    def _trained(self) -> Tokenizer:
        text = (self.work / "tokenizer.json").read_text(encoding="utf-8")
        return type(self.preparation.tokenizer).from_json(text)

    def _encode(self, rank: int, passes: Passes, processes: int) -> None:
        deque(self._encoded(rank, passes, processes), maxlen=0)

    def _encoded(self, rank: int, passes: Passes, processes: int) -> Iterator[Record]:
        """Encode a task's share, or go on with it."""
        passes.begin("Tokenizing")
        trained = self._trained()
        for record in remembered(Encode(trained), self._split(rank), processes, self._file("encoded", rank)):
            refuse_ends_inside(record, trained.eos_id)
            yield record
            passes.reach(record.read, n_tokens=len(record.result.tokens))
        reading = {name: source.reading() for name, source in self.preparation.sources.items()}
        write_text(self._file("encoded", rank).with_suffix(".json"), json.dumps(reading))

    def _write(self, _rank: int, passes: Passes, processes: int) -> None:
        """Write the shards, compare what they were made from with what is there now, and give them their name."""
        shards = self.work / "shards"
        shutil.rmtree(shards, ignore_errors=True)  # half-written; made again from what is remembered
        shards.mkdir()
        if self.tasks > 1:
            passes.begin("Writing shards")
        encoded = self._again("encoded", passes) if self.tasks > 1 else self._encoded(0, passes, processes)
        content = self._shards(shards, encoded)
        if self.preparation.fingerprints() != self.fingerprints:
            raise UselessError(CHANGED)
        manifest = Manifest(format=FORMAT, key=self.key, sources=texts(self.fingerprints, hidden), **content)
        write_text(shards / "manifest.json", json.dumps(manifest.to_dict(), indent=1) + "\n")
        os.rename(shards, Path(self.preparation.shards_dir, self.key))
        shutil.rmtree(self.work, ignore_errors=True)

    def _again(self, what: str, passes: Passes) -> Iterator[Record]:
        """What a look has found in all tasks, or what they have encoded."""
        before, read = 0, 0  # bytes of tasks before, and of this one
        for file in self._files(what):
            for record in recorded([file]):
                yield record
                n_tokens = len(record.result.tokens) if what == "encoded" else 0
                passes.reach(before + (read := record.read), n_tokens)
            before, read = before + read, 0

    def _shards(self, folder: Path, encoded: Iterator[Record]) -> dict[str, Any]:
        """Write shards, tokenizer and reports; return what the manifest says about them."""
        from thunderhead.corpus.shard_files import ShardWriter  # imports litdata, and torch: tasks need neither

        preparation, trained, files = self.preparation, self._trained(), self._files("encoded")
        splits: dict[SplitName, dict[str, Shard]] = {"train": {}, "val": {}}
        overlap = Overlap()
        for name, of_source in itertools.groupby(encoded, key=lambda record: record.source):
            settings = {"vocab_size": trained.vocab_size, "chunk_bytes": preparation.chunk_bytes}
            writers = {
                split: ShardWriter(folder / name / split, **settings, list_documents=split == "val") for split in splits
            }
            for record in of_source:
                result = record.result
                overlap.add_validation(result.windows, record.held_out)
                documents = np.split(result.tokens, np.cumsum(result.lengths[:-1]))
                for tokens, n_bytes, held_out in zip(documents, result.n_bytes, record.held_out, strict=True):
                    writers["val" if held_out else "train"].add(tokens, int(n_bytes))
            for split, writer in writers.items():
                if (shard := writer.close()) is not None:
                    splits[split][name] = shard
        report = self.work / "curation.json"
        curation = json.loads(report.read_bytes()) if preparation.filters else None
        if curation is not None:
            shutil.copy(report, folder / "curation.json")
            curation = {"filters": {name: rule.settings() for name, rule in preparation.filters.items()}, **curation}
        self._refuse_empty(splits, curation)
        again = ((record.result.windows, record.held_out) for record in recorded(files))
        validation = {"documents": overlap.judged, "near_duplicates": overlap.near_duplicates(again)}
        reading = {"sources": self._reading(), "validation": validation}
        write_text(folder / "reading.json", json.dumps(texts(reading, hidden), indent=1) + "\n")
        write_text(folder / "tokenizer.json", trained.to_json())
        return {
            "eos_id": trained.eos_id,
            "vocab_size": trained.vocab_size,
            "max_token_id": max(shard.max_token_id for by_source in splits.values() for shard in by_source.values()),
            "dtype": trained.dtype.name,
            "tokenizer": TokenizerRecord(trained.name, preparation.tokenizer.settings, trained.sha256),
            "split_rule": str(preparation.split),
            "validation_fraction": preparation.validation_fraction,
            "splits": splits,
            "curation": curation,
        }

    def _refuse_empty(self, splits: dict[SplitName, dict[str, Shard]], curation: dict[str, Any] | None) -> None:
        for name, source in self.preparation.sources.items():
            path, shards = f"data.sources.{name}", [shards[name] for shards in splits.values() if name in shards]
            if not shards and curation is not None and curation["sources"][name]["documents"] > 0:
                raise UselessError(f"{path}: curation.filters keep none of its documents")
            if not shards:
                raise UselessError(f"{path}: there is no text in it")
            if len(shards) < len(splits):
                lacks_validation = name in splits["train"]
                remedy = self.preparation.split.remedy(name, source, lacks_validation=lacks_validation)
                what = "validation" if lacks_validation else "training"
                found = f"none of its {shards[0].documents} documents fell to the {what} split"
                raise UselessError(f"{path}: {found}: {remedy}")

    def _reading(self) -> dict[str, dict[str, Any]]:
        """Add up what sources say of their files in all tasks; nothing of those without files."""
        of_tasks = [json.loads(file.with_suffix(".json").read_bytes()) for file in self._files("encoded")]
        found = {name: [task[name] for task in of_tasks if task[name]] for name in self.preparation.sources}
        return {name: _total_reading(readings) for name, readings in found.items() if readings}

    def _parts(self, rank: int) -> dict[str, range] | None:
        return share(self.preparation.sources, rank, self.tasks) if self.tasks > 1 else None

    def _batches(self, rank: int, **more: Any) -> Batches:
        """What the filters kept of a task's documents."""
        kept = dict[str, Any]()
        if self.preparation.filters:
            kept = {"kept": self.work / "kept", "first": self._before("inspected", rank)}
        return Batches(self.preparation.sources, self._parts(rank), **kept, **more)

    def _split(self, rank: int) -> Batches:
        """The same, divided between training and validation."""
        split, more = self.preparation.split, dict[str, Any]()
        if split.rule == "tail":
            measured = [json.loads(file.read_bytes()) for file in self._files("measured")]
            of_tasks = {name: [task[name] for task in measured] for name in self.preparation.sources}
            more["trained_on"] = {
                name: max(0, split.trained_on(sum(sizes)) - sum(sizes[:rank])) for name, sizes in of_tasks.items()
            }
        if split.together:
            more |= {"sides": self.work / "sides", "first_kept": self._before("related", rank)}
        return self._batches(rank, split=split, **more)

    def _file(self, what: str, rank: int) -> Path:
        return self.work / what / f"{rank:05d}"

    def _files(self, what: str) -> list[Path]:
        return [self._file(what, rank) for rank in range(self.tasks)]


def _total_reading(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up what tasks say of one source: each passed over the same files of its folder, and read other archives."""
    read: Counter[str] = Counter()
    passed: Counter[tuple[str, str]] = Counter()
    for reading in readings:
        read.update(reading["read"])
        for row in reading["passed_over"]:
            kind, n = (row["suffix"], row["why"]), row["files"]
            passed[kind] = passed[kind] + n if row["why"].startswith(INSIDE) else n
    rows = [{"suffix": suffix, "why": why, "files": n} for (suffix, why), n in sorted(passed.items())]
    skipped = [row for reading in readings for row in reading["skipped"]]
    return {"read": dict(sorted(read.items())), "passed_over": rows, "skipped": skipped}
