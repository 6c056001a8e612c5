"""`python -m thunderhead.docs`: docs/options.md, the tables of groups and options, written from conf/.

Sections come from the comments in conf/train.yaml, and what an option is from the comment at the head of its file.
"""

import itertools
import re
from pathlib import Path

import yaml

from thunderhead.core.config import CONF_DIR, options

PAGE = CONF_DIR.parent / "docs" / "options.md"
BEGIN, END = "<!-- options: written by `python -m thunderhead.docs` -->", "<!-- end of options -->"


def sections() -> dict[str, dict[str, str | None]]:
    """The comments in the defaults list of train.yaml, each with its groups and their default options."""
    found: dict[str, dict[str, str | None]] = {}
    for line in (CONF_DIR / "train.yaml").read_text(encoding="utf-8").partition("defaults:\n")[2].splitlines():
        if line.startswith("  # "):
            section = found.setdefault(line.removeprefix("  # "), {})
        elif (entry := yaml.safe_load(line)) and isinstance(entry, list) and isinstance(entry[0], dict):
            section |= {group: default for group, default in entry[0].items() if not group.startswith("override")}
        elif not line.strip():
            break
    return found


def description(file: Path) -> str:
    """What an option is: whole sentences of the comment at the head of its file, the first line's if it ends there."""
    head = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    comment = [line.removeprefix("#").strip() for line in head if not line.startswith("# @package")]
    if not comment:
        raise ValueError(f"{file} does not begin with a comment that says what the option is")
    first = comment[0]
    if first.endswith((".", ">")):
        return first
    return first[: first.rindex(". ") + 1] if ". " in first and len(comment) > 1 else " ".join(comment)


def tables() -> str:
    """All sections as Markdown, default options in bold."""
    lines = []
    for section, groups in sections().items():
        lines += [f"## {section[0].upper()}{section[1:]}", "", "| group | option | |", "|---|---|---|"]
        for group, default in groups.items():
            for row, option in enumerate(sorted(options(group), key=lambda name: name != default)):
                shown = f"**{option}**" if option == default else option
                what = _markdown(description(CONF_DIR / group / f"{option}.yaml"))
                lines.append(f"| {f'`{group}`' if row == 0 else ''} | {shown} | {what} |")
        lines.append("")
    return "\n".join(lines)


def _markdown(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return re.sub(r"(?<![\w/.])(\d{4}\.\d{4,5})(?![\w.]*\d)", r"[\1](https://arxiv.org/abs/\1)", text)


def updated(page: str) -> str:
    """The page's text with the tables made anew between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.name} is up to date")
