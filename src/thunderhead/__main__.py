"""`thunderhead train attention=gqa`: the programs of the repository, in any folder."""

import difflib
import os
import runpy
import signal
import sys
from typing import Any

from thunderhead.terminal import complain, take_any_text

PROGRAMS = {
    "train": "pretrain a model, or many: a sweep that ends in a report",
    "prepare": "make shards of tokens from text",
    "compare": "write a report about finished runs",
    "generate": "write text with a model",
    "evaluate": "loss, perplexity and bits per byte on any text",
    "export": "a folder that Hugging Face's transformers load",
    "inspect_batch": "show the text that a step was trained on",
    "coordinate_check": "check that activations keep their size with the width (muP)",
}
_USAGE = "thunderhead <command> [group=option] [key=value] … (thunderhead <command> --help shows all)"


def main(spelled: str = "thunderhead") -> None:
    """Run the program that is named first; exits with 2 where there is none of the name.

    `spelled` is what the command is called, where another package has one of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported: no traceback
    take_any_text()
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("--help", "-h"):
        shown, usage = {**PROGRAMS, "new": "a project of your own: <folder> name=<package>"}, _USAGE
        lines = [usage.replace("thunderhead", spelled), ""]
        print("\n".join([*lines, *(f"  {program:{max(map(len, shown))}}  {what}" for program, what in shown.items())]))
        return
    if name == "--version":
        from importlib.metadata import version

        print(f"thunderhead {version('thunderhead')}")
        return
    if name == "new":
        _new(rest)
        return
    if name in ("-sc", "--shell-completion"):
        name, rest = _completion(spelled, rest)
        if not name:
            return
    if name not in PROGRAMS:
        near = ["train"] if "=" in name else difflib.get_close_matches(name, [*PROGRAMS, "new"], n=1)
        complain(f"there is no command {name}" + (f": did you mean {near[0]}?" if near else f": {', '.join(PROGRAMS)}"))
        sys.exit(2)
    from thunderhead import command_line
    from thunderhead.core.config import CONF_DIR

    program = CONF_DIR.parent / f"{name}.py"
    sys.argv = [str(program), *rest]
    os.environ[command_line.SPELLED] = spelled
    runpy.run_path(str(program), run_name="__main__")


def _completion(spelled: str, asked: list[str]) -> tuple[str, list[str]]:
    """Answer the shell as Hydra does for one program, or return the one that is to answer, and its arguments.

    `asked` is install=bash, uninstall=zsh, query=fish …; the shell has the line that is to be completed in COMP_LINE.
    """
    what, _, shell = "".join(asked[:1]).partition("=")
    _, *words = os.environ.get("COMP_LINE", "").split(" ")
    if what == "query" and (name := next(filter(None, words[:-1]), "")) in PROGRAMS:
        os.environ["COMP_LINE"] = " ".join([spelled, *words[words.index(name) + 1 :]])
        return name, ["-sc", *asked]
    if what == "query":
        print(*sorted([*PROGRAMS, "new"]))
        return "", []
    from hydra._internal.core_plugins import bash_completion, fish_completion, zsh_completion

    shells: dict[str, Any] = {"bash": bash_completion.BashCompletion, "zsh": zsh_completion.ZshCompletion}
    shells |= {"fish": fish_completion.FishCompletion}
    if what not in ("install", "uninstall") or shell not in shells:
        complain(f"--shell-completion is install=<shell> or uninstall=<shell>, of {', '.join(shells)}")
        sys.exit(2)
    sys.argv[0] = spelled
    getattr(shells[shell](None), what)()
    return "", []


def _new(arguments: list[str]) -> None:
    from thunderhead import disk, new
    from thunderhead.core.config import ConfigError

    try:
        folder = new.new(arguments)
    except (ConfigError, OSError) as error:
        complain(disk.problem(error) or " ".join(str(error).split()))
        sys.exit(2)
    print(f"{folder} is a project of your own: see its README.md")


if __name__ == "__main__":
    main()
