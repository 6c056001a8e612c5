"""A record is data: which targets of a configuration that comes from elsewhere may be called.

Whoever opens a run folder or a checkpoint of somebody else must not run that person's code. What may be called is what
conf/ of this installation names, and further components of Thunderhead, torch and Lightning, told by their kind and not
by how they are spelled: `torch.nn.modules.module.torch.load` lies in torch.nn, and is no module.
"""

import functools
import inspect
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import hydra

from thunderhead.core.components import nodes
from thunderhead.core.config import CONF_DIR, Config, ConfigError, Problem, leaves, read_yaml
from thunderhead.core.environment import variables


@functools.cache
def _shipped() -> tuple[frozenset[str], frozenset[str]]:
    """The targets, and the environment variables, that conf/ names."""
    contents = [read_yaml(file) for file in CONF_DIR.rglob("*.yaml")]
    return frozenset(node["_target_"] for _, node in nodes(contents)), frozenset(variables(contents))


_trusted: set[str] = set()


def trust(*names: str) -> None:
    """Let this process call what records name of these packages or modules, or these very targets."""
    _trusted.update(names)


def trust_typed(config: Config) -> None:
    """Trust what the user composed himself: targets and variables in it, at any depth, and what `trust` names."""
    named = config.get("trust")
    trust(*(str(node["_target_"]) for _, node in nodes(config)), *variables(config))
    trust(*(named if isinstance(named, list) else ()))


def is_trusted(target: Any) -> bool:
    """Whether a target may be called: this installation says so, or the user (see `trust`)."""
    if not isinstance(target, str):
        return False
    if any(target == name or target.startswith(f"{name}.") for name in _trusted):
        return True
    return _is_known(target)


def foreign(config: Config) -> list[str]:
    """Modules whose components a configuration names, and which a record of it may call only if somebody says so."""
    targets = [str(node["_target_"]) for _, node in nodes(config)]
    return sorted({target.rpartition(".")[0] or target for target in targets if not _is_known(target)})


def _is_known(target: str) -> bool:
    if target in _shipped()[0]:
        return True
    if target.split(".", maxsplit=1)[0] not in ("thunderhead", "torch", "lightning"):
        return False  # and is not even imported, which would run it
    try:
        found = hydra.utils.get_object(target)
    except Exception:  # then it cannot be called either
        return False
    if not inspect.isclass(found):
        return False
    if found.__module__.startswith("thunderhead."):
        return True
    if found.__module__.startswith(("torch.nn.", "torch.optim.")):  # and so is torch imported by now
        from torch import nn
        from torch.optim import Optimizer

        return issubclass(found, nn.Module | Optimizer)
    from lightning import Callback
    from lightning.pytorch.loggers import Logger

    return found.__module__.startswith("lightning.") and issubclass(found, Callback | Logger)


def refuse_untrusted(config: Config, code: Path | None = None) -> None:
    """Raise ConfigError if a recorded configuration would have something called that is not trusted, at any depth.

    `code`: a folder that has the source of components of whoever made the record.
    """
    message = "is not called, as a record names it, and this installation does not; if you know it: trust=[{}]"
    if code is not None and code.is_dir():
        message += f"; its source is in {code}: read it, and have it found by PYTHONPATH={shlex.quote(str(code))}"
    found = defaultdict[str, list[tuple[str, str]]](list)  # by module: told once
    for path, node in nodes(config):
        if not is_trusted(target := node["_target_"]):
            found[str(target).rpartition(".")[0] or str(target)].append((f"{path}._target_", str(target)))
    problems = []
    for module, ((path, target), *others) in found.items():
        also = f" (as {', '.join(path for path, _ in others)})" if others else ""
        problems.append(Problem(path, f"{target}{also} {message.format(module)}"))
    if problems:
        raise ConfigError(problems)


def refuse_unknown_variables(config: Config) -> None:
    """Raise ConfigError if a record asks for environment variables that neither conf/ nor the user names.

    They may be secrets, which it could have sent elsewhere.
    """
    message = "reads the environment variable {0}, which a record may not choose; if you know it: trust=[{0}]"
    problems = [
        Problem(path, message.format(name))
        for path, value in leaves(config)
        for name in sorted(variables([value]) - _trusted)
        if name not in _shipped()[1]
    ]
    if problems:
        raise ConfigError(problems)
