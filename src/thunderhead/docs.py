"""`python -m thunderhead.docs`: tables of the documentation that are written from what they are about.

docs/options.md has groups and their options: sections come from the comments in conf/train.yaml, and what an option is
from the comment at the head of its file. docs/export.md has which options other libraries' classes have together.
"""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from thunderhead.core.config import CONF_DIR, options
from thunderhead.release import architectures, llama_cpp
from thunderhead.release.facts import PLAIN, Candidate

DOCS = CONF_DIR.parent / "docs"


_HEADS = {"all": "mha", "fewer": "gqa", "one": "mqa"}
_FUNCTIONS = {"gelu_pytorch_tanh": "gelu, approximate=tanh", "relu2": "relu²", "silu": "silu", "gelu": "gelu"}


def sections() -> dict[str, dict[str, str | None]]:
    """The comments in the defaults lists of programs, each with its groups and their default options."""
    found: dict[str, dict[str, str | None]] = {}
    for program in ("train", "prepare"):
        section: dict[str, str | None] = {}  # of groups without a comment before them, which are train's
        for line in (CONF_DIR / f"{program}.yaml").read_text(encoding="utf-8").partition("defaults:\n")[2].splitlines():
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


def classes(candidates: Iterable[Candidate]) -> str:
    """What each class can be, as Markdown."""
    lines = ["| class | norm, block | feed-forward | positions | attention |", "|---|---|---|---|---|"]
    for candidate in candidates:
        can = {fact: {plain} for fact, plain in PLAIN.items()} | dict(candidate.allows)
        norms = [
            f"{norm} (bias=false)" if can["norm.bias"] == {"false"} and norm == "layernorm" else norm
            for norm in _listed(can["norm"])
        ]
        functions = [_FUNCTIONS[name] for name in _listed(can.get("function", set()))]
        forward = [*_listed(can["activation"]), *["bias"] * ("true" in can["model.bias"])]
        if functions:
            forward[0] += f" ({', '.join(functions)})"
        rope = [
            *_listed(can["position.scaling"] - {"none"}),
            *(["fraction"] if "less" in can["position.fraction"] else []),
        ]
        places = [f"rope ({', '.join(rope)})" if name == "rope" and rope else name for name in _listed(can["position"])]
        mixing = [_HEADS[kind] for kind in _HEADS if kind in can["attention.n_kv_heads"]]
        mixing = mixing if can["attention"] == {"softmax"} else _listed(can["attention"])
        for option in ("head_dim", "window", "qk_norm", "qkv_bias", "logit_softcap"):
            values = can[f"attention.{option}"]
            if values & {"given", "true"}:
                mixing.append(option if values & {"null", "false", "d_model / n_heads"} else f"**{option}**")
        columns = (f"{', '.join(norms)}; {' or '.join(_listed(can['block']))}", ", ".join(forward), ", ".join(places))
        lines.append(f"| {' | '.join((candidate.name, *columns, ', '.join(mixing)))} |")
    return "\n".join([*lines, ""])


def _listed(values: set[str]) -> list[str]:
    order = ("rmsnorm", "pre", "gated", "rope", "learned")
    return sorted(values, key=lambda value: (order.index(value) if value in order else len(order), value))


# What stands between these markers of a page is written here.
PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("options.md", "options"): tables,
    ("export.md", "classes of transformers"): lambda: classes(architectures.ARCHITECTURES),
    ("export.md", "architectures of llama.cpp"): lambda: classes(llama_cpp.ARCHITECTURES),
}


def updated(page: str, part: str, content: str) -> str:
    """A page's text with a part of it made anew between its markers."""
    begin, end = f"<!-- {part}: written by `python -m thunderhead.docs` -->", f"<!-- end of {part} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page lacks the markers {begin} and {end}")
    return f"{before}{begin}\n\n{content}\n{end}{after}"


if __name__ == "__main__":
    for (page, part), content in PARTS.items():
        text = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(updated(text, part, content()), encoding="utf-8")
        print(f"docs/{page}: {part} up to date")
