"""`python prepare.py merge=[a,b,c] out=…`: shards that were prepared by themselves, as one corpus."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thunderhead import disk
from thunderhead.core.config import ConfigError, Problem, quoted
from thunderhead.core.data.manifest import Manifest, Shard, ShardError, SplitName
from thunderhead.corpus.prepare import read_reading
from thunderhead.corpus.shard_files import verify
from thunderhead.terminal import say

EQUAL = {"split_rule": "rules of what is held out", "validation_fraction": "parts that are held out"}
"""What parts of one corpus must have in common, with its name in a refusal."""


def merge(folders: Sequence[str], out: Path) -> Manifest:
    """Make one folder of shards from several of one tokenizer; the files are linked where the file system can.

    Sources keep their names, and get a number where two have the same: text, text-2. Nothing is read but to compare
    checksums, and near duplicates between the parts are not looked for. ConfigError with all that stands in the way.
    """
    parts, problems = [], []
    for folder in folders:
        try:
            parts.append(part := Manifest.load(folder))
            part.load_tokenizer()
        except ShardError as error:
            problems.append(Problem("merge", str(error)))
    if len(folders) < 2:
        problems.append(Problem("merge", "give the folders of two or more prepared shards: merge=[a,b] out=…"))
    if out.exists():
        problems.append(Problem("out", f"{out} exists already: give another folder"))
    if problems or (problems := list(_contradictions(parts))):
        raise ConfigError(problems)
    named = dict(_named(parts))
    reading = _reading(parts, named)
    for part in parts:
        say(f"Comparing the checksums of {part.folder}")
        try:
            verify(part)
        except ShardError as error:
            raise ConfigError([Problem("merge", str(error))]) from error
    work = out.with_name(f".{out.name}.merging")
    shutil.rmtree(work, ignore_errors=True)  # of a merge that was interrupted
    with disk.naming(out):
        try:
            work.mkdir(parents=True)
            for name, (part, source) in named.items():
                shutil.copytree(part.folder / source, work / name, copy_function=_link)
            shutil.copy(parts[0].folder / "tokenizer.json", work)
            disk.write_text(work / "reading.json", json.dumps(reading, indent=1) + "\n")
            disk.write_text(work / "manifest.json", json.dumps(_manifest(parts, named).to_dict(), indent=1) + "\n")
            os.rename(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Manifest.load(out)


Named = dict[str, tuple[Manifest, str]]
"""Of each source of the whole, by its name there: which part has it, and under which name."""


def _contradictions(parts: Sequence[Manifest]) -> Iterator[Problem]:
    first = parts[0]
    for part in parts[1:]:
        two = f"{first.folder} and {part.folder} have different"
        if _tokenizer(first) != _tokenizer(part):
            file = quoted(first.folder / "tokenizer.json")
            remedy = f"prepare the text of the second anew by the tokenizer of the first: its file is {file}"
            yield Problem("merge", f"{two} tokenizers: {remedy}")
        for field, what in EQUAL.items():
            ours, theirs = getattr(first, field), getattr(part, field)
            if ours != theirs:
                values = "" if field == "split_rule" else f" ({ours}, {theirs})"
                yield Problem("merge", f"{two} {what}{values}: prepare one of them anew, as the other")
    seen: dict[str, str] = {}
    for part in parts:
        for source, fingerprint in part.sources.items():
            place, text = f"{source} of {part.folder}", json.dumps(fingerprint, sort_keys=True)
            if text in seen:
                yield Problem("merge", f"{place} is the same text as {seen[text]}: leave one of them out")
            seen[text] = place


def _tokenizer(part: Manifest) -> tuple[Any, int]:
    """What turns text into tokens, trained, or read from a file (which is kept whole)."""
    content = json.loads((part.folder / "tokenizer.json").read_bytes())
    return content.get("tokenizer", content), part.eos_id


def _named(parts: Sequence[Manifest]) -> Iterator[tuple[str, tuple[Manifest, str]]]:
    taken = {source for part in parts for source in part.sources}
    given: set[str] = set()
    for part in parts:
        for source in part.sources:
            name, number = source, 2
            while name in given or (name != source and name in taken):
                name, number = f"{source}-{number}", number + 1
            given.add(name)
            yield name, (part, source)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _manifest(parts: Sequence[Manifest], named: Named) -> Manifest:
    first = parts[0]
    splits: dict[SplitName, dict[str, Shard]] = {
        split: {name: part.splits[split][source] for name, (part, source) in named.items()} for split in first.splits
    }
    digest = hashlib.sha256(json.dumps([part.key for part in parts]).encode()).hexdigest()[:12]
    curated = {part.key: part.curation for part in parts if part.curation is not None}
    return replace(
        first,
        key=f"{'+'.join(named)[:40]}-{first.tokenizer.name}-{digest}",
        max_token_id=max(part.max_token_id for part in parts),
        sources={name: part.sources[source] for name, (part, source) in named.items()},
        splits=splits,
        curation={"parts": curated} if curated else None,
    )


def _reading(parts: Sequence[Manifest], named: Named) -> dict[str, Any]:
    """What became of the files, and near duplicates within the parts; ConfigError if that of a part is damaged."""
    known = {part.key: read for part in parts if (read := read_reading(part.folder, "merge")) is not None}
    of_each = {name: known.get(part.key, {}).get("sources", {}).get(source) for name, (part, source) in named.items()}
    counted = ("documents", "near_duplicates")
    return {
        "sources": {name: found for name, found in of_each.items() if found},
        "validation": {what: sum(read["validation"][what] for read in known.values()) for what in counted},
    }
