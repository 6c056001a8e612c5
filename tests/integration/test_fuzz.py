"""Any choice of options with any values: a run trains, or ends with errors by name and exit status 2."""

import contextlib
import functools
import math
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, note, seed, settings
from hypothesis import strategies as st

from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, ConfigError, Problem
from thunderhead.training import display, hardware, run
from thunderhead.training.plan import Plan
from thunderhead.training.record import read_summary
from tiny import DEFAULTS, OF_THE_HUB, OPTIONS, tiny, train_composed

Case = tuple[tuple[str, ...], tuple[str, ...]]
"""Options of groups, and overrides of single values."""

SEED = int(os.environ.get("FUZZ_SEED", int.from_bytes(os.urandom(4))))
SECONDS = 60  # of computing, that a case may take before it counts as hanging: a busy machine fails no test
_TRAIN = config.read_yaml(CONF_DIR / "train.yaml")
SCALARS = {key: value for key, value in _TRAIN.items() if key not in ("defaults", "hydra")}
CHOICES = {
    **{group: options for group, options in OPTIONS.items() if group not in ("experiment", "debug")},
    "data": [option for option in OPTIONS["data"] if option not in OF_THE_HUB],
    "trainer": ["auto", "cpu"],
    "logger": ["csv", "tensorboard"],  # services keep what they are told beside the run's folder
}
TINY = {group: choice for entry in _TRAIN["defaults"] if isinstance(entry, dict) for group, choice in entry.items()}
TINY |= {group: line.partition("=")[2] for group, (line, *_) in DEFAULTS.items()}
TINY = {group: TINY[group] for group in CHOICES} | {"batch": "default", "generation": "default"}
NAMES = re.compile("|".join([*OPTIONS, *SCALARS, "hydra", "other"]))
SPITEFUL = (
    *("0", "-1", "1", "2", "3", "7", "1000000007", "9223372036854775808", "1" + "0" * 40),
    *("0.5", "-0.5", "1.0", "1e-30", "1e30", "1e-400", "1e400", "nan", "inf", "-inf", "-0.0"),
    *("null", "true", "false", "''", "abc", "'two words'", "'%s {x} [y]'", "auto", "???", "${nowhere}", "${name}"),
    *("[]", "[1]", "[0.5,2]", "[abc,null]", "[[]]", "{}", "{a:1}", "{1:2}", "{0.5:-1,a:b}", "{_target_:abc}"),
)


class TooLargeError(Exception):
    """The plan was accepted, and is too much for a test."""


@functools.cache
def paths(group: str, option: str) -> list[tuple[str, Any]]:
    """The config paths of an option with their values: of single values, and of mappings within it."""
    found = []
    for path, value in config.leaves(config.values_of(group, option), group):
        found.append((path, value))
        found += [(parent, None) for parent in _parents(path) if parent != group and (parent, None) not in found]
    settings = [(path, value) for path, value in found if not path.endswith("._target_")]
    return settings * 9 + found  # what kind of thing it is, is rarely asked


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def near(value: Any) -> list[str]:
    """Values that are like one, as the command line has them; null may stand for a number or a text."""
    if isinstance(value, bool):
        return [str(not value).lower()]
    if isinstance(value, int):
        return [config.show(v) for v in (value * 2, value // 2, value + 1, 1, 2, 3, 16, 10**9 + 7)]
    if isinstance(value, float):
        return [config.show(v) for v in (value * 2, value / 2, 0.3, 0.99, 1e-30, 1e30, 5)]
    if isinstance(value, list):
        return [config.show(v) for v in (value[:-1], value[::-1], value * 2, [0.5, 0.5], [0.0, 1.0])]
    return ["0.3", "1", "4", "8", "64", "text"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.lists(st.sampled_from(sorted(CHOICES)), max_size=3, unique=True))
    chosen = {group: draw(st.sampled_from(CHOICES[group])) for group in groups}
    overrides = [draw(_override({**TINY, **chosen})) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 2, 3])))]
    return tuple(f"{group}={option}" for group, option in chosen.items()), tuple(overrides)


@st.composite
def _override(draw: st.DrawFn, chosen: dict[str, str]) -> str:
    group = draw(st.sampled_from(["", *sorted(chosen)]))
    known = list(SCALARS.items())
    if group:  # one that is left out has no paths
        known = paths(group, chosen[group]) if chosen[group] else []
    path, value = draw(st.sampled_from(known or [(group, None)]))
    new = draw(st.sampled_from(SPITEFUL) | st.sampled_from(near(value)) | st.sampled_from(near(value)))
    kind = draw(st.sampled_from(["set"] * 12 + ["unknown", "add", "force", "below", "delete"]))
    return {
        "set": f"{path}={new}",
        "unknown": f"{path}s={new}",
        "add": f"+{draw(st.sampled_from([path, group, 'other']) if group else st.just(path))}.new={new}",
        "force": f"++{path}={new}",
        "below": f"++{path}.new={new}",
        "delete": f"~{draw(st.sampled_from([path, group]) if group else st.just(path))}",
    }[kind]


