"""Compose → check against signatures → instantiate. The only module that knows Hydra.

The signature is the schema: a node with `_target_` is compared with the signature of its target. Parameters without a
default that stand before `*` are supplied by the code (`d_model`, an optimizer's `params`); all others are settings.
Callbacks and loggers, mostly of others, are supplied with what SUPPLIED says.
"""

import difflib
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pydantic
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from thunderhead.core.messages import at

Config = dict[str, Any]
Result = typing.TypeVar("Result")
CONF_DIR = Path(__file__).resolve().parents[3] / "conf"
# Hydra's own keys of a node; `_partial_` is the builder's business and never stands in YAML.
HYDRA_KEYS = {"_target_", "_convert_", "_recursive_"}
SUPPLIED: dict[str, set[str]] = {"callbacks": set(), "logger": {"save_dir"}}
"""What the code supplies to each node of a group, where that does not follow from signatures."""


class Problem(NamedTuple):
    """One thing wrong with the configuration: where, and what with the nearest thing that works."""

    path: str
    message: str


class ConfigError(Exception):
    """The configuration is refused: every problem found, each with its config path. Ends the program with status 2."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{path}: {message}" if path else message for path, message in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # joblib launchers pickle what a job raises
        return type(self), (self.problems,)


# --------------------------------------------------------------------------------------------------------------------
# Compose


def _divide(dividend: int, divisor: int) -> int:
    """`${divide:${model.d_model},64}` in YAML: as many as fit, exactly."""
    if dividend % divisor:
        raise ValueError(f"{dividend} is no multiple of {divisor}")
    return dividend // divisor


OmegaConf.register_new_resolver("divide", _divide, replace=True)
OmegaConf.register_new_resolver("larger", max, replace=True)  # `${larger:1024,${model.context_length}}`


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """The composed configuration, as `python train.py <overrides>` has it; for tests, notebooks and tools."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve every interpolation and return plain dicts and lists.

    Raises:
        ConfigError: a mandatory value (`???`) is missing, or an interpolation fails.

    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException:  # an interpolation that points to a missing value: the plain tree tells which
        missing = _missing(OmegaConf.to_container(config, resolve=False))
    if missing:
        raise ConfigError([Problem(key, f"needs a value: {key}=…") for key in missing])
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise ConfigError([Problem(str(error.full_key or ""), str(error).splitlines()[0])]) from error


