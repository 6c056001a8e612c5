"""What the programs at the top of the repository share: what was typed, and how a refusal is told.

Exit status: 0 done, 2 refused (one clear message, no traceback, nothing begun), 1 failed.
"""

import atexit
import contextlib
import logging
import os
import pkgutil
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from thunderhead import choices, disk, env_file, lean, suggestions
from thunderhead.composing import groups_composed_once
from thunderhead.core import config as configuration
from thunderhead.core import resolvers
from thunderhead.core.config import Config, ConfigError, Problem, quoted, unknown
from thunderhead.core.environment import escaped
from thunderhead.processes import SIGNALS, Stopped, end_with_launcher, global_rank, listen, stop
from thunderhead.terminal import take_any_text


def invocation_overrides() -> list[str]:
    """The overrides of this run, as typed (`attention=gqa`); empty outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    lines = typing.cast(list[str], OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
    return [_as_typed.get(line, line) for line in lines]


_as_typed: dict[str, str] = {}  # of what `for_the_record` has changed


_repeated = False


def is_repeated() -> bool:
    """Whether this is a sweep that goes on by `resume=<its folder>`."""
    return _repeated


def for_the_record(arguments: list[str]) -> list[str]:
    """With `resume=<run>` let Hydra compose values of settings that only the options of the record have.

    `with_overrides` then says whether they have them.
    """
    if not any(a.startswith("resume=") for a in arguments):
        return arguments
    values = [a for a in arguments if re.match(r"(?!hydra\b)[\w/]+\.[\w.-]+=", a)]
    _as_typed.update({f"++{value}": value for value in values})
    return [f"++{a}" if a in values else a for a in arguments]


def is_multirun() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def output_dir() -> Path:
    """The folder that Hydra gave this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def chosen(overrides: Sequence[str]) -> set[str]:
    """What `overrides` give a value to, without those below it: `attention` of attention=gqa."""
    return {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}


def with_overrides(
    config: Config, overrides: Sequence[str], recorded: Sequence[str] = (), switched: Mapping[str, Config] | None = None
) -> Config:
    """A recorded configuration with `key=value` overrides applied; most groups cannot be switched any more.

    Of the overrides that it was composed with (`recorded`) the choices of groups hold already. `switched` groups take
    the place of the recorded ones, as `overrides` compose them.

    Raises ConfigError for a key that the recorded configuration does not have, or a whole group.
    """
    config = {**config, **(switched or {})}
    known = suggestions.paths(config)
    merged, problems = OmegaConf.create(escaped(config)), []
    OmegaConf.set_struct(merged, True)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        is_group = isinstance(OmegaConf.select(merged, key), DictConfig)
        holds_already = override.input_line in recorded and (is_group or key not in known)
        if key in (switched or {}) or holds_already:
            continue
        if is_group:
            problems.append(Problem(key, f"a resumed run keeps its recorded {key}; single values may change"))
        elif override.is_add() or key in known:
            OmegaConf.update(merged, key, override.value(), force_add=True)
        else:
            problems.append(Problem(key, unknown(key, sorted(known))))
    if problems:
        raise ConfigError(problems)
    return configuration.plain(merged)


def from_job(folder: Path, run_dir: Path) -> list[str]:
    """Arguments that start train.py from the one configuration in `folder`/job.yaml, with its record in `run_dir`."""
    place = ["--config-path", str(folder), "--config-name", "job", f"hydra.run.dir={quoted(run_dir)}"]
    return [*place, "hydra.output_subdir=null", "hydra/job_logging=stdout"]


atexit.register(lean.end)  # before what others register, so that it comes after that

SPELLED = "THUNDERHEAD_SPELLED"
"""In the environment, for the processes of a run or sweep, too: what starts the programs, if not python (train.py)."""


def shown(program: str, *overrides: str) -> str:
    """A command as a shell takes it, for hints: `python train.py …`; quote texts for Hydra first (`quoted`)."""
    spelled = os.environ.get(SPELLED)
    started = ["python", program] if spelled is None else [spelled, program.removesuffix(".py")]
    return " ".join([*started, *map(suggestions.for_shell, overrides)])


OmegaConf.register_new_resolver("program", lambda name: shown(f"{name}.py"), replace=True)  # of --help
OmegaConf.register_new_resolver("label", choices.label, replace=True)  # of a run's folder


def job(function: str, config: DictConfig, *arguments: str) -> Any:
    """Call the function of a single run; a refusal ends the program here, before Hydra reports it as a failure.

    It and its further arguments come by their dotted names: what they import takes seconds, and --help, tab completion
    and unknown options need none of it.
    """
    try:
        with lean.importing():
            call, *more = map(pkgutil.resolve_name, (function, *arguments))
    except BaseException:  # Ctrl-C
        remove_if_empty(output_dir())
        raise
    try:
        with disk.told():
            return call(config, *more)
    except ConfigError as error:
        if is_multirun():
            raise
        _refuse(error.problems)
    except BrokenPipeError:  # before Hydra reports it
        _end_without_reader()