@pytest.fixture(scope="module")
def corpora(text_corpus: Path, shards_dir: Path) -> tuple[Path, Path]:
    return text_corpus, shards_dir


def check(case: Case, corpus: Path, shards: Path, tell: Callable[..., None] = lambda **_: None) -> str:
    """Train a case, and raise whatever is no clear refusal; returns how it ended."""
    options, overrides = case
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _apart(), _limited():
        run_dir = Path(folder, "run")
        run_dir.mkdir()
        complained = list[str]()
        try:
            with patch.object(display, "complain", complained.append):
                loss = _train_py([*tiny(corpus, shards, *options), *overrides], run_dir)
        except ConfigError as error:
            _check_refusal(error)
            tell(saw=f"error: {error}")
            return "refused"
        except TooLargeError:
            return "planned"
        except SystemExit:
            (told,) = complained
            assert NAMES.search(told)
            return "diverged" if "diverged" in (read_summary(run_dir) or {}) else "failed"
        assert loss is None or math.isfinite(loss), loss
        return "trained"


def _train_py(overrides: list[str], run_dir: Path) -> float | None:
    """`python train.py <overrides>` in this process; what would be told with exit status 2 is raised."""
    losses = []

    def refuse(problems: list[Problem]) -> None:
        raise ConfigError(problems)

    def main() -> None:
        composed = config.compose(overrides)
        try:
            losses.append(train_composed(composed, run_dir))
        except (ValueError, TypeError) as error:  # which `command_line.run` would take for Hydra's
            raise AssertionError(repr(error)) from error
        except ConfigError:
            assert not run_dir.exists(), "a refused run left something behind"
            raise

    arguments = patch.object(sys, "argv", ["train.py", *overrides])
    with arguments, patch.object(command_line, "_refuse", refuse), patch.dict(os.environ):
        os.environ.pop("HYDRA_FULL_ERROR", None)
        with patch.object(command_line, "SIGNALS", []):  # pytest's own stay
            command_line.run(main)
    return losses[0]


def _check_refusal(error: ConfigError) -> None:
    assert error.problems
    for path, message in error.problems:
        told = f"{path}: {message}" if path else message
        assert NAMES.search(told), f"names no setting: {told!r}"
        assert "\n" not in told or not path, told  # Hydra's own have several
        assert not re.search(r"Traceback|object at 0x|File \"|Error\(|<class|pydantic\.dev", told), told
        assert len(message) > 10, f"says nothing: {told!r}"
        assert len(told) < 1000, f"says too much: {told!r}"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """A run's process group, environment and threads are its own; one that hangs ends."""

    def hang(*_: object) -> None:
        raise AssertionError(f"takes more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with patch.dict(os.environ), warnings.catch_warnings(), patch.object(hardware, "keep_freed_memory", bool):
            warnings.simplefilter("ignore")  # of torch on values that are odd, and taken
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        torch.use_deterministic_algorithms(False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """What a plan shows to be too large for a test, or to need several processes or a compiler, ends with the plan."""
    plan_config = run.plan_config

    def limited(*arguments: Any) -> tuple[Any, Plan]:
        built, plan = plan_config(*arguments)
        settings, work = built.config, plan.tokens * plan.flops_per_token
        if not built.is_dry and (
            plan.devices > 1
            or plan.compile != "none"
            or plan.steps > 12
            or plan.accumulation > 64
            or work > 2e9
            or sum(plan.memory.values()) > 1e8
            or settings["data"].get("num_workers", 0) > 2
            or (settings["data"].get("max_validation_tokens") or 0) > 2**17
            or settings["generation"].get("max_new_tokens", 0) > 200
        ):
            raise TooLargeError
        return built, plan

    with patch.object(run, "plan_config", limited):
        yield


EVERY_TIME = settings(
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.mark.usefixtures("memory_is_counted")
@settings(EVERY_TIME, max_examples=15, derandomize=True)
@given(case=cases())
def test_a_configuration_trains_or_is_refused(case: Case, corpora: tuple[Path, Path]) -> None:
    event(check(case, *corpora))


@pytest.mark.slow
@pytest.mark.usefixtures("memory_is_counted")
@seed(SEED)
@settings(EVERY_TIME, max_examples=2000)
@given(case=cases())
def test_two_thousand_configurations_train_or_are_refused(
    case: Case, corpora: tuple[Path, Path], tell: Callable[..., None]
) -> None:
    note(f"again with FUZZ_SEED={SEED}")
    event(check(case, *corpora, tell))
