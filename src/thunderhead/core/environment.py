"""Texts of a configuration that hold environment variables: a record keeps `${oc.env:NAME}` in place of the value.

Tokens and passwords reach a configuration that way, and records are copied, committed and shown.
"""

import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

SHORTEST_HIDDEN = 8
"""Characters of a value that is looked for in all that is written: shorter ones would be found where they are not."""
_SOURCE = "${oc.env:"
_NAME = r"([^\s\0${}:,'\"]+)"  # shells take fewer characters, other programs these
_VARIABLE = re.compile(rf"\$\{{oc\.env:{_NAME}\}}")
_MARK = re.compile("\0(.*?)\0")
_marks = ContextVar("_marks", default=False)  # whether `oc.env` gives marks in place of values
_values: dict[str, str] = {}  # what was read from the environment, and how it is written


class FromEnvironment(str):
    """A text that holds environment variables, and its `source`, as OmegaConf reads it: `https://x:${oc.env:TOKEN}@y`.

    YAML gets the source, and messages show it.
    """

    source: str

    def __new__(cls, value: str, source: str) -> "FromEnvironment":
        text = super().__new__(cls, value)
        text.source = source
        return text

    def __repr__(self) -> str:
        return repr(self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


yaml.SafeDumper.add_representer(FromEnvironment, lambda dumper, text: dumper.represent_str(text.source))


def _env(key: str, *default: Any) -> str | None:
    return f"\0{key}\0" if _marks.get() and key in os.environ else oc.env(key, *default)


def _decode(expr: str | None, _parent_: Any, _node_: Any) -> Any:
    value = oc.decode(expr and _MARK.sub(lambda name: os.environ[name[1]], expr), _parent_, _node_)
    if isinstance(value, dict | list) and expr and _MARK.search(expr):
        texts(value, _refuse)
    return expr if isinstance(value, str) else value  # numbers are no secrets


def _refuse(text: str) -> str:
    raise ValueError("texts in a list from the environment would stand in records: take a variable for each")


OmegaConf.register_new_resolver("oc.env", _env, replace=True)
OmegaConf.register_new_resolver("oc.decode", _decode, replace=True)


def resolved(config: Any) -> Any:
    """A container as plain ones, all interpolations resolved; texts with variables are `FromEnvironment`."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if "oc.env" not in str(OmegaConf.to_container(config, resolve=False)):
        return values
    marking = _marks.set(True)
    try:
        return _joined(values, OmegaConf.to_container(config, resolve=True))
    finally:
        _marks.reset(marking)


def _joined(value: Any, marked: Any) -> Any:
    if isinstance(value, dict):
        return {key: _joined(child, marked[key]) for key, child in value.items()}
    if isinstance(value, list):
        return [_joined(*pair) for pair in zip(value, marked, strict=True)]
    if not isinstance(value, str) or value == marked:
        return value
    for name in _MARK.findall(marked):
        _values[os.environ[name]] = f"{_SOURCE}{name}}}"
    return FromEnvironment(value, _MARK.sub(lambda name: f"{_SOURCE}{name[1]}}}", escaped(marked)))


def texts(value: Any, change: Callable[[str], str]) -> Any:
    """A configuration with its texts changed."""
    if isinstance(value, dict):
        return {key: texts(child, change) for key, child in value.items()}
    if isinstance(value, list):
        return [texts(child, change) for child in value]
    return change(value) if isinstance(value, str) else value


def escaped(config: Any) -> Any:
    """A resolved configuration in which `${` is text to whoever resolves it once more, but for the environment's."""

    def change(text: str) -> str:
        return text.source if isinstance(text, FromEnvironment) else re.sub(r"(\\*)\$\{", r"\1\1\\${", text)

    return texts(config, change)


def recorded(config: Any) -> Any:
    """A resolved configuration as it is recorded: with the sources of texts from the environment."""
    return texts(config, lambda text: escaped(text) if isinstance(text, FromEnvironment) or _SOURCE in text else text)


def of_record(config: Any) -> Any:
    """The reverse of `recorded`, to be resolved (`escaped`, `resolved`) again; ValueError if it is damaged."""

    def change(text: str) -> str:
        if _SOURCE not in text:
            return text
        if re.search(r"(?<!\\)(\\\\)*\$\{", _VARIABLE.sub("", text)):  # no other interpolation is recorded
            raise ValueError(f"{text} is more than a text with environment variables")
        return FromEnvironment(text, text)

    return texts(config, change)


def variables(config: Any) -> set[str]:
    """The names of the environment variables in an unresolved configuration, or one by `of_record`."""
    found: set[str] = set()

    def note(text: str) -> str:
        found.update(re.findall(rf"(?<!\\)(?:\\\\)*\$\{{\s*oc\.env:\s*{_NAME}", text))
        return text

    texts(config, note)
    return found


def hidden(text: str) -> str:
    """A text for people to read, in which no value from the environment stands.

    Not for what a program reads: a value may be a word like any other, `thunderhead`, which stands in class paths.
    """
    if isinstance(text, FromEnvironment):
        return text.source
    for value, source in _values.items():
        if len(value) >= SHORTEST_HIDDEN:
            text = text.replace(value, source)
    return text