def _end_without_reader() -> typing.NoReturn:
    """The reader has seen enough, as in `train.py --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def remove_if_empty(folder: Path) -> None:
    """Remove a run's folder and the one above it, which Hydra makes before we can refuse the run; not where we are."""
    here = Path.cwd()
    for place in (folder.resolve(), folder.resolve().parent):
        if place not in (here, *here.parents):
            with contextlib.suppress(OSError):
                place.rmdir()


_BARE_FLAGS = ("-m", "--multirun", "-h", "--help", "-r", "--run", "--resolve")
_FLAG_WITH_VALUE = re.compile(r"(--config-(dir|path|name)|-c|--cfg|--package|-p)(=|$)")
_LONG = {"d": "dir", "p": "path", "n": "name"}


def run(main: Callable[[], Any], config_name: str = "train", expand: Mapping[str, str] | None = None) -> None:
    """Call a `@hydra.main` function as a program: 0 done, 2 refused (one clear message, no traceback), 1 failed.

    `expand`: by the name of a setting, a function by its dotted name that takes the arguments if that is among them,
    and says what they stand for.

    With HYDRA_FULL_ERROR=1 in the environment, failures keep Hydra's own frames in the traceback.
    """
    try:
        with groups_composed_once():
            _run(main, config_name, expand or {})
    finally:
        for folder in resolvers.made:  # of what was refused or only planned
            remove_if_empty(folder)
        for number in SIGNALS:  # while it ends, the interpreter puts back what they do by default
            signal.signal(number, signal.SIG_IGN)


def _run(main: Callable[[], Any], config_name: str, expand: Mapping[str, str]) -> None:
    take_any_text()
    if "${" in os.getcwd():
        _refuse([Problem("", f"{os.getcwd()}: Hydra takes the ${{ in this path for a variable: start from another")])
    if os.getcwd().encode("utf-8", "replace") != os.getcwdb():  # no record can hold it
        _refuse([Problem("", f"{os.getcwd()!r} is no UTF-8: start from another folder, or rename it")])
    try:
        env_file.load()
    except ConfigError as error:
        _refuse(error.problems)
    sys.argv[1:] = for_the_record(flags_first(repeated_sweep(sys.argv[1:])))
    if problems := suggestions.not_settings(sys.argv[1:], config_name):
        _refuse(problems)
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        # For each group that it lists, Hydra would copy what it knows of the search path: most of the time help takes.
        CachingConfigRepository.__init__ = _uncopied  # type: ignore[assignment,method-assign]
    end_with_launcher()
    with_frames = os.environ.get("HYDRA_FULL_ERROR") == "1"  # asked for, or by a launcher that tells what ranks say
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error to us
    handler = listen(stop)  # until something of its own listens, as a run that trains
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        for name, function in expand.items():
            if any(argument.startswith(f"{name}=") for argument in sys.argv[1:]):
                sys.argv[1:] = pkgutil.resolve_name(function)(sys.argv[1:])
        main()
    except Stopped as stopped:
        if global_rank() == 0:
            name = signal.Signals(stopped.number).name
            print(f"stopped by {name}; the same command starts it again", file=sys.stderr)
        logging.disable(logging.INFO)  # of what torch says at its end where it could not be set up
        sys.exit(128 + stopped.number)
    except Exception as error:
        if with_frames:
            raise
        _tell(error, config_name)
        raise


def _uncopied(repository: CachingConfigRepository, delegate: IConfigRepository) -> None:
    repository.delegate, repository.cache = delegate, {}


def _tell(error: Exception, config_name: str) -> None:
    """End the program with what an error says, if it is one of the user's or of the disk, not of the program."""
    if isinstance(error, ConfigError):
        _refuse(error.problems)
    if isinstance(error, HydraException | OmegaConfBaseException):
        if (why := disk.problem(error)) is not None:  # of `new_folder`
            _refuse([Problem("", why)])
        _refuse(suggestions.composition_problems(error, config_name))
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    roots = (module.partition(".")[0] for module in modules)
    *_, package = (root for root in roots if root in ("thunderhead", "hydra_plugins", "hydra", "omegaconf"))
    if isinstance(error, ValueError | TypeError) and package in ("hydra", "omegaconf"):
        # while they compose: a group that is no text, a key of a list that is no number
        found = suggestions.unknown_options() or suggestions.guilty(config_name)
        _refuse(found or [Problem("", configuration.first_line(error))])
    if isinstance(error, OSError) and (why := disk.problem(error)) is not None:
        _refuse([Problem("", why)])  # of Hydra, which makes the run's folder before we are called
    if isinstance(error, BrokenPipeError):
        _end_without_reader()


