"""Which runs belong together, what tells the arms apart, and which arms may be compared."""

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thunderhead.choices import nearest
from thunderhead.core.config import Config, ConfigError, Problem, leaves, show
from thunderhead.lab.runs import Run, tuned_settings

# Settings that change where a run lies, what it shows or how it loads, and never a loss.
NO_DIFFERENCE = (
    *("name", "seed", "resume", "dry_run", "keep_freed_memory", "sample", "profile", "background_checkpoints"),
    *("logger", "generation"),
    *("callbacks.progress", "callbacks.checkpoint", "callbacks.best"),
    *("data.shards_dir", "data.num_workers", "data.verify"),
)
ABSENT = "–"
TOLERANCE = 0.01
"""Relative: budgets and sizes that miss each other by less count as equal."""
COUNTED = {"tokens": "tokens", "flops": "FLOPs", "parameters": "parameters"}
"""Numbers of the summaries that are compared, with what they are called."""
MENTIONED = 0.02
"""Relative: what differs by more is told beside every difference of losses."""


@dataclass
class Arm:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: dict[int, Run]  # finished, by seed, in the order of the seeds
    incomplete: list[Run]  # without a result that could be compared
    repeated: list[Run]  # finished before an equal run did

    @property
    def first(self) -> Run:
        """It speaks for all in what does not depend on the seed."""
        return next(iter(self.runs.values()))

    @property
    def n_diverged(self) -> int:
        """How many of its runs have no result because of that."""
        return sum(run.diverged for run in self.incomplete)

    def values(self, name: str) -> list[float]:
        """A number of the summaries, by seed; runs without it are left out."""
        return [value for run in self.runs.values() if (value := run.number(name)) is not None]

    def mean(self, name: str) -> float | None:
        """The mean of a number of the summaries; None if no run has it."""
        values = self.values(name)
        return sum(values) / len(values) if values else None


def make_arms(runs: Sequence[Run], names: Mapping[Path, str] | None = None) -> list[Arm]:
    """Group runs, finished or not, into arms, in the order in which their first runs come.

    Of several equal runs the one that finished last counts. `names` has an arm's name by the folders of its runs, where
    somebody knows better than the configurations tell.
    """
    chosen: dict[Any, list[Run]] = {}  # by what was chosen beside the seed, as far as that is known
    for run in runs:
        typed = tuple(o for o in run.environment.get("overrides") or () if not o.startswith(("seed=", "name=")))
        chosen.setdefault((names or {}).get(run.folder) or typed, []).append(run)
    follow = {each.folder: of_seed([run.config for run in alike]) for alike in chosen.values() for each in alike}
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        own = {path: value for path, value in settings(run.config).items() if path not in follow[run.folder]}
        grouped.setdefault(json.dumps(own, sort_keys=True), []).append(run)
    firsts = [members[0] for members in grouped.values()]
    given = [(names or {}).get(run.folder, "") for run in firsts]
    if "" in given or len(set(given)) < len(given):
        given = arm_names(firsts)
    arms = []
    for name, members in zip(given, grouped.values(), strict=True):
        finished = [run for run in members if run.unfinished is None]
        finished.sort(key=lambda run: (run.folder / "summary.json").stat().st_mtime)
        by_seed = {run.seed: run for run in finished}
        incomplete = [run for run in members if run.unfinished is not None]
        repeated = [run for run in finished if by_seed[run.seed] is not run]
        arms.append(Arm(name, dict(sorted(by_seed.items())), incomplete, repeated))
    return arms


