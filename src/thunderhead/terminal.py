"""Lines and numbers as a person reads them on the terminal."""

import os
import sys

from rich.console import Console as RichConsole
from rich.markup import escape


class Console(RichConsole):
    """Rich's, which would end the program with its reader (`| head`): work goes on without one."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_any_text() -> None:
    """Have what the output's encoding lacks printed as ?, where Python would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


_console = Console(highlight=False)
TELL_SECONDS = 30.0
"""Between lines about the progress of long work, where there is no terminal."""


def say(text: str) -> None:
    """One line."""
    _console.print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """One line on stderr, of what ended a run."""
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def quantity(number: float) -> str:
    """6.84 M, 1.2 B; exact below 10,000."""
    if number < 10_000:
        return f"{number:,.0f}"
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    raise AssertionError


def duration(seconds: float) -> str:
    """In whole seconds or minutes."""
    return f"{seconds / 60:,.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def size(n_bytes: int) -> str:
    """In MiB or GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
