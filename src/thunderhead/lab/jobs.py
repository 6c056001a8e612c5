"""The runs of a sweep: what one is, where it lies, and whether it is finished.

A job is one run with everything decided. It is known by a hash of its resolved configuration, so that the next start of
the sweep finds what is finished and what is not. An arm is what is compared: jobs that differ in nothing but the seed.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from thunderhead import disk
from thunderhead.choices import names
from thunderhead.command_line import from_job
from thunderhead.core.config import Config, quoted, read_mapping, to_yaml
from thunderhead.core.environment import escaped
from thunderhead.lab.runs import last_metrics
from thunderhead.training import record

NOT_IN_KEY = {"name", "resume", "dry_run", "trust", "sample"}
"""Top-level settings that change where a run lies, whether it starts or what it shows, not what it is."""
LABEL_LENGTH = 80


class Plan(NamedTuple):
    """What a sweep knows of a run before it starts: of `thunderhead.training.plan.Plan` what is used here."""

    parameters: dict[str, int]
    flops_per_token: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops: int
    vocab_size: int

    @property
    def size(self) -> str:
        """For a person who sees what would run."""
        parameters = f"{self.parameters['total']:,} parameters"
        return f"{parameters}, {self.steps:,} steps, {self.tokens:,} tokens, {self.flops:.3g} FLOPs"


class PlanRun(Protocol):
    """Plans a run, of data as they are now or, `prepared`, as they will be; ConfigError with all that is wrong."""

    def __call__(self, config: Config, *, prepared: bool = False) -> Plan: ...


class Job(NamedTuple):
    """One run of a sweep."""

    choices: Mapping[str, str]  # what the sweep varies, as typed: {"attention": "mha", "seed": "1"}
    config: Config  # resolved
    folder: Path  # of its record

    @property
    def name(self) -> str:
        """What tells this job from the others of its sweep: `mha seed=1`."""
        return name_of(self.choices)


def make_job(choices: Mapping[str, str], config: Config, sweep_dir: Path, subfolder: str = "") -> Job:
    """A job in the folder that it has in this sweep already, or will have: `attention_mha-seed_1-<key>`.

    The key alone identifies it; what stands before is for people. Only characters that need no quoting, neither in a
    shell nor in a Hydra override.
    """
    digits = key(config)
    for found in (*sweep_dir.glob(f"*-{digits}"), *sweep_dir.glob(f"*/*-{digits}")):
        return Job(choices, config, found)
    label = "-".join(f"{name.rpartition('.')[2]}_{value}" for name, value in choices.items())
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:LABEL_LENGTH] or "run"
    return Job(choices, config, sweep_dir / subfolder / f"{label}-{digits}")


def key(config: Config) -> str:
    """A hash of a resolved configuration; the order of its keys and `NOT_IN_KEY` do not count."""
    counted = {name: value for name, value in config.items() if name not in NOT_IN_KEY}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]


def arm_key(config: Config) -> str:
    """The key of a configuration whose seed is left out: equal within an arm."""
    return key({**config, "seed": None})


def name_of(choices: Mapping[str, str]) -> str:
    """Groups by their option alone, single values with their name: `gqa lr=0.001 seed=1`; `run` if nothing varies."""
    return " ".join(names(choices)) or "run"


def without_seed(choices: Mapping[str, str]) -> dict[str, str]:
    """What names an arm."""
    return {name: value for name, value in choices.items() if name != "seed"}


def state(folder: Path) -> Literal["new", "partial", "finished"]:
    """`finished` with a summary, `partial` with a checkpoint to go on from, else `new`."""
    if record.read_summary(folder) is not None:
        return "finished"
    if (folder / "config.yaml").is_file() and any((folder / "checkpoints").glob("*.ckpt")):
        return "partial"
    return "new"


def this_program() -> tuple[str, ...]:
    """What started this process, to start jobs by."""
    return sys.executable, str(Path(sys.argv[0]).resolve())


def prepare_start(job: Job, program: Sequence[str] = ()) -> list[str]:
    """Write the job's configuration, and say how to start it or, where there is a checkpoint, to go on with it.

    By `program`; () = this one, by this Python.
    """
    folder = job.folder.resolve()
    disk.write_text(folder / "job" / "job.yaml", to_yaml(escaped(job.config)))
    return [
        *(program or this_program()),
        *from_job(folder / "job", folder),
        *([f"resume={quoted(folder)}"] if state(folder) == "partial" else []),
    ]


def steps(folder: Path) -> tuple[int, int] | None:
    """Optimizer steps logged so far, and planned; None before the run has a plan."""
    file, rows = folder / "plan.json", last_metrics(folder)
    return (int(rows[-1]["step"]) if rows else 0, read_mapping(file)["steps"]) if file.is_file() else None
