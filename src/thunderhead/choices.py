"""Which options of conf/ a resolved configuration was put together from, found by its values."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from thunderhead.core.config import CONF_DIR, Config, leaves, options, read_yaml, values_of

OF_A_SWEEP = ("match", "tune")
_UNSAID = re.compile(
    r"(name|resume|dry_run|trust|sample|profile|keep_freed_memory|background_checkpoints)$"
    r"|(logger|callbacks|generation|plan|trainer|hydra)\b|(data|tokenizer|curation)\."
)
"""What changes where a run lies or what it shows; and settings of data, which may hold paths and tokens."""
LABEL_LENGTH = 60


@functools.cache
def defaults() -> dict[str, str]:
    """The groups of conf/train.yaml that have an option unless told otherwise, with that option, in its order."""
    entries = read_yaml(CONF_DIR / "train.yaml")["defaults"]
    chosen = [entry for entry in entries if isinstance(entry, dict)]
    return {group: option for entry in chosen for group, option in entry.items() if option and " " not in group}


@functools.cache
def _values(group: str, option: str) -> dict[str, Any]:
    return dict(leaves(values_of(group, option), group))


def nearest(group: str, node: Any, among: Collection[str] | None = None) -> tuple[str | None, list[str]]:
    """The option of a group with the node's target that is nearest to it, and the config paths that differ from it.

    Of its values only those at the paths `among` count; None = all. An interpolation may stand for any value. None if
    no option has the target.
    """
    best: tuple[str | None, list[str]] = (None, [])
    target = f"{group}._target_"

    def counted(values: dict[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in values.items() if among is None or path == target or path in among}

    own, usual = counted(dict(leaves(node, group))), defaults().get(group)
    for name in sorted(options(group), key=lambda name: name != usual):
        option = counted(_values(group, name))
        if option.get(target) != own.get(target):
            continue
        both = own | dict.fromkeys(option)
        differing = [p for p in both if own.get(p) != option.get(p) and "${" not in str(option.get(p))]
        if best[0] is None or len(differing) < len(best[1]):
            best = name, differing
    return best


def choices(config: Config) -> dict[str, tuple[str, dict[str, Any]]]:
    """The option of each group that has a target, and the values that are not the option's: ("adamw", {"lr": 0.1})."""
    found = {}
    for group in defaults():
        node = config.get(group)
        if not isinstance(node, dict) or "_target_" not in node or group in OF_A_SWEEP:
            continue
        option, differing = nearest(group, node)
        values = dict(leaves(node, group))
        changed = {path.partition(".")[2]: values.get(path) for path in differing if option is not None}
        found[group] = option or str(node["_target_"]).rpartition(".")[2], changed
    return found


def names(choices: Mapping[str, str]) -> list[str]:
    """Choices as typed, as people say them: groups by their option alone, values with a name: gqa, lr=0.001, seed=1."""
    parts = []
    for name, value in choices.items():
        is_value = "." in name or re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?|true|false|null", value) is not None
        parts.append(f"{name.rpartition('.')[2]}={value}" if is_value else value)
    return parts


def label(overrides: Sequence[str]) -> str:
    """The choices among a run's overrides, for the name of its folder: `mqa-lion-lr_0.001_`; empty without any."""
    typed = {key.lstrip("+"): value for key, sep, value in (line.partition("=") for line in overrides) if sep}
    said = {key: value for key, value in typed.items() if not _UNSAID.match(key) and not re.search(r"[/{}\[\]]", value)}
    shown = {key: f"{key}_{value}" if value in ("none", "auto", "default") else value for key, value in said.items()}
    groups_first = dict(sorted(shown.items(), key=lambda each: (each[0] == "seed", "." in each[0])))
    words = [re.sub(r"[^A-Za-z0-9.-]+", "_", word).strip("_.-") for word in names(groups_first)]
    return f"{'-'.join(filter(None, words))[:LABEL_LENGTH].rstrip('-_.')}_".lstrip("_")
