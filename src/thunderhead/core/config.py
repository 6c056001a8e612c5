"""From YAML to components: compose, check against signatures, instantiate. No other module of the core knows Hydra.

The signature is the schema: a node with `_target_` is compared with the signature of its target. Parameters without a
default that stand before `*` are supplied by the code (`d_model`, an optimizer's `params`); all others are settings.
"""

import contextlib
import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pydantic
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
# Hydra's own keys of a node; `_partial_` is the builder's business and never stands in YAML.
HYDRA_KEYS = {"_target_", "_convert_", "_recursive_"}
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
        raise ConfigError([Problem(str(error.full_key or ""), str(error).splitlines()[0])]) from error


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


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (config path, value) of everything that is no mapping, and of empty mappings."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from leaves(child, _below(path, key))


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


def read_mapping(file: Path, where: str = "") -> Config:
    """The mapping in a JSON or YAML file of a record; ConfigError, for the setting `where`, if it is damaged."""
    try:
        content = read_yaml(file) if file.suffix == ".yaml" else json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        message = f"{file} is damaged ({why}): copy it from a backup, or start a new run"
        raise ConfigError([Problem(where, message)]) from None
    return content


def options(group: str) -> list[str]:
    """What can be chosen of a group, by name."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def values_of(group: str, option: str) -> Config:
    """An option's values as its file has them, with those of the files of its group that it is made from."""
    own = read_yaml(CONF_DIR / group / f"{option}.yaml") or {}
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    files = [Path(group, base.removesuffix("@_here_")) for base in bases]
    return {key: value for file in files for key, value in values_of(str(file.parent), file.name).items()} | own


# --- check ------------------------------------------------------------------------------------------------------------


def check(config: Config, settings: Callable[..., Any] | None = None) -> list[Problem]:
    """Compare every node of a resolved configuration that has a `_target_` with its target's signature.

    The top-level scalars (seed, name, …) are compared with the signature of `settings`. Returns all problems in order:
    targets that cannot be imported, unknown and missing keys, keys that the code supplies, values that do not fit.
    """
    problems: list[Problem] = []
    if settings is not None:
        scalars = {key: value for key, value in config.items() if not isinstance(value, dict) and value is not None}
        problems += _check_arguments("", settings, scalars, set())
    for path, node in nodes(config):
        try:
            target = _target(node, path)
        except ConfigError as error:
            problems += error.problems
            continue
        if not callable(target):
            problems.append(Problem(f"{path}._target_", f"{node['_target_']!r} is no class or function"))
            continue
        arguments = {key: value for key, value in node.items() if key not in HYDRA_KEYS}
        problems += _check_arguments(path, target, arguments, _supplied_to(path, target))
    return problems


def _supplied_to(path: str, target: Callable[..., Any]) -> set[str]:
    """What the code supplies to a node: to one inside of a group nothing, but to loggers, and to functions."""
    if path.startswith("logger."):
        return {"save_dir"}
    return set() if "." in path and inspect.isclass(target) else set(supplied_names(target))


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, Config]]:
    """Yield (config path, node) of everything that has a `_target_`, at any depth."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from nodes(child, _below(path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from nodes(child, f"{path}[{index}]")


def _check_arguments(path: str, target: Callable[..., Any], arguments: Config, supplied: set[str]) -> Iterator[Problem]:
    parameters = inspect.signature(target).parameters
    settable = {p.name: p for p in parameters.values() if p.name not in supplied and p.kind is not p.VAR_KEYWORD}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints, inside = annotations(target), f"{path}." if path else ""
    for key, value in arguments.items():
        if key in supplied:
            yield Problem(inside + key, "is worked out by Thunderhead and cannot be set")
        elif key not in settable and not takes_any:
            yield Problem(inside + key, unknown(key, list(settable), owner=getattr(target, "__name__", str(target))))
        elif key in hints and not any(True for _ in nodes(value)):
            yield from _check_value(inside + key, value, hints[key])
    for name, parameter in settable.items():
        if (
            parameter.default is parameter.empty
            and parameter.kind is not parameter.VAR_POSITIONAL
            and name not in arguments
        ):
            yield Problem(inside + name, f"is required: {inside}{name}=…")


def annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """A target's parameters' annotations; none if only a type checker can resolve them."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError):
        return {}


