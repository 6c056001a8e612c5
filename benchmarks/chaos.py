"""Faults of every kind injected into real runs, for docs/reliability.md: `make chaos`.

    python benchmarks/chaos.py [--only WORD] [--workers 1]

It runs the tests that inject faults, the slow ones too, and makes a table of what happened: how often each kind was
tried, how often the run (or the sweep, the comparison) came through, tokens that were trained on and had to be trained
on again, seconds until all processes had ended, and the line that the user saw. A test that fails was not survived,
with all that it tries.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: written by `make chaos` -->", "<!-- end of chaos -->"


class Kind(NamedTuple):
    """A kind of fault, and the tests that inject it: a file, and a word of their names; each tries it so many times."""

    name: str
    file: str
    word: str = ""
    tries: int = 1  # unless a test records how many


KINDS = (
    Kind(
        "signals in training: one or several, to all or to one",
        "test_stopped_runs.py",
        "stop_and_save",
    ),
    Kind("signals in validation, and before the first step", "test_stopped_runs.py", "signal_"),
    Kind("kill -9 of all processes, at any time", "test_kill.py"),
    Kind("kill -9 of one: launcher, a rank, a loader's worker, a sweep, a job of it", "test_deaths.py"),
    Kind("kill -9 while data is prepared", "../corpus/test_prepare.py", "after_kill_9"),
    Kind("a rank dies under torchrun --max-restarts", "test_elastic.py"),
    Kind("disk full or read-only: preparing, logging, checkpointing", "test_disk.py"),
    Kind("not-a-number and infinity in gradients, weights, validation", "test_divergence.py"),
    Kind("damaged checkpoints, records, rows", "test_resumed_runs.py", "damaged"),
    Kind("damaged and vanished shards", "test_prepared_runs.py", "damage or goes_away"),
    Kind("hostile records", "test_hostile_records.py"),
    Kind("environment variables in records", "test_secrets.py"),
    Kind("configurations at random", "test_fuzz.py", "two_thousand", 2000),
    Kind("folders and values of any text", "test_text.py"),
)


def run(kind: Kind, workers: int) -> list[dict[str, str]]:
    """Run its tests; for each its status, seconds and what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-n", str(workers), "-k", kind.word]
        command += [f"--junitxml={report}", str(ROOT / "tests" / "integration" / kind.file)]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
    found = []
    for case in cases:
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        properties = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        found.append({"name": case.get("name", ""), "survived": "" if failed else "yes", **properties})
    return found


def row(kind: Kind, cases: list[dict[str, str]]) -> str:
    """A row of the table."""
    tries = sum(int(case.get("tries", kind.tries)) for case in cases)
    survived = sum(int(case.get("tries", kind.tries)) for case in cases if case["survived"])
    lost = [int(case["tokens_lost"]) for case in cases if "tokens_lost" in case]
    seconds = [float(case["seconds"]) for case in cases if "seconds" in case]
    saw = next((case["saw"] for case in cases if "saw" in case), "")
    saw = re.sub(r"/\S*(pytest|tmp)\S*/", "…/", " ".join(saw.split()))  # folders of this machine
    saw = f"`{saw if len(saw) < 160 else saw[:157] + '…'}`" if saw else "—"
    told = [f"{max(lost):,}" if lost else "—", f"{max(seconds):.1f}" if seconds else "—"]
    return f"| {kind.name} | {tries:,} | {survived:,} | {' | '.join(told)} | {saw.replace('|', '/')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kinds whose name contains this; docs/reliability.md stays")
    parser.add_argument("--workers", type=int, default=1, help="tests at a time; with several, all take longer")
    args = parser.parse_args()
    begin, lines, failed = time.monotonic(), [], []
    for kind in KINDS:
        if args.only not in kind.name:
            continue
        cases = run(kind, args.workers)
        lines.append(row(kind, cases))
        failed += [f"{kind.file}::{case['name']}" for case in cases if not case["survived"]]
        print(lines[-1], flush=True)
    minutes = (time.monotonic() - begin) / 60
    head = "| fault | tries | survived | tokens lost, at most | seconds to the end, at most | the user saw |"
    table = "\n".join([head, "|---|---|---|---|---|---|", *lines, "", f"`make chaos` took {minutes:.0f} minutes."])
    print(table)
    for name in failed:
        print(f"not survived: {name}")
    if not args.only:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
