"""Which runs belong together, what tells the arms apart, and which arms may be compared."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thunderhead.core.config import options, values_of
from thunderhead.lab.runs import Run

# Settings that change where a run lies, what it shows or how it loads, and never a loss.
NO_DIFFERENCE = (
    *("name", "seed", "resume", "dry_run", "keep_freed_memory", "profile", "background_checkpoints"),
    *("logger", "generation"),
    *("callbacks.progress", "callbacks.checkpoint", "callbacks.best"),
    *("data.shards_dir", "data.num_workers", "data.verify"),
)
ABSENT = "–"
TOLERANCE = 0.01
"""Relative: budgets and sizes that miss each other by less count as equal."""


@dataclass
class Arm:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: dict[int, Run] = field(default_factory=dict)
    """Finished, by seed, in the order of the seeds."""
    incomplete: list[Run] = field(default_factory=list)
    """Without a result that could be compared."""
    repeated: list[Run] = field(default_factory=list)
    """Finished before an equal run did."""

    @property
    def first(self) -> Run:
        """A finished run, which speaks for all in what does not depend on the seed."""
        return next(iter(self.runs.values()))

    def values(self, name: str) -> list[float]:
        """A value of the summaries, by seed; runs without it are left out."""
        return [float(run.results[name]) for run in self.runs.values() if run.results.get(name) is not None]

    def mean(self, name: str) -> float | None:
        """The mean of a value of the summaries; None if no run has it."""
        values = self.values(name)
        return sum(values) / len(values) if values else None


def make_arms(runs: Sequence[Run], names: Mapping[Path, str] | None = None) -> list[Arm]:
    """Group runs into arms, in the order in which their first runs come.

    Args:
        runs: finished or not; of several equal runs the one that finished last counts.
        names: an arm's name by the folders of its runs, where somebody knows better than the configurations tell.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(json.dumps(leaves(run.config), sort_keys=True), []).append(run)
    told = names or {}
    given: list[str | None] = [told.get(members[0].folder) for members in grouped.values()]
    if None in given or len(set(given)) < len(given):
        given = [*arm_names([members[0] for members in grouped.values()])]
    arms = []
    for name, members in zip(given, grouped.values(), strict=True):
        finished = [run for run in members if run.unfinished is None]
        finished.sort(key=lambda run: (run.folder / "summary.json").stat().st_mtime)
        by_seed = {run.seed: run for run in finished}
        arms.append(
            Arm(
                str(name),
                runs=dict(sorted(by_seed.items())),
                incomplete=[run for run in members if run.unfinished is not None],
                repeated=[run for run in finished if by_seed[run.seed] is not run],
            )
        )
    return arms


