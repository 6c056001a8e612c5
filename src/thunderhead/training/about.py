"""What a logger is told of a run beside configuration and plan: names, choices, commit and command."""

import re
import shlex
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thunderhead import disk
from thunderhead.choices import choices, defaults
from thunderhead.core.config import read_mapping, show
from thunderhead.core.environment import hidden, recorded
from thunderhead.core.run import Run
from thunderhead.training.plan import Plan
from thunderhead.training.record import Surroundings


def parameters(run: Run, plan: Plan) -> dict[str, Any]:
    """What every logger's `log_hyperparams` gets: the configuration, the plan as `planned`, and `about`."""
    config = recorded(run.config)
    return {**config, "planned": plan.to_dict(), "about": about(run.folder, config)}


def about(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Names and surroundings of the run in a folder, whose record is there.

    - id: the same for all starts of the run, and another for each run.
    - name: what differs from the other runs of its sweep, or the folder's name.
    - group: name and time of the sweep; None for a single run.
    - choices: the option of each group, with what was changed of it; tags: those that are no defaults.
    - commit, with `+` if there were uncommitted changes; command.
    """
    environment = read_mapping(file, shape=Surroundings) if (file := folder / "environment.json").is_file() else {}
    sweep = next((above for above in folder.absolute().parents[:2] if (above / "sweep.json").is_file()), None)
    git, command = environment.get("git") or {}, environment.get("command") or []
    name, group = folder.absolute().name, None
    if sweep is not None:
        name, group = re.sub(r"-[0-9a-f]{8}\Z", "", name), f"{sweep.parent.name}/{sweep.name}"
        command = ["train.py", *read_mapping(sweep / "sweep.json")["arguments"]]
    chosen = {
        each: " ".join([option, *(f"{path}={show(value)}" for path, value in changed.items())])
        for each, (option, changed) in choices(config).items()
    }
    return {
        "id": _kept_id(folder),
        "name": name,
        "group": group,
        "tags": [
            f"{each}={words.split()[0]}" for each, words in chosen.items() if words.split()[0] != defaults()[each]
        ],
        "choices": chosen,
        "commit": (git.get("commit") or "unknown") + "+" * bool(git.get("changed_files")),
        "command": hidden(shlex.join(["python", Path(command[0]).name, *command[1:]])) if command else "",
    }


def _kept_id(folder: Path) -> str:
    """By which services know a run again when it is resumed, wherever its folder is by then."""
    file = folder / "run_id"
    if not file.is_file():
        disk.write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8").strip()


def card(parameters: Mapping[str, Any]) -> str:
    """The choices of a run as Markdown: the command, the commit, sizes, and the option of each group."""
    told, plan = parameters["about"], parameters["planned"]
    usual = defaults()
    rows = [
        f"| {group} | {words} |" if words == usual[group] else f"| **{group}** | **{words}** |"
        for group, words in told["choices"].items()
    ]
    total = plan["parameters"]["total"]
    facts = f"{total:,} parameters, {plan['tokens']:,} tokens in {plan['steps']:,} steps of {plan['tokens_per_step']:,}"
    return "\n".join(
        [
            f"`{told['command']}`",
            "",
            f"{facts}; seed {parameters['seed']}; commit {told['commit']}",
            "",
            "| group | choice (bold: no default) |",
            "|---|---|",
            *rows,
        ]
    )
