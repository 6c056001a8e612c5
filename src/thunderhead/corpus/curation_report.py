"""What a curation removed, as one HTML page: `python -m thunderhead.corpus.curation_report <folder>/curation.json`.

The page needs no network and no script, and prints as it looks.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

# Okabe & Ito's colours, which all kinds of sight tell apart; grey is for what was kept.
_COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#F0E442", "#000000")
_KEPT = "#c9d1cb"
_WIDTH = 1000  # of the bars, in SVG units

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.45 "DejaVu Sans", system-ui, sans-serif; color: #1c2126; background: #fff;
       max-width: 1040px; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem }
p { margin: .3rem 0 } .quiet { color: #5b6670 } b.big { font-size: 1.15em }
svg { width: 100%; height: auto; display: block; margin: .5rem 0 }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .8rem; padding: 0;
            font-size: .88em }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: .82em; font-weight: 600; color: #5b6670; border-bottom: 2px solid #d7dde1 }
th, td { padding: .35rem .6rem .35rem 0; vertical-align: top }
tr.rule td { border-top: 1px solid #d7dde1; padding-top: .6rem }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 22% } td.bar svg { margin: .3rem 0 0 }
.examples { display: flex; gap: .6rem; padding: 0 0 .7rem }
figure { flex: 1 1 0; min-width: 0; margin: 0; background: #f4f6f7; border-radius: 4px; padding: .4rem .5rem }
figcaption { font-size: .74em; color: #5b6670; overflow-wrap: anywhere }
pre { font: 10.5px/1.35 "DejaVu Sans Mono", ui-monospace, monospace; margin: .2rem 0 0; white-space: pre-wrap;
      overflow-wrap: anywhere; max-height: 8.1em; overflow: hidden }
@media print { body { margin: 0; max-width: none; font-size: 11px } .examples, figure { break-inside: avoid }
               * { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def html_report(curation: Mapping[str, Any]) -> str:
    """Make the page of what curation.json holds (see `thunderhead.corpus.curation.Removals`)."""
    sources = curation["sources"]
    documents, kept = (sum(source[count] for source in sources.values()) for count in ("documents", "kept"))
    lost = sum(removed["bytes"] for source in sources.values() for removed in source["removed"].values())
    colours = _colours(sources)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Curation</title>',
        f"<style>{_STYLE}</style></head><body><h1>Curation</h1>",
        f'<p><b class="big">{kept:,}</b> of <b class="big">{documents:,}</b> documents kept '
        f"({_percent(kept, documents)}); {documents - kept:,} documents and {_size(lost)} of text removed.</p>",
        '<p class="quiet">A document counts for the first filter that removes it, in the order of the filters.'
        " Examples are the first documents removed, and begin as shown.</p>",
    ]
    for name, source in sources.items():
        parts += _source(name, source, colours)
    return "\n".join([*parts, "</body></html>", ""])


def _colours(sources: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each filter, in the order in which they appear."""
    filters = list(dict.fromkeys(_filter(reason) for source in sources.values() for reason in source["removed"]))
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(filters)}


def _filter(reason: str) -> str:
    return reason.partition(": ")[0]


def _source(name: str, source: Mapping[str, Any], colours: Mapping[str, str]) -> Iterator[str]:
    documents, kept, removed = source["documents"], source["kept"], source["removed"]
    yield f"<h2>{escape(name)}</h2>"
    yield f"<p>{kept:,} of {documents:,} documents kept ({_percent(kept, documents)})</p>"
    by_filter = {"kept": kept}
    for reason, found in removed.items():
        by_filter[_filter(reason)] = by_filter.get(_filter(reason), 0) + found["documents"]
    yield _stacked(by_filter, documents, colours)
    if not removed:
        yield '<p class="quiet">Nothing was removed.</p>'
        return
    most = max(found["documents"] for found in removed.values())
    yield (
        '<table><thead><tr><th>filter</th><th>removed because</th><th></th><th class="number">documents</th>'
        '<th class="number">of all</th><th class="number">text</th></tr></thead><tbody>'
    )
    # Filters in the order in which they first removed something, the commonest reason of each first.
    order = list(colours)
    for reason, found in sorted(
        removed.items(), key=lambda item: (order.index(_filter(item[0])), -item[1]["documents"])
    ):
        rule = reason.partition(": ")[2]
        colour = colours[_filter(reason)]
        width = max(_WIDTH * found["documents"] / most, 8)
        bar = (
            f'<svg viewBox="0 0 {_WIDTH} 60" role="img" aria-label="{found["documents"]:,} documents">'
            f'<rect width="{width:.0f}" height="60" rx="12" fill="{colour}"/></svg>'
        )
        yield (
            f'<tr class="rule"><td>{_swatch(colour)}{escape(_filter(reason))}</td><td>{escape(rule)}</td>'
            f'<td class="bar">{bar}</td><td class="number">{found["documents"]:,}</td>'
            f'<td class="number">{_percent(found["documents"], documents)}</td>'
            f'<td class="number">{_size(found["bytes"])}</td></tr>'
        )
        figures = "".join(
            f"<figure><figcaption>{escape(example['id'])}</figcaption><pre>{escape(_readable(example['excerpt']))}</pre></figure>"
            for example in found["examples"]
        )
        yield f'<tr><td colspan="6"><div class="examples">{figures}</div></td></tr>'
    yield "</tbody></table>"


def _stacked(counts: Mapping[str, int], total: int, colours: Mapping[str, str]) -> str:
    """One bar of all documents, and what its colours mean."""
    rectangles, legend, x = [], [], 0.0
    for name, count in counts.items():
        width = _WIDTH * count / total if total else 0.0
        colour = _KEPT if name == "kept" else colours[name]
        rectangles.append(f'<rect x="{x:.1f}" width="{width:.1f}" height="34" fill="{colour}"/>')
        legend.append(f"<li>{_swatch(colour)}{escape(name)} {count:,} ({_percent(count, total)})</li>")
        x += width
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    bar = f'<svg viewBox="0 0 {_WIDTH} 34" role="img" aria-label="{escape(told)}">{"".join(rectangles)}</svg>'
    return f'{bar}<ul class="legend">{"".join(legend)}</ul>'


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _readable(text: str) -> str:
    """Control characters as pictures of themselves: HTML has no place for them."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"


def write_report(curation_json: Path) -> Path:
    """Write the page beside a curation.json, as curation.html, and return its path."""
    page = curation_json.with_suffix(".html")
    page.write_text(html_report(json.loads(curation_json.read_text(encoding="utf-8"))), encoding="utf-8")
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m thunderhead.corpus.curation_report <folder of shards>/curation.json")
    print(write_report(Path(sys.argv[1])))
