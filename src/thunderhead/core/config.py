"""Configurations as plain dicts: composed by Hydra, read from records, asked and changed by config path."""

import difflib
import json
import re
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import thunderhead.core.resolvers  # noqa: F401 - registers them
from thunderhead.core.environment import escaped, resolved
from thunderhead.core.types import Problem as Problem  # noqa: PLC0414 - for all who check a configuration

_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (_PACKAGE / "programs" / "conf", _PACKAGE.parents[1] / "conf") if folder.is_dir())
"""Of the installed package, or of the repository; the programs lie beside it."""
MOST_NAMED = 40  # names in a message
Config = dict[str, Any]


class ConfigError(Exception):
    """The configuration is refused: every problem found, each with its config path. Ends the program with status 2."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{path}: {message}" if path else message for path, message in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # joblib launchers pickle what a job raises
        return type(self), (self.problems,)


# --- compose ----------------------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), config_name: str = "train", *, with_hydra: bool = False) -> DictConfig:
    """The composed configuration, as `python train.py <overrides>` has it; for tests, notebooks and tools."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)


def plain(config: DictConfig) -> Config:
    """Resolve every interpolation and return plain dicts and lists; see `thunderhead.core.environment`.

    Raises ConfigError if a mandatory value (`???`) is missing, or an interpolation fails.
    """
    unresolved = OmegaConf.to_container(config, resolve=False)
    if missing := sorted(path for path, value in leaves(unresolved) if value == "???"):
        raise ConfigError([Problem(path, f"needs a value: {path}=…") for path in missing])
    try:
        return typing.cast(Config, resolved(config))
    except OmegaConfBaseException as error:
        problems = list(_unresolved(config, unresolved))
        raise ConfigError(problems or [Problem(str(error.full_key or ""), first_line(error))]) from error


def _unresolved(config: DictConfig, unresolved: Any) -> Iterator[Problem]:
    """Each value that refers to what is not there."""
    for path, value in leaves(unresolved):
        if "${" in str(value):
            try:
                found = OmegaConf.select(config, path)
                if OmegaConf.is_config(found):
                    OmegaConf.to_container(found, resolve=True)
            except OmegaConfBaseException as error:
                yield Problem(path, f"{show(value)} cannot be resolved ({first_line(error)}); ${{ as text is \\${{")


_NO_TEXT = {"true", "false", "null", "nan", "inf"}  # in Hydra's override language


def quoted(value: str | Path) -> str:
    """A text as a value in Hydra's override language, which reads it as exactly this text."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", text) and text.lower() not in _NO_TEXT:
        return text
    text = re.sub(r"(\\*)'", r"\1\1\\'", escaped(text))
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def to_yaml(config: Config) -> str:
    """A resolved configuration as YAML, keys in the order of composition."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


# --- values by config path --------------------------------------------------------------------------------------------


def below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (config path, value) of everything that is no mapping, and of empty mappings."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from leaves(child, below(path, key))


def set_value(config: Config, path: str, value: Any) -> Config:
    """Return a copy with another value at a config path (`model.d_model`); mappings on the way are made if need be."""
    key, _, rest = path.partition(".")
    inner = config.get(key)
    return {**config, key: set_value(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def differences(then: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(config path, value then, value now) of what differs; None stands for what is not there."""
    before, after = dict(leaves(then)), dict(leaves(now))
    return [(path, before.get(path), after.get(path)) for path in before | after if before.get(path) != after.get(path)]


def show(value: Any) -> str:
    """A value as it would be written in YAML or on the command line, in one line."""
    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True))
        .removesuffix("\n...\n")
        .strip()
    )


DEEPEST = 200  # levels of a YAML file


def read_yaml(file: Path) -> Any:
    """By libyaml where it is there, ten times as fast; it does not survive any depth: levels are counted before."""
    text, loader, depth = file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecursionError(f"more than {DEEPEST} levels")
    return yaml.load(text, Loader=loader)


def damaged(file: Path, why: object, where: str = "", remedy: str = "begin anew") -> ConfigError:
    """To be raised, for the setting `where`, where a file of a record is not as it was written."""
    said = " ".join(str(why).split())[:200]
    return ConfigError([Problem(where, f"{file} is damaged ({said}): copy it from a backup, or {remedy}")])


def read_mapping(file: Path, where: str = "", shape: Any = None) -> Config:
    """The mapping in a JSON or YAML file of a record; ConfigError, for the setting `where`, if it is damaged.

    `shape`, a TypedDict, says what must be there, and of which types.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")  # a named pipe would be waited for
        content = read_yaml(file) if file.suffix == ".yaml" else json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise damaged(file, error, where) from None
    if shape is not None and (why := misshapen(content, shape)):
        raise damaged(file, why, where)
    return content


def misshapen(content: Any, shape: Any) -> str | None:
    """Say where a value is not of a type; None: it is."""
    import pydantic  # not for --help

    try:
        pydantic.TypeAdapter(shape).validate_python(content, strict=True)
    except pydantic.ValidationError as error:
        return first_fault(error)
    return None


def first_fault(error: Any) -> str:
    """The first of what a ValidationError of pydantic refuses, and where: all of it would be pages."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: " * bool(where) + f"{first['msg'][0].lower()}{first['msg'][1:]}"


def options(group: str) -> list[str]:
    """What can be chosen of a group, by name."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def values_of(group: str, option: str) -> Config:
    """An option's values as its file has them, with those of the files of its group that it is made from."""
    own = read_yaml(CONF_DIR / group / f"{option}.yaml") or {}
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    files = [Path(group, base.removesuffix("@_here_")) for base in bases]
    return {key: value for file in files for key, value in values_of(str(file.parent), file.name).items()} | own


# --- in words ---------------------------------------------------------------------------------------------------------


def unknown(key: str, known: Sequence[str], owner: str = "") -> str:
    """Say that a key is unknown, with the nearest one that is known, or all."""
    near = difflib.get_close_matches(key, known, n=1)
    of = f" to {owner}" if owner else ""
    more = ", …" * (len(known) > MOST_NAMED)
    others = f"known: {', '.join(sorted(known)[:MOST_NAMED])}{more}" if known else "it has no settings"
    return f"is unknown{of}; " + (f"did you mean {near[0]}?" if near else others)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what a bare `assert` asks for, or the error's kind."""
    if message := str(error).strip():
        return message.splitlines()[0]
    asked = traceback.extract_tb(error.__traceback__)[-1:] if isinstance(error, AssertionError) else []
    return next((f"refused by `{at.line}`" for at in asked if at.line), type(error).__name__)
