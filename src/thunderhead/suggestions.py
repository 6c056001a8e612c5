"""What was meant by an override or a flag that Hydra cannot apply: all at once, with the nearest that works."""

import argparse
import difflib
import glob
import inspect
import itertools
import pkgutil
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from thunderhead import familiar
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, quoted, unknown


def _check_text(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Python 3.14 checks each help as it is added; Hydra 1.3's for its completion is no text yet (hydra#3121)."""
    if isinstance(action.help, str) and (check := getattr(argparse._ActionsContainer, "_check_help", None)):
        check(parser, action)


argparse.ArgumentParser._check_help = _check_text  # type: ignore[attr-defined]


def not_settings(arguments: Sequence[str], config_name: str) -> list[Problem]:
    """What is no key=value and none of Hydra's flags: as a setting, where we know which one is meant."""
    given, others = _parsed(arguments)
    flags = [a for a in others if a.startswith("-")]
    words = [w for w in (*given.overrides, *others) if w not in flags and "=" not in w and not w.startswith("~")]
    if not flags and not words:
        return []
    composed, problems = OmegaConf.to_container(_composed([], config_name), resolve=False), []
    known, values = paths(composed), dict(configuration.leaves(composed))
    for flag in flags:
        name, _, value = flag.partition("=")
        after = arguments[[*arguments].index(flag) + 1 :] if name == flag else ()
        for word in itertools.takewhile(words.__contains__, after):
            value = f"{value} {word}".strip()
            words.remove(word)
        key = name.lstrip("-").replace("-", "_")
        is_switch = isinstance(values.get(key, values.get(str(familiar.ours(key)))), bool)
        value = value or ("true" if is_switch else "")
        said = f"here it is {_typed(key, value)}" if key in known else _meant(key, value, known, config_name)
        said = said.replace("here it is ", "settings are written without dashes: ") or "--help shows what there is"
        problems.append(Problem(name, f"is no flag; {said}"))
    for word in words:
        is_train = config_name == "train"
        said = familiar.REMARKS.get(word, "") if is_train else ""
        if is_train and re.search(r"\.(py|ya?ml|toml|json)$", word):
            said = familiar.REMARKS["config"]
        elif is_train and (elsewhere := _groups_with(word)):
            said = "here it is " + " or ".join(f"{group}={word}" for group in elsewhere)
        problems.append(Problem(word, f"is no setting; {said or 'settings are written as name=value (see --help)'}"))
    return problems


def _parsed(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Hydra's flags and the overrides, and what it does not know."""
    parser = get_args_parser()
    parser.allow_abbrev = False  # --config would be one of three
    return parser.parse_known_args([*arguments])


def _groups_with(option: str) -> list[str]:
    """Groups that have an option of this name."""
    found = {file.parent.name for folder in _conf_dirs() for file in folder.glob(f"*/{glob.escape(option)}.yaml")}
    return sorted(found) if option not in ("auto", "none", "default") else []


def _meant(key: str, value: str, known: Collection[str], config_name: str) -> str:
    """What stands for another project's setting, told as the end of a sentence; nothing where we do not know."""
    if config_name != "train":
        here = familiar.ours(key) or ""
        here = "run" if here == "resume" else here
        return f"here it is {_typed(here, value)}" if here in known else ""
    if remark := familiar.ours(key, familiar.REMARKS):
        return remark
    above, _, last = key.lower().rpartition(".")
    if last in ("name", "type", "enable", "enabled", "mode") and above:  # optimizer.name is optimizer
        last = above.rpartition(".")[2]
    path = familiar.ours(key) or familiar.ours(last) or (last if options(last) else None)
    if path is None:  # training.steps
        alike = [each for each in known if each.rpartition(".")[2] == last]
        path = alike[0] if len(alike) == 1 else None
    return f"here it is {_typed(path, value)}" if path else ""


def _typed(path: str, value: str) -> str:
    """What to type for a setting of ours, given as in `familiar.FAMILIAR`, with the value that somebody gave theirs."""
    *before, last = path.split()
    if "{tokens}" in last:
        length = _composed([], "train").model.context_length
        tokens = f"{int(value) * length} ({value} sequences of {length} tokens)" if value.isdecimal() else "…"
        return path.replace("{tokens}", tokens)
    if "=" in last:
        group = last.partition("=")[0]
        if value and (said := familiar.option(group, value.split(maxsplit=1)[0])) and value.lower() not in ON:
            return said
        is_off = value.lower() in OFF and "{" not in last
        return "to be left out" if is_off else path.replace("{}", value or "…")
    if names := options(last):
        return _option(last, (value or "true").split()[0]) or f"{last}=… (one of {', '.join(names)})"
    return " ".join([*before, f"{last}={shlex.quote(value) if value else '…'}"])


OFF, ON = ("false", "no", "off", "0", "null"), ("true", "yes", "on", "1")


def options(group: str) -> list[str]:
    """Of conf/ and of --config-dir, by name."""
    return sorted({file.stem for folder in _conf_dirs() for file in (folder / group).glob("*.yaml")}) if group else []


def _option(group: str, name: str) -> str:
    """What to type for an option that somebody names, if we know; where it is one of another group, that."""
    known, name = options(group), name.lower()
    if name in known:
        return f"{group}={name}"
    if said := familiar.option(group, name):
        return said
    for words, usual in ((OFF[:-1], "none"), (ON, "auto")):
        if name in words and usual in known:
            return f"{group}={usual}"
    near = difflib.get_close_matches(name, known, n=1) or [each for each in known if each.startswith(name)][:1]
    if not near and len(elsewhere := _groups_with(name)) == 1:
        return f"{elsewhere[0]}={name}"
    return f"{group}={near[0]}" if near else ""


def composition_problems(error: Exception, config_name: str) -> list[Problem]:
    """Hydra stops at the first override that it cannot apply; look at the others too, and suggest."""
    if isinstance(error, MissingConfigException) and (missing := unknown_options()):
        return [*missing, *_unknown_keys(config_name, {path for path, _ in missing})]
    if isinstance(error, OverrideParseException):
        return [_unread(error.override)]
    if other := re.search(r"In '(\S+)/(\S+)': Could not override '(\S+)'\. No match in the defaults", str(error)):
        group, option, chosen = other.groups()
        return [Problem(group, f"{option} is for train.py: it chooses {chosen}, which is no choice of this program")]
    if isinstance(error, InterpolationResolutionError):  # of a name in its folder, which is resolved first
        try:
            configuration.plain(_composed([a for a in _parsed(sys.argv[1:])[0].overrides if a[0] != "-"], config_name))
        except ConfigError as found:
            return found.problems
        except (HydraException, OmegaConfBaseException):
            pass
        return [Problem(str(error.full_key or ""), configuration.first_line(error))]
    lines = str(error).partition("Config search path")[0].strip().splitlines()
    message = "\n    ".join(line for line in lines if line.strip())
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in message:
        message += "\n    " + configuration.first_line(error.__cause__)
    hydras = [Problem("", message)]
    if not isinstance(error, ConfigCompositionException) or "Could not override" not in message:
        return hydras
    return _unknown_keys(config_name) or hydras


def for_shell(argument: str) -> str:
    """In double quotes where they do, as Hydra's own are single; `shlex.quote` would take five characters for each."""
    return f'"{argument}"' if "'" in argument and not re.search(r'["$`\\!]', argument) else shlex.quote(argument)


def _unread(override: str) -> Problem:
    """An override that Hydra's grammar does not take, and what mends it: quotes, or a value."""
    key, is_setting, value = override.partition("=")
    if is_setting and "…" in value:
        return Problem(key, f"needs a value in place of …: {override}")
    mended = f"{key}={quoted(value)}"
    try:
        OverridesParser.create().parse_override(mended)
    except HydraException:
        mended = ""
    if is_setting and mended:
        return Problem(key, f"{value} cannot be read without quotes: {for_shell(mended)}")
    form = "key=value, +key=value or ~key, its key of letters, digits, _ and dots, without spaces"
    return Problem("", f"{override!r} cannot be read: an override is {form}")


def _unknown_keys(config_name: str, refused: Collection[str] = ()) -> list[Problem]:
    """Keys on the command line that the chosen options do not have; those of `refused` groups are not known."""
    groups = {path.name for folder in _conf_dirs() for path in folder.iterdir() if path.is_dir()}
    try:
        parsed = _typed_overrides()
        groups |= {*_composed([], config_name, with_hydra=True).hydra.runtime.choices}
        keys = {o.key_or_group for o in parsed if o.key_or_group in groups and o.key_or_group not in refused}
        chosen = [str(o.input_line) for o in parsed if o.key_or_group in keys and not o.is_sweep_override()]
        composed = OmegaConf.to_container(_composed(chosen, config_name, with_hydra=True), resolve=False)
    except Exception:  # the groups themselves do not compose: Hydra's message is the best there is
        return []
    known, problems = paths(composed) | {group for group in groups if "/" not in group}, []
    for override in parsed:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in known | groups or key.split(".")[0] in refused:
            continue
        if said := _meant(key, str(override.input_line).partition("=")[2], known, config_name):
            problems.append(Problem(key, f"is unknown; {said}"))
            continue
        if "/" in key:
            problems.append(Problem(key, unknown(key, sorted(groups))))
            continue
        if _is_parameter(key, composed):
            message = f"stands in no file of conf/, but its _target_ takes it: +{override.input_line}"
            problems.append(Problem(key, message))
            continue
        problems.append(Problem(key, _nearest(key, known)))
    return problems


def _nearest(key: str, known: Collection[str]) -> str:
    """That a key is unknown, with the nearest beside it, else of its name elsewhere, else with all beside it."""
    above, siblings = key, list[str]()
    while above and not siblings:
        above = above.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == above and not k.endswith("._target_")]
    inside = f"{above}." if above else ""
    names, rest = [k.removeprefix(inside) for k in siblings], key.removeprefix(inside)
    if near := difflib.get_close_matches(rest, names, n=1):
        return unknown(key, [inside + near[0]])
    last = key.rpartition(".")[2]
    elsewhere = [k for k in sorted(known) if difflib.get_close_matches(k.rpartition(".")[2], [last], cutoff=0.75)]
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6) if not above else []
    near = near or difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.0)
    return unknown(key, near) if near else unknown(rest, names)


