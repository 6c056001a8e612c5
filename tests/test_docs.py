"""README and docs: the commands that they (and --help) show are accepted, links lead somewhere, the Python runs."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from thunderhead.core import components, config
from thunderhead.training import memory, run
from tiny import plan_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "conf" / "hydra" / "help").glob("*.yaml")]
# In text a command stands between backticks; in a block or in --help it ends at a comment or at two spaces.
PROGRAMS = "train|prepare|coordinate_check|compare|generate|evaluate|export|inspect_batch"
COMMAND = re.compile(rf"`python ((?:{PROGRAMS})\.py[^`]*)`|^ *python ((?:{PROGRAMS})\.py.*)$", re.M)
ANYTHING = re.compile(r"<[^>]*>|…")  # what the reader fills in
NOT_TAKEN = ("my_package", "my_conf", "--", "...", "[group=option", "[key=value")
# Overrides that go to Hydra's own configuration, which `compose` leaves out.
HYDRAS = ("hydra",)


def commands() -> list[tuple[str, str]]:
    """(page, command) of each command that can be taken as it stands."""
    found = []
    for page in PAGES:
        for in_text, in_block in COMMAND.findall(page.read_text()):
            command = re.split(r" #|   *| > ", in_text or in_block)[0].strip()
            if not any(placeholder in command for placeholder in NOT_TAKEN):
                found.append((page.name, command))
    return sorted(set(found))


def combinations(arguments: list[str]) -> list[list[str]]:
    """Overrides of single runs in which each swept value comes up once."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    options = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override() and o.is_discrete_sweep()
        else [] if o.is_sweep_override() else [str(o.input_line)]
        for o in parsed
    ]  # fmt: skip
    options = [values for values in options if values]
    longest = max((len(values) for values in options), default=1)
    return [[values[min(i, len(values) - 1)] for values in options] for i in range(longest)]


def test_there_are_many() -> None:
    assert len(commands()) > 60
    assert {page.name for page in PAGES} >= {"README.md", "lecture.md", "sweeps.md", "thunderhead.yaml"}


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_shown_command_is_accepted(page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It passes the check, and a run can be planned, but for one of the reader's files or that prepares data first."""
    monkeypatch.chdir(tmp_path)  # nothing is prepared
    monkeypatch.setattr(memory, "estimate", lambda *_, **__: {"parameters": 1, "activations": 1})  # takes seconds
    filled_in = ANYTHING.sub("something", command)
    program, *arguments = shlex.split(filled_in.replace("~", "/home/me"))  # as a shell has it
    arguments = [a for a in arguments if a not in ("-m", "something") and not a.startswith((*HYDRAS, "init_from="))]
    is_run = program == "train.py"
    for overrides in combinations(arguments):
        composed = config.plain(config.compose(overrides, program.removesuffix(".py")))
        assert components.check(composed, run.settings if is_run else None) == []
        if (
            is_run
            and filled_in == command
            and not any(a.startswith(("data.path=", "resume=", "budget=epochs")) for a in arguments)
        ):
            for acts_on_arms in ("match", "tune"):
                composed.pop(acts_on_arms)
            assert plan_of(composed).steps


def test_pages_that_are_linked_are_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not target.startswith("../../actions/"):  # GitHub's, of whose copy it shows
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links {target}"


def test_the_front_door_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_each_page_is_in_the_index() -> None:
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in index] == []


def test_each_target_of_make_that_is_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def test_the_notebook_example_runs() -> None:
    page = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- notebook: [^\n]*-->\n```python\n(.*?)```\n", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in names["decoder"].parameters())


def test_each_dependency_has_its_licence_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    for dependencies in (project["dependencies"], *project["optional-dependencies"].values()):
        for dependency in dependencies:
            name = re.split(r"[^A-Za-z0-9-]", dependency)[0]
            assert name == "thunderhead" or re.search(rf"[ |]{name}[,;: |(]", listed), name


def test_the_citation_names_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires


def test_issue_forms_are_forms() -> None:
    """As GitHub's syntax for issue forms has it: otherwise the form is silently left out."""
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys()
        for element in form["body"]:
            wanted = {"markdown": {"value"}, "textarea": {"label"}, "checkboxes": {"label", "options"}}[element["type"]]
            assert wanted <= element["attributes"].keys()


def test_actions_are_pinned_by_hash() -> None:
    """A tag can be moved to other code; a hash cannot."""
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / ".github" / "workflows").glob("*.yml"))
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert text.count("\npermissions: {}\n") == len([*(ROOT / ".github" / "workflows").glob("*.yml")])


def test_the_site_and_the_list_of_decisions_have_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}\n" not in nav] == []
    decisions = ROOT / "docs" / "decisions"
    listed = (decisions / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in decisions.glob("0*.md") if f"]({page.name}): " not in listed] == []
