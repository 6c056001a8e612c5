"""Runs that an earlier sweep has finished already: their records are taken over, instead of training them again."""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.lab.arms import is_code
from thunderhead.lab.jobs import Job, key, state
from thunderhead.lab.runs import LOOKS, looks_of
from thunderhead.training import record

PACKAGES = ("torch", "lightning")


def take_over(jobs: Iterable[Job], place: Path, looks: Sequence[int] = ()) -> int:
    """Copy the records of jobs that have not begun from finished runs below `place`; returns of how many.

    A run is the same if its key is, which holds its whole configuration, and if it was made by the same commit, without
    changes of the code then or now, and the same torch and lightning. reused.json says where it was; checkpoints stay
    there. What was matched in a job stays with it; a run that had been looked at before keeps that in mind, beside the
    `looks` of this sweep.
    """
    new = {key(job.config): job for job in jobs if state(job.folder) == "new"}
    here = _made_by(record.surroundings())
    found = 0
    for summary in sorted(place.rglob("summary.json")) if here is not None else ():
        folder = summary.parent
        job = new.get(match[1]) if (match := re.search("-([0-9a-f]{8})$", folder.name)) else None
        if job is None or folder.resolve() == job.folder.resolve() or not _is_same(folder, here):
            continue
        half = job.folder.with_name(f".{job.folder.name}.taken")
        shutil.rmtree(half, ignore_errors=True)  # what a kill has left
        shutil.copytree(folder, half, ignore=shutil.ignore_patterns("checkpoints", ".*", "job"))
        record.write_json(half / "reused.json", {"from": str(folder.absolute())})
        (half / "match.json").unlink(missing_ok=True)
        if (matched := job.folder / "match.json").is_file():
            shutil.copy(matched, half / "match.json")
        if before := looks_of([folder]):
            record.write_json(half / LOOKS, {"looks": sorted({*before, *looks})})
        shutil.rmtree(job.folder, ignore_errors=True)  # of a start that came to nothing: it is "new"
        os.replace(half, job.folder)
        del new[match[1]]  # type: ignore[index]
        found += 1
    return found


def _is_same(folder: Path, here: Sequence[Any] | None) -> bool:
    try:
        return (
            _made_by(read_mapping(folder / "environment.json", shape=record.Surroundings)) == here
            and state(folder) == "finished"
        )
    except ConfigError:  # damaged, or none
        return False


def _made_by(environment: dict[str, Any]) -> list[Any] | None:
    """Commit and packages that made a run; None where they do not tell what the code was."""
    git, packages = environment.get("git"), environment.get("packages") or {}
    if not git or any(map(is_code, git.get("changed_files") or [])):
        return None
    return [git["commit"], *(packages.get(name) for name in PACKAGES)]
