"""What was meant by an override or a flag that Hydra cannot apply: all at once, with the nearest that works."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thunderhead import familiar
from thunderhead.core import config as configuration
from thunderhead.core.config import Problem, quoted, unknown


def no_flags(arguments: Sequence[str], config_name: str) -> list[Problem]:
    """What has the dashes of a flag, and is none of Hydra's: as a setting, where we know which one is meant."""
    flags = [a for a in get_args_parser().parse_known_args(list(arguments))[1] if a.startswith("-")]
    if not flags:
        return []
    composed = OmegaConf.to_container(_composed([], config_name), resolve=False)
    known, values, problems = paths(composed), dict(configuration.leaves(composed)), []
    for flag in flags:
        word, _, value = flag.lstrip("-").partition("=")
        name = word.replace("-", "_")
        ours = name if name in known else familiar.ours(name) if config_name == "train" else None
        value = value or ("true" if isinstance(values.get(str(ours)), bool) else "…")
        hint = "--help shows what there is"
        if ours:
            hint = f"settings are written without dashes: {familiar.typed(ours, value)}"
        problems.append(Problem(flag.partition("=")[0], f"is no flag; {hint}"))
    return problems


def composition_problems(error: Exception, config_name: str) -> list[Problem]:
    """Hydra stops at the first override that it cannot apply; look at the others too, and suggest."""
    if isinstance(error, MissingConfigException) and (missing := unknown_options()):
        return missing
    lines = str(error).partition("Config search path")[0].strip().splitlines()
    message = "\n    ".join(line for line in lines if line.strip())
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in message:
        message += "\n    " + configuration.first_line(error.__cause__)
    hydras = [Problem("", message)]
    if not isinstance(error, ConfigCompositionException) or "Could not override" not in message:
        return hydras
    groups = {path.name for folder in _conf_dirs() for path in folder.iterdir() if path.is_dir()}
    try:
        parsed = _typed_overrides()
        chosen = [str(o.input_line) for o in parsed if o.key_or_group in groups and not o.is_sweep_override()]
        composed = OmegaConf.to_container(_composed(chosen, config_name), resolve=False)
    except Exception:  # the groups themselves do not compose: Hydra's message is the best there is
        return hydras
    known, problems = paths(composed) | groups, []
    for override in parsed:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in known or key.startswith("hydra"):
            continue
        last = key.rpartition(".")[2]  # of trainer.precision a group
        if config_name == "train" and (ours := familiar.ours(key) or (last if last in groups else None)) is not None:
            value = override.get_value_element_as_str() if ours == "strategy" else "…"
            problems.append(Problem(key, f"is unknown; here it is {familiar.typed(ours, value)}"))
            continue
        above, siblings = key, list[str]()
        while above and not siblings:
            above = above.rpartition(".")[0]
            siblings = [k for k in known if k.rpartition(".")[0] == above]
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        near = near or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        problems.append(Problem(key, unknown(key, near or siblings)))
    return problems or hydras


def _conf_dirs() -> list[Path]:
    """conf/, and the folder that --config-dir names, if it is there."""
    given = get_args_parser().parse_known_args(sys.argv[1:])[0].config_dir
    return [configuration.CONF_DIR, *([Path(given).absolute()] if given and Path(given).is_dir() else [])]


def _composed(overrides: Sequence[str], config_name: str) -> DictConfig:
    """What overrides compose, with the options of --config-dir."""
    search = [f"hydra.searchpath=[{quoted(f'file://{folder}')}]" for folder in _conf_dirs()[1:]]
    return configuration.compose([*search, *overrides], config_name)


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
        known = sorted({file.stem for folder in _conf_dirs() for file in (folder / group).glob("*.yaml")})
        chosen = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        chosen = [choice for each in chosen for choice in (each if isinstance(each, list) else [each])]
        for choice in chosen if known else ():
            if not isinstance(choice, str) or (choice not in known and not elsewhere):
                near = difflib.get_close_matches(str(choice), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                if got := familiar.option(group, str(choice)):
                    hint = f"{got}; "
                problems.append(
                    Problem(group, f"has no option {configuration.show(choice)}; {hint}Options: {', '.join(known)}")
                )
    return problems


def paths(config: Any) -> set[str]:
    """Every config path, also of what is above a value."""
    found = {path for path, _ in configuration.leaves(config)}
    return found | {".".join(path.split(".")[:n]) for path in found for n in range(1, path.count(".") + 1)}
