"""From YAML to components: nodes with a `_target_` are checked against signatures, and instantiated.

The signature is the schema: a node with `_target_` is compared with the signature of its target. Parameters without a
default that stand before `*` are supplied by the code (`d_model`, an optimizer's `params`); all others are settings.
"""

import contextlib
import difflib
import enum
import functools
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import hydra
import pydantic

from thunderhead.core.config import CONF_DIR, Config, ConfigError, Problem, below, first_line, show, unknown

# Hydra's own keys of a node; `_partial_` is the builder's business and never stands in YAML.
HYDRA_KEYS = {"_target_", "_convert_", "_recursive_"}
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it tells of each target that cannot be loaded; so do we


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
        if path == "scheduler" and "torch.optim.lr_scheduler" in [
            base.__module__ for base in getattr(target, "__mro__", ())
        ]:
            message = "is a scheduler of torch's, which acts on an optimizer: name a function (step, total_steps, …) to"
            problems.append(
                Problem(f"{path}._target_", f"{message} the factor of the peak learning rate, as scheduler=wsd does")
            )
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
            yield from nodes(child, below(path, key))
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
            message = "is worked out by Thunderhead and cannot be set"
            if not target.__module__.startswith("thunderhead."):
                message += "; a setting of your own needs a default, or a place behind the * of the signature"
            yield Problem(inside + key, message)
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
    if inspect.isclass(hint) and issubclass(hint, enum.Enum | os.PathLike):
        return f"a {hint.__name__}, which YAML cannot write: let the signature take text (str, or Literal)"
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    names = [each.__name__ if inspect.isclass(each) else str(each) for each in typing.get_args(hint) or (hint,)]
    shown = " or ".join(name for name in names if name != "NoneType") if is_union or inspect.isclass(hint) else hint
    return f"a component ({shown}), which is a mapping with _target_"


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
        problem = Problem(below(path, "_target_"), f"cannot load {node['_target_']!r}{_near(node['_target_'])}: {why}")
        raise ConfigError([problem]) from error


def _near(target: Any) -> str:
    """A name of the same module that may have been meant, if that can be loaded."""
    module, _, name = str(target).rpartition(".")
    names = dir(sys.modules[module]) if module in sys.modules else []
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {module}.{near[0]}?)" if near else ""


def _called(value: Any, path: str) -> Any:
    """A value in which each node is what its target gives."""
    if isinstance(value, list):
        return [_called(child, f"{path}[{index}]") for index, child in enumerate(value)]
    if isinstance(value, dict) and "_target_" in value:
        try:
            return factory(value, path)()
        except (ValueError, AssertionError) as error:
            raise ConfigError([Problem("", placed(path, first_line(error)))]) from error
    return {k: _called(v, below(path, k)) for k, v in value.items()} if isinstance(value, dict) else value


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


def of_kind(made: Any, kind: Any) -> Any:
    """What a target gave, if it is of a kind, where that is a class. Raises ValueError otherwise."""
    if inspect.isclass(kind) and not isinstance(made, kind):
        raise ValueError(wrong_kind(made, kind))
    return made


def wrong_kind(made: Any, kind: type) -> str:
    """Say that what a target gives is not of a kind."""
    what = made.__name__ if inspect.isclass(made) else type(made).__name__
    return f"{what} is no {kind.__name__}: its _target_ must give a {kind.__module__}.{kind.__name__}"


def having(made: Any, *names: str) -> Any:
    """What a target gave, if it has all of the names. Raises ValueError otherwise."""
    if missing := [name for name in names if not hasattr(made, name)]:
        raise ValueError(f"{type(made).__name__} has no {missing[0]}, which a run asks of what this _target_ gives")
    return made


def results(target: Callable[..., Any]) -> dict[str, Any]:
    """Of which class is what a target's factories give, as its signature says."""
    found = {}
    for name, hint in annotations(target).items():
        if typing.get_origin(hint) is Callable:
            given = typing.get_args(hint)[1]
            found[name] = object if given is Any else typing.get_origin(given) or given
    return found


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