def _is_parameter(key: str, composed: Any) -> bool:
    """Whether the class or function of the node that a key lies in takes it as a setting that has a name."""
    from thunderhead.core import components  # and pydantic: not for --help

    above, _, last = key.rpartition(".")
    try:
        target = pkgutil.resolve_name(str(dict(components.nodes(composed))[above]["_target_"]))
        parameter = inspect.signature(target).parameters[last]
        is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        return is_named and last not in components.supplied_names(target)
    except (ImportError, AttributeError, KeyError, ValueError, TypeError):
        return False


def _conf_dirs() -> list[Path]:
    """conf/, and the folder that --config-dir names, if it is there."""
    given = _parsed(sys.argv[1:])[0].config_dir
    return [configuration.CONF_DIR, *([Path(given).absolute()] if given and Path(given).is_dir() else [])]


def _composed(overrides: Sequence[str], config_name: str, *, with_hydra: bool = False) -> DictConfig:
    """What overrides compose, with the options of --config-dir."""
    search = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in _conf_dirs()[1:]]
    return configuration.compose([*search, *overrides], config_name, with_hydra=with_hydra)


def guilty(config_name: str) -> list[Problem]:
    """What each override on the command line does wrong by itself."""
    problems = list[Problem]()
    for override in _typed_overrides():
        try:
            _composed([str(override.input_line)], config_name)
        except HydraException as error:  # which has words for this one
            problems += [each for each in composition_problems(error, config_name) if each not in problems]
        except (ValueError, TypeError, OmegaConfBaseException) as error:
            message = f"cannot be set so ({configuration.first_line(error)})"
            problems.append(Problem(override.key_or_group, message))
    return problems


