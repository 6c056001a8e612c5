"""The page of a curation: well-formed, escaped, complete, and with bars in proportion."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typing_extensions import override

import browser
from thunderhead.corpus.curation_report import html_report

VOID = {"meta", "rect"}
EVIL = '<script>alert("x")</script>&amp;'
CURATION = {
    "sources": {
        "web <b>": {
            "documents": 200,
            "kept": 100,
            "removed": {
                "gopher: fewer than 50 words": {
                    "documents": 25,
                    "bytes": 2500,
                    "examples": [{"id": "a<b>.txt", "excerpt": EVIL}, {"id": "b", "excerpt": "bell \x07 tab\t"}],
                },
                "gopher: # > 0.1 a word": {"documents": 50, "bytes": 1_500_000, "examples": []},
                "exact: same text": {"documents": 25, "bytes": 12, "examples": []},
            },
        },
        "empty": {"documents": 0, "kept": 0, "removed": {}},
    }
}


class Page(HTMLParser):
    """Collects text and tags, and checks that each tag is closed in turn."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_escaped_and_needs_nothing_else() -> None:
    html = html_report(CURATION)
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "b>"}
    assert not re.search(r"https?://|url\(|@import", html)
    assert EVIL in page.text  # as text
    assert "web <b>" in page.text
    assert "bell ␇ tab\t" in page.text


def test_the_page_says_what_was_removed() -> None:
    text = Page(html_report(CURATION)).text
    for part in ("100 of 200 documents kept (50.0 %)", "100 documents and 1.5 MB of text removed", "# > 0.1 a word"):
        assert part in text
    assert text.index("# > 0.1 a word") < text.index("fewer than 50 words") < text.index("same text")
    assert "0 of 0 documents kept (–)" in text
    assert "Nothing was removed." in text


def test_bars_are_in_proportion() -> None:
    rectangles = [attributes for tag, attributes in Page(html_report(CURATION)).tags if tag == "rect"]
    stacked = [(float(r["x"] or 0), float(r["width"] or 0)) for r in rectangles if "x" in r][:3]
    assert stacked == [(0, 500), (500, 375), (875, 125)]  # kept, gopher, exact, of 1000
    bars = [float(r["width"] or 0) for r in rectangles if "x" not in r]
    assert bars == [1000, 500, 500]


@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_shows_all_of_it(tmp_path: Path, page: browser.Page, width: int) -> None:
    file = tmp_path / "curation.html"
    file.write_text(html_report(CURATION), encoding="utf-8")
    page.open(file.as_uri(), width, 800)
    assert page.overflow() <= 0
    assert page.ask("innerWidth") == width
    sizes = page.ask("[...document.querySelectorAll('body > svg')].map(e => [e.clientWidth, e.clientHeight])")
    assert sizes
    assert all(across > 300 and high > 5 for across, high in sizes)
    assert not page.errors
    page.photograph(file.with_suffix(".png"))


def test_a_curation_without_documents() -> None:
    assert "0 of 0" in re.sub("<[^>]+>", "", html_report({"sources": {}})).replace("\n", " ")


@pytest.mark.parametrize("arguments", [1, 0])
def test_the_command(tmp_path: Path, arguments: int) -> None:
    (tmp_path / "curation.json").write_text(json.dumps(CURATION))
    given = [str(tmp_path / "curation.json")] * arguments
    command = [sys.executable, "-m", "thunderhead.corpus.curation_report", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if arguments:
        assert done.stdout.strip() == str(tmp_path / "curation.html")
        assert (tmp_path / "curation.html").read_text() == html_report(CURATION)
    else:
        assert done.returncode == 1
        assert "usage" in done.stderr