def _missing(value: Any, path: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [path] if value == "???" else []
    return [found for key, child in value.items() for found in _missing(child, f"{path}.{key}" if path else str(key))]


def with_overrides(
    config: dict[str, Any],
    overrides: Sequence[str],
    recorded: Sequence[str] = (),
    switched: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A recorded configuration with `key=value` overrides applied; most groups cannot be switched any more.

    Args:
        config: the recorded configuration.
        overrides: to apply.
        recorded: overrides that it was composed with: the choices of groups among them hold already.
        switched: groups that take the place of the recorded ones, as `overrides` compose them.

    Raises:
        ConfigError: an override names a key that the recorded configuration does not have, or a whole group.

    """
    switched = switched or {}
    config = {**config, **switched}
    merged, problems = OmegaConf.create(config), []
    OmegaConf.set_struct(merged, True)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key in switched:
            continue
        is_value = _exists(config, key) and not isinstance(OmegaConf.select(merged, key), DictConfig)
        if override.input_line in recorded and not is_value:
            continue
        if isinstance(OmegaConf.select(merged, key), DictConfig):
            problems.append(Problem(key, f"a resumed run keeps its recorded {key}; single values may change"))
        elif override.is_add() or _exists(config, key):
            OmegaConf.update(merged, key, override.value(), force_add=True)
        else:
            problems.append(Problem(key, _unknown(key, _leaf_paths(config))))
    if problems:
        raise ConfigError(problems)
    return plain(merged)


# --------------------------------------------------------------------------------------------------------------------
# Values by config path


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (config path, value) of everything that is no mapping, and of empty mappings."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, child in value.items():
        yield from leaves(child, f"{path}.{key}" if path else str(key))


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


# --------------------------------------------------------------------------------------------------------------------
# Check


def check(config: dict[str, Any], settings: Callable[..., Any] | None = None) -> list[Problem]:
    """Compare every node that has a `_target_` with its target's signature.

    Args:
        config: a resolved configuration of plain containers.
        settings: a callable whose signature describes the top-level scalars (seed, name, …).

    Returns:
        All problems, in the order of the configuration: targets that cannot be imported, unknown and missing keys,
        keys that the code supplies itself, and values that do not fit the annotation.

    """
    problems = []
    if settings is not None:
        scalars = {key: value for key, value in config.items() if not isinstance(value, dict) and value is not None}
        problems += list(_check_arguments("", settings, scalars))
    for path, node in _nodes(config):
        problems += list(_check_node(path, node))
    return problems


def _nodes(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from _nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _nodes(child, f"{path}[{index}]")


def _check_node(path: str, node: dict[str, Any]) -> Iterator[Problem]:
    name = node["_target_"]
    try:
        target = hydra.utils.get_object(name)
    except Exception as error:  # whatever the import of a user's module raises is the answer
        yield Problem(f"{path}._target_", f"cannot load {name!r}: {str(error).splitlines()[0]}")
        return
    group, _, name = path.partition(".")
    supplied = SUPPLIED.get(group) if name and "." not in name else None
    yield from _check_arguments(path, target, {k: v for k, v in node.items() if k not in HYDRA_KEYS}, supplied)


def _check_arguments(
    path: str, target: Callable[..., Any], arguments: dict[str, Any], supplied: set[str] | None = None
) -> Iterator[Problem]:
    parameters = inspect.signature(target).parameters
    if supplied is None:
        supplied = {p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY}
    settable = [p.name for p in parameters.values() if p.name not in supplied and p.kind is not p.VAR_KEYWORD]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(target)

    for key, value in arguments.items():
        where = f"{path}.{key}" if path else key
        if key in supplied:
            yield Problem(where, "is worked out by Thunderhead and cannot be set")
        elif key not in settable and not takes_any:
            yield Problem(where, _unknown(key, settable, owner=getattr(target, "__name__", str(target))))
        elif key in hints and not _contains_target(value):
            yield from _check_value(where, value, hints[key])
    for name in settable:
        required = parameters[name].default is inspect.Parameter.empty
        if required and parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL and name not in arguments:
            where = f"{path}.{name}" if path else name
            yield Problem(where, f"is required: {where}=…")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (
        NameError,
        TypeError,
    ):  # annotations that only a type checker can resolve: names are checked, values are not
        return {}


def _contains_target(value: Any) -> bool:
    return any(True for _ in _nodes(value))


def _check_value(where: str, value: Any, hint: Any) -> Iterator[Problem]:
    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
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
    reasons = list(dict.fromkeys(_reason(e) for e in failed.errors() if e["type"] != "is_instance_of"))
    yield Problem(where, f"{_show(value)} is not accepted: {' or '.join(reasons) or f'should be {hint}'}")


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Input ")
    return message[0].lower() + message[1:]


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _unknown(key: str, known: Sequence[str], owner: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    of = f" to {owner}" if owner else ""
    return f"is unknown{of}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _leaf_paths(value: Any, path: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [path]
    own = [path] if path else []
    return own + [leaf for key, child in value.items() for leaf in _leaf_paths(child, f"{path}.{key}" if path else key)]


def _exists(config: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


# --------------------------------------------------------------------------------------------------------------------
# Instantiate


def factory(node: dict[str, Any]) -> Callable[..., Any]:
    """The node's target with its settings bound, still to be called with what the code supplies."""
    try:
        return typing.cast(Callable[..., Any], hydra.utils.instantiate(node, _partial_=True, _convert_="all"))
    except InstantiationException as error:  # a node inside this one was refused: its own words are clearer
        raise (error.__cause__ or error) from None


def build(node: dict[str, Any], **supplied: Any) -> Any:
    """The node's target called with its settings and with `supplied`."""
    return factory(node)(**supplied)


def build_all(
    nodes: dict[str, Any], path: str, kind: type[Result], refusals: tuple[type[Exception], ...] = (), **supplied: Any
) -> dict[str, Result]:
    """Build each node of a mapping, which must give objects of a class.

    Args:
        nodes: by name.
        path: of the mapping in the configuration.
        kind: a class.
        refusals: what these say no with, beside ValueError, TypeError and AssertionError.
        supplied: what the code hands to each.

    Raises:
        ConfigError: some are refused; names all, each with its path.
    """
    built, problems = {}, []
    expected: tuple[type[Exception], ...] = (ValueError, TypeError, AssertionError, *refusals)
    for name, node in nodes.items():
        where = f"{path}.{name}"
        try:
            made = build(node, **supplied) if isinstance(node, dict) and "_target_" in node else node
        except expected as error:
            problems.append(Problem("", at(where, str(error).splitlines()[0])))
            continue
        if isinstance(made, kind):
            built[name] = made
        else:
            target = f"{kind.__module__}.{kind.__name__}"
            problems.append(Problem(where, f"is no {kind.__name__.lower()}: its _target_ must be a {target}"))
    if problems:
        raise ConfigError(problems)
    return built


# --------------------------------------------------------------------------------------------------------------------
# Command line


def options(group: str) -> list[str]:
    """What can be chosen of a group, by name."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def default_groups() -> list[str]:
    """The groups of conf/train.yaml that have an option unless told otherwise, in its order."""
    defaults = yaml.safe_load((CONF_DIR / "train.yaml").read_text())["defaults"]
    chosen = [entry for entry in defaults if isinstance(entry, dict)]
    return [group for entry in chosen for group, option in entry.items() if option and " " not in group]


def chosen_groups(overrides: Sequence[str]) -> set[str]:
    """What `overrides` give a value to, without those below it: `attention` of attention=gqa."""
    return {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}


def invocation_overrides() -> list[str]:
    """The overrides of this run, as typed (`attention=gqa`); empty outside of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def is_multirun() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def output_dir() -> Path:
    """The folder that Hydra gave this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def job(function: Callable[[DictConfig], Result], config: DictConfig) -> Result:
    """Call the function of a single run; a refusal ends the program here, before Hydra reports it as a failure."""
    try:
        return function(config)
    except ConfigError as error:
        if is_multirun():
            raise
        _refuse(error.problems)


def run(main: Callable[[], Any], config_name: str = "train") -> None:
    """Call a `@hydra.main` function as a program: 0 done, 2 refused (one clear message, no traceback), 1 failed.

    With HYDRA_FULL_ERROR=1 in the environment, failures keep Hydra's own frames in the traceback.
    """
    sys.argv[1:] = repeated_sweep(sys.argv[1:])
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error to us
    try:
        main()
    except ConfigError as error:
        _refuse(error.problems)
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(_composition_problems(error, config_name))
    except ValueError as error:
        if not (str(error).startswith("Config group override must be") and (emptied := _emptied_groups())):
            raise
        _refuse(emptied)
    except BrokenPipeError:  # the reader has seen enough, as in `train.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def repeated_sweep(arguments: list[str]) -> list[str]:
    """`resume=<sweep folder>` becomes the arguments that the sweep was started with, in its folder; others stay.

    What stands beside it takes the place of recorded overrides of the same key: `seed=1,2,3,4` adds seeds.
    """
    resumed = next((a for a in arguments if a.startswith("resume=")), "")
    folder = Path(resumed.removeprefix("resume=")).absolute()
    if not resumed or not (folder / "sweep.json").is_file():
        return arguments
    given = [a for a in arguments if a not in (resumed, "-m", "--multirun")]
    keys = {a.partition("=")[0] for a in given if "=" in a} | {"hydra.sweep.dir"}
    recorded = json.loads((folder / "sweep.json").read_text())["arguments"]
    kept = [a for a in recorded if a.partition("=")[0] not in keys]
    return [*kept, *given, f"hydra.sweep.dir='{folder}'"]


def _refuse(problems: Sequence[Problem]) -> typing.NoReturn:
    console = Console(stderr=True, highlight=False)
    count = "the configuration is refused" if len(problems) == 1 else f"{len(problems)} problems, nothing was started"
    console.print(f"[bold red]error:[/] {count}")
    for path, message in problems:
        # soft_wrap keeps one problem on one line when the output is read by a program
        console.print(
            f"  [bold]{escape(path)}[/] {escape(message)}" if path else f"  {escape(message)}", soft_wrap=True
        )
    console.file.flush()
    sys.exit(2)


def _composition_problems(error: Exception, config_name: str) -> list[Problem]:
    """Hydra stops at the first override that it cannot apply; look at the others too, and suggest."""
    if isinstance(error, MissingConfigException) and (unknown := _unknown_options()):
        return unknown
    lines = str(error).partition("Config search path")[0].strip().splitlines()
    message = "\n    ".join(line for line in lines if line.strip())
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in message:
        message += "\n    " + str(error.__cause__).splitlines()[0]
    if not isinstance(error, ConfigCompositionException) or "Could not override" not in message:
        return [Problem("", message)]
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    try:
        parsed = _typed_overrides()
        chosen = [o.input_line for o in parsed if o.key_or_group in groups and not o.is_sweep_override()]
        keys = _leaf_paths(OmegaConf.to_container(compose([str(c) for c in chosen], config_name), resolve=False))
    except Exception:  # the groups themselves do not compose: Hydra's message is the best there is
        return [Problem("", message)]
    known = set(keys) | groups
    problems = []
    for override in parsed:
        key = override.key_or_group
        if not (override.is_add() or override.is_force_add() or key in known or key.startswith("hydra")):
            parent = key.rpartition(".")[0]
            siblings = [k for k in known if k.rpartition(".")[0] == parent] or sorted(known)
            near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
            near = near or difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
            hint = (
                f"did you mean {near[0]}?" if near else f"{parent or 'the top level'} has {', '.join(sorted(siblings))}"
            )
            problems.append(Problem(key, f"is unknown; {hint}"))
    return problems or [Problem("", message)]


def _typed_overrides() -> list[Override]:
    """What stands on the command line as key=value."""
    return OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and a[0] != "-"])


def _unknown_options() -> list[Problem]:
    """Choices on the command line that no group of conf/ has; empty where options may also come from elsewhere."""
    if any(argument.startswith(("--config-dir", "-cd")) for argument in sys.argv):
        return []
    problems = []
    for override in _typed_overrides():
        known = options(override.key_or_group)
        chosen = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        for choice in chosen:
            if known and isinstance(choice, str) and choice not in known:
                near = difflib.get_close_matches(choice, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}? " if near else ""
                message = f"has no option {choice}; {hint}Options: {', '.join(known)}"
                problems.append(Problem(override.key_or_group, message))
    return problems


def _emptied_groups() -> list[Problem]:
    """Groups that the command line sets to null, for which Hydra names none."""
    groups = [o.key_or_group for o in _typed_overrides() if not o.is_sweep_override() and o.value() is None]
    return [
        Problem(group, f"null is no option; options: {', '.join(options(group))}") for group in groups if options(group)
    ]


def to_yaml(config: dict[str, Any]) -> str:
    """A resolved configuration as YAML, keys in the order of composition."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