def _typed_overrides() -> list[Override]:
    """What stands on the command line as key=value."""
    return OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and a[0] != "-"])


def unknown_options() -> list[Problem]:
    """Choices on the command line that no group has; but for null, options may come from a search path, too."""
    elsewhere = any(argument.startswith("hydra.searchpath") for argument in sys.argv)
    problems = []
    for override in _typed_overrides():
        group = override.key_or_group
        known = options(group)
        chosen = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        chosen = [choice for each in chosen for choice in (each if isinstance(each, list) else [each])]
        for choice in chosen if known else ():
            if not isinstance(choice, str) or (choice not in known and not elsewhere):
                said = _option(group, str(choice))
                near = difflib.get_close_matches(str(choice), known, n=1, cutoff=0.5)
                is_near = said in [f"{group}={option}" for option in near]
                verb = "type" if said.startswith(f"{group}=") else "there is"
                hint = f"did you mean {near[0]}? " if is_near else f"{verb} {said}; " if said else ""
                problems.append(
                    Problem(group, f"has no option {configuration.show(choice)}; {hint}Options: {', '.join(known)}")
                )
    return problems


def paths(config: Any) -> set[str]:
    """Every config path, also of what is above a value."""
    found = {path for path, _ in configuration.leaves(config)}
    return found | {".".join(path.split(".")[:n]) for path in found for n in range(1, path.count(".") + 1)}