def find(arms: Sequence[Arm], name: str) -> Arm:
    """The arm of this name; `attention=mha` is understood for `mha`.

    Raises:
        ValueError: there is none; names those that there are.
    """
    by_name = {arm.name: arm for arm in arms}
    for candidate in (name, name.partition("=")[2], name.rpartition(".")[2]):
        if candidate in by_name:
            return by_name[candidate]
    near = difflib.get_close_matches(name, by_name, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no arm is called {name!r}{hint}; the arms are {', '.join(map(repr, by_name))}")


# --------------------------------------------------------------------------------------------------------------------
# Differences and names


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every setting that may change a loss, by config path; a list without settings inside is one value."""
    if path in NO_DIFFERENCE:
        return {}
    if isinstance(value, dict) and value:
        children = [(f"{path}.{key}" if path else str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {path: value}
    return {leaf: v for key, child in children for leaf, v in leaves(child, key).items()}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Config paths whose values are not the same in all configurations, with the value of each; ABSENT where none."""
    flat = [leaves(config) for config in configs]
    paths = dict.fromkeys(path for leaf in flat for path in leaf)
    values = {path: [leaf.get(path, ABSENT) for leaf in flat] for path in paths}
    return {path: found for path, found in values.items() if any(value != found[0] for value in found)}


def arm_names(runs: Sequence[Run]) -> list[str]:
    """A short name for each: the options that tell them apart (`gqa`, `gqa lion`), else the values (`lr=0.001`).

    What a sweep solved for to match the arms is left out, unless nothing else tells them apart.
    """
    if len(runs) == 1:
        return [str(runs[0].config.get("name", "run"))]
    configs = [run.config for run in runs]
    solved = {path for run in runs if run.match for path in run.match.set}
    different = differences(configs)
    names = _names(configs, {path: values for path, values in different.items() if path not in solved})
    if len(set(names)) < len(names):
        names = _names(configs, different)
    typed = [
        " ".join(o.partition("=")[2] for o in run.overrides if not o.startswith(("seed=", "name="))) for run in runs
    ]
    if max(map(len, names)) > 40 and "" not in typed and len(set(typed)) == len(typed) and max(map(len, typed)) <= 40:
        return typed  # an experiment sets dozens of values
    return names


def _names(configs: Sequence[dict[str, Any]], different: dict[str, list[Any]]) -> list[str]:
    parts: list[list[str]] = [[] for _ in configs]
    groups = dict.fromkeys(path.partition(".")[0] for path in different)
    for group in groups:
        paths = {path: values for path, values in different.items() if path.partition(".")[0] == group}
        options = [_option(group, config.get(group), set(paths)) for config in configs]
        targets = [config[group].get("_target_") if isinstance(config.get(group), dict) else None for config in configs]
        exact = [option is not None and not deviations for option, deviations in options]
        for index, (option, deviations) in enumerate(options):
            values = {path: paths[path][index] for path in paths if not path.endswith("._target_")}
            if option is not None and (all(exact) or targets.count(targets[index]) < len(targets)):
                shown = [option, *(_setting(path, values[path]) for path in deviations if path in values)]
            else:
                shown = [_setting(path, value) for path, value in values.items() if value != ABSENT]
            parts[index] += shown
    return [" ".join(part) for part in parts]


def _setting(path: str, value: Any) -> str:
    return f"{path.rpartition('.')[2]}={show_value(value)}"


def show_value(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if value is not None else "null"


def option_of(group: str, config: dict[str, Any]) -> str:
    """The option of a group that a configuration has: the one in conf/ with its target, or the target's own name."""
    found, _ = _option(group, config.get(group), set())
    return found or str((config.get(group) or {}).get("_target_", ABSENT)).rpartition(".")[2]


def _option(group: str, node: Any, paths: set[str]) -> tuple[str | None, list[str]]:
    """The option of conf/<group> with the node's target that is nearest to it, and where the node deviates from it.

    Only the paths in which the arms differ are looked at, so that what all arms share does not hide the option.
    """
    best: tuple[str | None, list[str]] = (None, [])
    own = {path: value for path, value in leaves(node, group).items() if path in paths or path.endswith("._target_")}
    for name in options(group):
        option = leaves(values_of(group, name), group)
        if option.get(f"{group}._target_") != own.get(f"{group}._target_"):
            continue
        deviations = [path for path in own | {p: 0 for p in option if p in paths} if own.get(path) != option.get(path)]
        if best[0] is None or len(deviations) < len(best[1]):
            best = name, deviations
    return best


# --------------------------------------------------------------------------------------------------------------------
# May they be compared?


def validation_data(run: Run) -> str:
    """What identifies the tokens that a run was validated on: equal for runs whose losses are of the same tokens."""
    recorded = run.results.get("validation_data")
    return str(recorded) if recorded else text(run) + tokenizer(run)


def text(run: Run) -> str:
    """What identifies the text that a run was validated on, whatever its tokenizer."""
    recorded = run.results.get("validation_text")
    kept = {k: v for k, v in leaves(run.config["data"], "data").items() if k != "data.shuffle_window"}
    return str(recorded) if recorded else json.dumps(kept, sort_keys=True)


def tokenizer(run: Run) -> str:
    """The hash of a run's tokenizer."""
    file = run.folder / "tokenizer.json"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return json.dumps(run.config["tokenizer"], sort_keys=True)


def matched(a: Arm, b: Arm) -> list[str]:
    """What is equal within TOLERANCE in two arms: of tokens, FLOPs, parameters; and time, where it was to be equal."""
    quantities = {"tokens": "tokens", "flops": "FLOPs", "parameters": "parameters"}
    found = [label for name, label in quantities.items() if _close(a.first.results[name], b.first.results[name])]
    ratio = _time_ratio(a, b)
    return found if ratio is None else [*found, f"time (missed by {_percent(ratio - 1)})"]


def _time_ratio(a: Arm, b: Arm) -> float | None:
    """Measured seconds of one arm's training relative to the other's; None unless a sweep has matched them in time."""
    by_time = all(arm.first.match is not None and arm.first.match.by == "time" for arm in (a, b))
    seconds = a.mean("seconds"), b.mean("seconds")
    return seconds[0] / seconds[1] if by_time and seconds[0] and seconds[1] else None


def _percent(part: float) -> str:
    return f"{part:+.1%}".replace("-", "−").replace("%", " %")


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def warnings(arms: Sequence[Arm]) -> list[str]:
    """In what the runs differ beside their configurations, and in how much training: one sentence each."""
    runs = [run for arm in arms for run in arm.runs.values()]
    if not runs:
        return []
    found = []
    commits = {_git(run, "commit") for run in runs} - {None}
    if len(commits) > 1:
        shown = ", ".join(sorted(str(commit)[:8] for commit in commits))
        found.append(
            f"The runs were made by different commits ({shown}): a change of the code may be what is measured."
        )
    if changed := sorted(
        {str(file).strip() for run in runs for file in _git(run, "changed_files") or [] if _is_code(file)}
    ):
        found.append(f"Runs were made with uncommitted changes ({', '.join(changed[:3])}{' …' * (len(changed) > 3)}).")
    for package in ("torch", "lightning"):
        versions = {run.environment.get("packages", {}).get(package) for run in runs} - {None}
        if len(versions) > 1:
            found.append(f"The runs used different versions of {package}: {', '.join(sorted(versions))}.")
    devices = {str(run.results["device"]) for run in runs if run.results.get("device")}
    if len(devices) > 1:
        found.append(
            f"The runs used different devices ({', '.join(sorted(devices))}): seconds and memory do not compare."
        )
    precisions = {str(run.results["precision"]) for run in runs if run.results.get("precision")}
    if len(precisions) > 1 and "precision.kind" not in differences([arm.first.config for arm in arms]):
        found.append(f"precision=auto came out differently: {', '.join(sorted(precisions))}.")
    seeds = [set(arm.runs) for arm in arms]
    if any(s != seeds[0] for s in seeds):
        counts = "; ".join(f"{arm.name}: {', '.join(map(str, arm.runs))}" for arm in arms)
        found.append(f"Not all arms have the same seeds, and only equal seeds are pairs ({counts}).")
    first = arms[0]
    for arm in arms[1:]:
        if not {"tokens", "FLOPs"} & set(matched(first, arm)):
            ratios = [arm.first.results[name] / first.first.results[name] for name in ("tokens", "flops")]
            message = (
                f"{arm.name} trained on {ratios[0]:.3g} × the tokens and {ratios[1]:.3g} × the FLOPs of {first.name}"
            )
            time = _time_ratio(arm, first)
            if time is None:
                found.append(f"{message}: the budgets are not matched.")
            else:
                found.append(f"{message}, in {time:.3g} × its time, which was to be equal.")
    for arm in arms:
        if arm.repeated:
            older = ", ".join(str(run.folder) for run in arm.repeated)
            found.append(f"{arm.name} has equal runs, of which the last counts; left out: {older}.")
    return found


def _git(run: Run, key: str) -> Any:
    return (run.environment.get("git") or {}).get(key)


def _is_code(status: str) -> bool:
    """A line of `git status --porcelain` about a file that may change a run: " M conf/train.yaml"."""
    file = status.strip().rpartition(" ")[2]
    return file.endswith((".py", ".yaml")) and not file.startswith(("tests/", "docs/", "benchmarks/"))