def find(arms: Sequence[Arm], name: str) -> Arm:
    """The arm of this name; `attention=mha` is understood for `mha`. ConfigError if there is none."""
    by_name = {arm.name: arm for arm in arms}
    for candidate in (name, name.partition("=")[2], name.rpartition(".")[2]):
        if candidate in by_name:
            return by_name[candidate]
    near = difflib.get_close_matches(name, by_name, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    message = f"no arm is called {name!r}{hint}; the arms are {', '.join(map(repr, by_name))}"
    raise ConfigError([Problem("baseline", message)])


# --- differences and names --------------------------------------------------------------------------------------------


def is_in(path: str, nodes: Iterable[str]) -> bool:
    """Whether a config path is one of these, or below one."""
    return any(path == node or path.startswith(f"{node}.") for node in nodes)


def settings(config: Config) -> dict[str, Any]:
    """Every setting that may change a loss, by config path."""
    return {path: value for path, value in leaves(config) if not is_in(path, NO_DIFFERENCE)}


def of_seed(configs: Sequence[Config]) -> set[str]:
    """Config paths of seeds and texts that hold the seed (`${seed}`), in configurations chosen alike beside it.

    A learning rate that follows from the seed is another learning rate.
    """

    def neutral(config: Config, value: Any) -> str:
        return re.sub(rf"(?<!\d){config.get('seed')}(?!\d)", "${seed}", show(value))

    flat = [settings(config) for config in configs]
    values = {path: [each.get(path, ABSENT) for each in flat] for path in flat[0]}
    return {
        path
        for path, found in values.items()
        if ("seed" in path.rpartition(".")[2] or isinstance(found[0], str))
        and any(value != found[0] for value in found)  # before `show`, which takes a while for hundreds of runs
        and len({*map(neutral, configs, found)}) == 1
    }


def differences(configs: Iterable[Config]) -> dict[str, list[Any]]:
    """Config paths whose values are not the same in all configurations, with the value of each; ABSENT where none."""
    flat = [settings(config) for config in configs]
    values = {path: [each.get(path, ABSENT) for each in flat] for each in flat for path in each}
    return {path: found for path, found in values.items() if len({show(value) for value in found}) > 1}  # 0 is not 0.0


def arm_names(runs: Sequence[Run]) -> list[str]:
    """A short name for each: the options that tell them apart (`gqa`, `gqa lion`), else the values (`lr=0.001`).

    What a sweep solved for to match the arms, or tuned, is left out, unless nothing else tells them apart.
    """
    configs = [run.config for run in runs]
    if len(configs) == 1:
        return [str(configs[0].get("name", "run"))]
    solved = {path for run in runs if run.match for path in run.match.set}
    solved |= {path for run in runs for path in tuned_settings(run.folder)}
    different = differences(configs)
    names = _names(configs, {path: values for path, values in different.items() if path not in solved})
    if len(set(names)) < len(names):
        names = _names(configs, different)
    overrides = [run.environment.get("overrides") or [] for run in runs]
    typed = [" ".join(o.partition("=")[2] for o in each if not o.startswith(("seed=", "name="))) for each in overrides]
    if max(map(len, names)) > 40 and "" not in typed and len(set(typed)) == len(typed) and max(map(len, typed)) <= 40:
        return typed  # an experiment sets dozens of values
    uses = Counter(names)
    return [f"{name} {index}".strip() if uses[name] > 1 else name for index, name in enumerate(names, start=1)]


def _names(configs: Sequence[Config], different: dict[str, list[Any]]) -> list[str]:
    parts: list[list[str]] = [[] for _ in configs]
    for group in dict.fromkeys(path.partition(".")[0] for path in different):
        paths = {path: values for path, values in different.items() if path.partition(".")[0] == group}
        chosen = [nearest(group, config.get(group), set(paths)) for config in configs]
        targets = [config[group].get("_target_") if isinstance(config.get(group), dict) else None for config in configs]
        all_exact = all(option is not None and not deviations for option, deviations in chosen)
        for index, (option, deviations) in enumerate(chosen):
            values = {path: paths[path][index] for path in paths if not path.endswith("._target_")}
            if option is None and f"{group}._target_" in paths and targets[index]:
                own = str(targets[index])
                short = own.rpartition(".")[2]
                alike = [target for target in set(targets) if str(target).rpartition(".")[2] == short]
                parts[index].append(short if len(alike) == 1 else own)
            if option is not None and (all_exact or targets.count(targets[index]) < len(targets)):
                parts[index] += [option, *(setting(path, values[path]) for path in deviations if path in values)]
            else:
                parts[index] += [setting(path, value) for path, value in values.items() if value != ABSENT]
    return [" ".join(part) for part in parts]


def setting(path: str, value: Any) -> str:
    """`lr=0.001` of optimizer.lr."""
    return f"{path.rpartition('.')[2]}={show(value)}"


def option_of(group: str, config: Config) -> str:
    """The option of a group that a configuration has: the one in conf/ with its target, or the target's own name."""
    found, _ = nearest(group, config.get(group), set())
    return found or str((config.get(group) or {}).get("_target_", ABSENT)).rpartition(".")[2]


# --- may they be compared? --------------------------------------------------------------------------------------------


def validation_data(run: Run) -> str:
    """What identifies the tokens that a run was validated on, and what it saw before each: for losses per token."""
    if found := run.result("validation_data"):
        return str(found)
    file = run.folder / "tokenizer.json"
    if file.is_file():
        return validation_text(run) + hashlib.sha256(file.read_bytes()).hexdigest()
    return validation_text(run) + json.dumps(run.config.get("tokenizer"), sort_keys=True)


def validation_text(run: Run) -> str:
    """What identifies the text of these tokens, for bits per byte; by the settings of the data if none told it."""
    kept = settings({"data": run.config.get("data")})
    kept.pop("data.shuffle_window", None)
    return str(run.result("validation_text") or json.dumps(kept, sort_keys=True))


def matched(a: Arm, b: Arm) -> list[str]:
    """What is equal within TOLERANCE in two arms: of tokens, FLOPs, parameters; and time, where it was to be equal."""
    found = []
    for name, label in COUNTED.items():
        one, two = a.first.number(name), b.first.number(name)
        if one is not None and two is not None and math.isclose(one, two, rel_tol=TOLERANCE):
            found.append(label)
    ratio = _time_ratio(a, b)
    return found if ratio is None else [*found, f"time (missed by {percent(ratio - 1)})"]


def unequal(a: Arm, b: Arm) -> list[str]:
    """What arm a had more or less of than b, by more than MENTIONED: "1.9 × the parameters"."""
    ratios = {}
    for name, label in COUNTED.items():
        one, two = a.first.number(name), b.first.number(name)
        if one and two:
            ratios[label] = one / two
    longer = _bytes_per_token(a.first) / _bytes_per_token(b.first)
    if abs(longer - 1) > MENTIONED:  # of another tokenizer
        ratios["text"] = ratios.get("tokens", math.nan) * longer
    return [f"{ratio:.3g} × the {label}" for label, ratio in ratios.items() if abs(ratio - 1) > MENTIONED]


def _bytes_per_token(run: Run) -> float:
    """Of the text of the validation."""
    loss, bits = run.number("val_loss"), run.number("bits_per_byte")
    return loss / bits / math.log(2) if loss and bits else math.nan


def listed(words: Sequence[str]) -> str:
    """A, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _time_ratio(a: Arm, b: Arm) -> float | None:
    """Measured seconds of one arm's training relative to the other's; None unless a sweep has matched them in time."""
    by_time = all(arm.first.match is not None and arm.first.match.by == "time" for arm in (a, b))
    seconds = a.mean("seconds"), b.mean("seconds")
    return seconds[0] / seconds[1] if by_time and seconds[0] and seconds[1] else None


def percent(part: float, digits: int = 1) -> str:
    """+1.5 %, −0.10 %."""
    return f"{part:+.{digits}%}".replace("-", "−").replace("%", " %")


def warnings(arms: Sequence[Arm]) -> list[str]:
    """In what the runs differ beside their configurations, and in how much training: one sentence each."""
    runs = [run for arm in arms for run in arm.runs.values()]
    if not runs:
        return []

    def several(sentence: str, values: Iterable[Any]) -> list[str]:
        """The sentence, where there are several values."""
        different = sorted({str(value) for value in values if value})
        return [sentence.format(", ".join(different))] if len(different) > 1 else []

    by_commits = "The runs were made by different commits ({}): a change of the code may be what is measured."
    found = several(by_commits, ((run.git.get("commit") or "")[:8] for run in runs))
    changes = {str(line).strip() for run in runs for line in run.git.get("changed_files") or [] if is_code(line)}
    if changed := sorted(changes):
        found.append(f"Runs were made with uncommitted changes ({', '.join(changed[:3])}{' …' * (len(changed) > 3)}).")
    for package in ("torch", "lightning"):
        versions = (run.environment.get("packages", {}).get(package) for run in runs)
        found += several(f"The runs used different versions of {package}: {{}}.", versions)
    devices = (run.result("device") for run in runs)
    found += several("The runs used different devices ({}): seconds and memory do not compare.", devices)
    if "precision.kind" not in differences(arm.first.config for arm in arms):
        found += several("precision=auto came out differently: {}.", (run.result("precision") for run in runs))
    if any(set(arm.runs) != set(arms[0].runs) for arm in arms):
        counts = "; ".join(f"{arm.name}: {', '.join(map(str, arm.runs))}" for arm in arms)
        found.append(f"Not all arms have the same seeds, and only equal seeds are pairs ({counts}).")
    found += [told for arm in arms[1:] if (told := _unequal(arm, arms[0]))]
    for arm in arms:
        if arm.repeated:
            older = ", ".join(str(run.folder) for run in arm.repeated)
            found.append(f"{arm.name} has equal runs, of which the last counts; left out: {older}.")
    return found


def _unequal(arm: Arm, first: Arm) -> str:
    """What else may be the reason for a difference; nothing where all that is counted is equal."""
    if not (parts := unequal(arm, first)):
        return ""
    message = f"{arm.name} had {listed(parts)} of {first.name}"
    if {"tokens", "FLOPs"} & set(matched(arm, first)):
        return f"{message}: that may be what is measured."
    time = _time_ratio(arm, first)
    if time is None:
        return f"{message}: the budgets are not matched."
    return f"{message}, in {time:.3g} × its time, which was to be equal."


def is_code(status: str) -> bool:
    """A line of `git status --porcelain` about a file that may change a run: " M conf/train.yaml"."""
    file = status.strip().rpartition(" ")[2]
    return file.endswith((".py", ".yaml")) and not file.startswith(("tests/", "docs/", "benchmarks/"))
