"""Lines on the terminal, and numbers as people read them."""

from rich.console import Console
from rich.markup import escape


def say(text: str) -> None:
    """Print one line."""
    Console(highlight=False).print(escape(text), soft_wrap=True)


def complain(text: str) -> None:
    """Print one line on stderr, of what ended a run."""
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)


def quantity(number: float) -> str:
    """Write a count as 6.84 M or 1.2 G; exact below 10,000."""
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= max(factor, 10_000):
            return f"{number / factor:,.3g} {unit}"
    return f"{number:,.0f}"


def size(n_bytes: int) -> str:
    """Write bytes in MiB or GiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
