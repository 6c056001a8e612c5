"""What a curation removed, as one HTML page: `python -m thunderhead.corpus.curation_report <folder>/curation.json`.

The page needs no network and no script, and prints as it looks.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from thunderhead.terminal import quantity

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
@media (max-width: 40rem) { body { margin: 1rem auto } table { font-size: .85em }
  th, td { padding-right: .5rem; overflow-wrap: break-word } .examples { flex-direction: column }
  :is(th, td):is(:nth-child(3), :nth-child(5)) { display: none } }
@media print { body { margin: 0; max-width: none; font-size: 11px } .examples, figure { break-inside: avoid }
               * { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def html_report(curation: Mapping[str, Any]) -> str:
    """Make the page of what curation.json holds (see `thunderhead.corpus.curation.Curation`)."""
    sources = curation["sources"]
    documents, kept = (sum(source[count] for source in sources.values()) for count in ("documents", "kept"))
    lost = sum(removed["bytes"] for source in sources.values() for removed in source["removed"].values())
    filters = dict.fromkeys(reason.partition(": ")[0] for source in sources.values() for reason in source["removed"])
    colours = {"kept": _KEPT, **dict(zip(filters, itertools.cycle(_COLOURS), strict=False))}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Curation</title>",
        f"<style>{_STYLE}</style></head><body><h1>Curation</h1>",
        f'<p><b class="big">{kept:,}</b> of <b class="big">{documents:,}</b> documents kept '
        f"({_percent(kept, documents)}); {documents - kept:,} documents and {_size(lost)} of text removed.</p>",
        '<p class="quiet">A document counts for the first filter that removes it, in the order of the filters.'
        " Examples are the first documents removed, and begin as shown.</p>",
    ]
    for name, source in sources.items():
        parts += _source(name, source, colours)
    return "\n".join([*parts, "</body></html>", ""])


def _source(name: str, source: Mapping[str, Any], colours: Mapping[str, str]) -> Iterator[str]:
    documents, kept = source["documents"], source["kept"]
    removed = [(*reason.split(": ", 1), found) for reason, found in source["removed"].items()]
    yield f"<h2>{escape(name)}</h2>"
    yield f"<p>{kept:,} of {documents:,} documents kept ({_percent(kept, documents)})</p>"
    by_filter = Counter(kept=kept)
    for rule, _, found in removed:
        by_filter[rule] += found["documents"]
    yield _stacked(by_filter, documents, colours)
    if not removed:
        yield '<p class="quiet">Nothing was removed.</p>'
        return
    yield "<table><thead><tr><th>filter</th><th>removed because</th><th></th>"
    yield "".join(f'<th class="number">{heading}</th>' for heading in ("documents", "of all", "text"))
    yield "</tr></thead><tbody>"
    most = max(found["documents"] for *_, found in removed)
    order = list(by_filter)  # in which they first removed something, the commonest reason of each first
    for rule, reason, found in sorted(removed, key=lambda entry: (order.index(entry[0]), -entry[2]["documents"])):
        colour, count = colours[rule], found["documents"]
        yield (
            f'<tr class="rule"><td>{_swatch(colour)}{escape(rule)}</td><td>{escape(reason)}</td><td class="bar">'
            f'<svg viewBox="0 0 {_WIDTH} 60" role="img" aria-label="{count:,} documents">'
            f'<rect width="{max(_WIDTH * count / most, 8):.0f}" height="60" rx="12" fill="{colour}"/></svg></td>'
        )
        numbers = f"{count:,}", _percent(count, documents), _size(found["bytes"])
        yield "".join(f'<td class="number">{number}</td>' for number in numbers) + "</tr>"
        yield '<tr><td colspan="6"><div class="examples">'
        for example in found["examples"]:
            yield f"<figure><figcaption>{escape(example['id'])}</figcaption>"
            yield f"<pre>{escape(_readable(example['excerpt']))}</pre></figure>"
        yield "</div></td></tr>"
    yield "</tbody></table>"


def _stacked(counts: Mapping[str, int], total: int, colours: Mapping[str, str]) -> str:
    rectangles, legend, x = "", "", 0.0
    for name, count in counts.items():
        width = _WIDTH * count / total if total else 0.0
        rectangles += f'<rect x="{x:.1f}" width="{width:.1f}" height="34" fill="{colours[name]}"/>'
        legend += f"<li>{_swatch(colours[name])}{escape(name)} {count:,} ({_percent(count, total)})</li>"
        x += width
    label = escape(", ".join(f"{name} {count}" for name, count in counts.items()))
    bar = f'<svg viewBox="0 0 {_WIDTH} 34" role="img" aria-label="{label}">{rectangles}</svg>'
    return f'{bar}<ul class="legend">{legend}</ul>'


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _readable(text: str) -> str:
    """Control characters as pictures of themselves: HTML has no place for them."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _size(n_bytes: int) -> str:
    return f"{quantity(n_bytes)}B" if n_bytes >= 10_000 else f"{n_bytes:,} bytes"


def write_report(curation_json: Path) -> Path:
    """Write the page beside a curation.json, as curation.html, and return its path."""
    page = curation_json.with_suffix(".html")
    page.write_text(html_report(json.loads(curation_json.read_text(encoding="utf-8"))), encoding="utf-8")
    return page


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m thunderhead.corpus.curation_report <folder of shards>/curation.json")
    print(write_report(Path(sys.argv[1])))