def repeated_sweep(arguments: list[str]) -> list[str]:
    """`resume=<sweep folder>` becomes the arguments that the sweep was started with, in its folder; others stay.

    What stands beside it takes the place of recorded overrides of the same key: `seed=1,2,3,4` adds seeds.
    """
    resumed = next((a for a in arguments if a.startswith("resume=")), "")
    if not resumed:
        return arguments
    if resumed == "resume=":
        _refuse([Problem("resume", "is empty: give the folder of a run or of a sweep")])
    try:
        folder = Path(str(OverridesParser.create().parse_override(resumed).value())).absolute()
    except HydraException:  # which Hydra will say
        return arguments
    if not os.path.isfile(folder / "sweep.json"):  # Path's raises for a long name
        return arguments
    given = joined(a for a in arguments if a not in (resumed, "-m", "--multirun"))
    keys = {a.partition("=")[0] for a in given if "=" in a} | {"hydra.sweep.dir"}
    try:
        recorded = configuration.read_mapping(folder / "sweep.json", "resume")["arguments"]
        kept = [a for a in joined(recorded) if a.partition("=")[0] not in keys]
    except ConfigError as error:
        _refuse(error.problems)
    except (KeyError, TypeError, AttributeError) as error:
        _refuse([Problem("resume", f"{folder / 'sweep.json'} is damaged ({error}): copy it from a backup")])
    if doubtful := [a for a in kept if not is_taken_from_a_record(a)]:
        message = "could run code of whoever wrote it; if you know it, type it again beside resume=…"
        _refuse([Problem("resume", f"{folder / 'sweep.json'}: {a} {message}") for a in doubtful])
    global _repeated  # noqa: PLW0603 - this process is one command
    _repeated = True
    return [*kept, *given, f"hydra.sweep.dir={quoted(folder)}"]


def commas_to_list(arguments: list[str]) -> list[str]:
    """`runs=a,b` as `runs=[a,b]`: Hydra would take the first for a sweep, and refuse it."""
    return [re.sub(r"^runs=(?!\[)(.*)", r"runs=[\1]", argument, flags=re.DOTALL) for argument in arguments]


def flags_first(arguments: Iterable[str]) -> list[str]:
    """Hydra's flags, then the overrides, which argparse takes on one side of a flag only: seed=1,2 -m attention=gqa."""
    return sorted(joined(arguments), key=lambda a: not (a in _BARE_FLAGS or _FLAG_WITH_VALUE.match(a)))


def joined(arguments: Iterable[str]) -> list[str]:
    """`--config-dir x`, and `-cd x`, as one argument, `--config-dir=x`."""
    joined: list[str] = []
    for typed in arguments:
        argument = re.sub(r"^-c([dpn])(?==|$)", lambda short: f"--config-{_LONG[short[1]]}", typed)
        if joined and (flag := _FLAG_WITH_VALUE.fullmatch(joined[-1])) and flag[3] == "":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


# What a recorded sweep may tell the program and Hydra themselves; what a launcher is told may end in a shell, and
# `params` are any settings.
_OF_PROGRAMS = re.compile(r"-|[+~]*(hydra|trust)")
_HARMLESS = re.compile(
    r"(-m|--multirun)$|hydra/(launcher|sweeper)=\w+$|hydra\.sweep\.|hydra\.launcher\.\w+=[\w.:-]+$"
    r"|[+~]*hydra\.sweeper\.(?!params)[\w.]+(=[^$]*)?$"
)


def is_taken_from_a_record(argument: str) -> bool:
    """Whether what a sweep was started with is used again when somebody goes on with it; else it is typed again."""
    return "_target_" not in argument and not (_OF_PROGRAMS.match(argument) and not _HARMLESS.match(argument))


def _refuse(problems: Sequence[Problem]) -> typing.NoReturn:
    console = Console(stderr=True, highlight=False)
    count = "the configuration is refused" if len(problems) == 1 else f"{len(problems)} problems, nothing was started"
    console.print(f"[bold red]error:[/] {count}")
    for path, message in problems:
        where = f"[bold]{escape(path)}[/] " if path else ""
        said = re.sub(r"\bpython (\w+\.py)\b", lambda hint: shown(hint[1]), message)
        # soft_wrap keeps one problem on one line when the output is read by a program
        console.print(f"  {where}{escape(said)}", soft_wrap=True)
    console.file.flush()
    sys.exit(2)