def _check_value(where: str, value: Any, hint: Any) -> Iterator[Problem]:
    try:
        settings = pydantic.ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        adapter = pydantic.TypeAdapter(hint, config=settings)
    except pydantic.PydanticUserError:  # a BaseModel or dataclass, which takes no configuration from outside
        adapter = pydantic.TypeAdapter(hint)
    except Exception:  # an annotation that pydantic has no schema for cannot be checked
        return
    for candidate in (value, tuple(value)) if isinstance(value, list) else (value,):  # YAML has no tuples
        try:
            adapter.validate_python(candidate, strict=True)
            return
        except pydantic.ValidationError as error:
            failed = error
    messages = [str(e["msg"]).removeprefix("Input ") for e in failed.errors() if e["type"] != "is_instance_of"]
    reasons = " or ".join(dict.fromkeys(m[0].lower() + m[1:] for m in messages)) or f"should be {_named(hint)}"
    yield Problem(where, f"{repr(value) if isinstance(value, str) else show(value)} is not accepted: {reasons}")


def _named(hint: Any) -> str:
    """A type that only a component is of, in words."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    names = [each.__name__ if inspect.isclass(each) else str(each) for each in typing.get_args(hint) or (hint,)]
    shown = " or ".join(name for name in names if name != "NoneType") if is_union or inspect.isclass(hint) else hint
    return f"a component ({shown}), which is a mapping with _target_"


def unknown(key: str, known: Sequence[str], owner: str = "") -> str:
    """Say that a key is unknown, with the nearest one that is known, or all."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    of = f" to {owner}" if owner else ""
    more = ", …" * (len(known) > MOST_NAMED)
    others = f"known: {', '.join(sorted(known)[:MOST_NAMED])}{more}" if known else "it has no settings"
    return f"is unknown{of}; " + (f"did you mean {near[0]}?" if near else others)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- instantiate ------------------------------------------------------------------------------------------------------


def factory(node: Config, path: str = "") -> functools.partial[Any]:
    """The target of the node at a config path with its settings bound, still to be called with what the code supplies.

    Nodes inside of it are called. `hydra.utils.instantiate` would do, but takes `${` in a resolved text for a variable.
    Raises ConfigError if a node inside of this one refuses its settings, or a target cannot be loaded.
    """
    settings = {key: value for key, value in node.items() if key not in HYDRA_KEYS}
    if node.get("_recursive_", True):
        settings = _called(settings, path)
    return functools.partial(_target(node, path), **settings)


def _target(node: Config, path: str) -> Any:
    try:
        return hydra.utils.get_object(node["_target_"])
    except Exception as error:  # whatever the import of a user's module raises is the answer
        why = " ".join(str(error).split())  # Hydra's first line alone says nothing
        problem = Problem(_below(path, "_target_"), f"cannot load {node['_target_']!r}: {why}")
        raise ConfigError([problem]) from error


def _called(value: Any, path: str) -> Any:
    """A value in which each node is what its target gives."""
    if isinstance(value, list):
        return [_called(child, f"{path}[{index}]") for index, child in enumerate(value)]
    if isinstance(value, dict) and "_target_" in value:
        try:
            return factory(value, path)()
        except (ValueError, AssertionError) as error:
            raise ConfigError([Problem("", placed(path, first_line(error)))]) from error
    return {k: _called(v, _below(path, k)) for k, v in value.items()} if isinstance(value, dict) else value


def supplied_names(target: Callable[..., Any]) -> list[str]:
    """Names that the code supplies to a target: its parameters without a default that stand before the `*`."""
    parameters = inspect.signature(target).parameters.values()
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def call(target: Callable[..., Any], **supplied: Any) -> Any:
    """Call a factory with those of the supplied values that its signature names."""
    return target(**{name: value for name, value in supplied.items() if takes(target, name)})


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether a factory's signature names an argument, or takes any."""
    parameters = inspect.signature(target).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def setting(made: Any, name: str) -> Any:
    """A setting of a factory: as configured, else the default of its signature; None if it has no such setting."""
    default = inspect.signature(made.func).parameters.get(name)
    return made.keywords.get(name, None if default is None or default.default is default.empty else default.default)


def build(node: Config, **supplied: Any) -> Any:
    """The node's target called with its settings and with `supplied`."""
    return factory(node)(**supplied)


def placed(path: str, message: str) -> str:
    """Complete a message about what lies at a config path: `max_bytes=5 is …` names a setting of it, others do not.

    One that begins with a config path of its own, or of this one, stays as it is.
    """
    first = re.match(r"(\w+)[.:=]", message)
    is_path = first and (CONF_DIR / first[1]).is_dir()
    if not path or is_path or message.startswith((f"{path}.", f"{path}:", f"{path}=")):
        return message
    return f"{path}.{message}" if first and message[first.end() - 1] == "=" else f"{path}: {message}"


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """Let refusals of the inside say at which config path their settings are; decorates factories, too."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise ValueError(placed(path, first_line(error))) from error
