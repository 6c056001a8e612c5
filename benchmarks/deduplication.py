"""Memory, time and disk of removing near duplicates, by the number of documents.

    python benchmarks/deduplication.py --documents 100000 300000 1000000 --texts 30000

For each number, a fresh process decides about so many signatures (14 bands of 8), drawn at random; a tenth of them are
copies of an earlier one in which each of the 112 numbers was drawn anew with probability 0.05. Memory is what the
process holds for itself (RssAnon), above what it held before: pages of files that are mapped are the system's, which
takes them back when it needs them. `texts` are whole: read, looked at, decided about, tokenized and written, here and
by datatrove's tasks; all must keep the same documents.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from results_folder import RESULTS, hardware_slug

from thunderhead.corpus.datatrove_engine import Datatrove
from thunderhead.corpus.deduplication import NearDuplicates
from thunderhead.corpus.engines import Engine, Local
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.prepare import run
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.training import hardware

BLOCK = 10_000


def signatures(n: int, width: int) -> Iterator[Any]:
    """Random signatures, every tenth nearly the one that is somewhere before it in its block."""
    draw = np.random.default_rng(0)
    for begin in range(0, n, BLOCK):
        block = draw.integers(0, 2**32, (min(BLOCK, n - begin), width), dtype=np.uint32)
        copies = np.arange(9, len(block), 10)
        originals = draw.integers(0, copies)
        originals -= originals % 10 == 9  # of no copies
        changed = draw.random((len(copies), width)) < 0.05
        block[copies] = np.where(changed, block[copies], block[originals])
        yield from block


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def decide(n: int, folder: str, results: Any) -> None:
    """Decide about n documents, and say how."""
    rule, place = NearDuplicates(), Path(folder)
    list(rule.decide(signatures(1000, rule.width), place))  # what is imported and allocated once
    before, peak, disk, done = anonymous_bytes(), 0, 0, threading.Event()

    def watch() -> None:
        nonlocal peak, disk
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())
            sizes = []
            for file in place.rglob("*"):
                try:
                    sizes.append(file.stat().st_blocks * 512)
                except FileNotFoundError:
                    continue
            disk = max(disk, sum(sizes))

    watching = threading.Thread(target=watch)
    watching.start()
    begin = time.perf_counter()
    removed = sum(reason is not None for reason in rule.decide(signatures(n, rule.width), place))
    seconds = time.perf_counter() - begin
    done.set()
    watching.join()
    begin = time.perf_counter()
    for _ in signatures(n, rule.width):
        pass
    drawing = time.perf_counter() - begin
    results.put(
        {
            "documents": n,
            "planted": n // 10,
            "removed": removed,
            "seconds": round(seconds - drawing, 2),
            "memory_mib": round((peak - before) / 2**20),
            "disk_bytes_per_document": round(disk / n),
        }
    )


def whole(n: int, folder: Path) -> dict[str, Any]:
    """Prepare n documents of 100 words, a tenth nearly copies, in 16 files; here and by tasks."""
    draw = np.random.default_rng(1)
    (folder / "corpus").mkdir()
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ld", "ng", "ck")]
    texts = [" ".join(draw.choice(words, 100)) for _ in range(n)]
    for copy in range(9, n, 10):
        original = texts[draw.integers(0, copy)].split()
        original[int(draw.integers(0, 100))] = "other"
        texts[copy] = " ".join(original)
    for part in range(16):
        lines = (json.dumps({"text": text}) for text in texts[part * n // 16 : (part + 1) * n // 16])
        (folder / "corpus" / f"{part:02d}.jsonl").write_text("\n".join(lines))
    found: dict[str, Any] = {"documents": n}
    engines: dict[str, Engine] = {
        "here, 1 process": Local(processes=1),
        "here, 2 processes": Local(processes=2),
        **{f"datatrove, {tasks} tasks, 2 at a time": Datatrove(tasks=tasks, workers=2) for tasks in (1, 4, 64)},
    }
    kept = set()
    for name, engine in engines.items():
        sources = {"text": LocalText(path=str(folder / "corpus"))}
        shards_dir = folder / name.replace(" ", "-").replace(",", "")
        begin = time.perf_counter()
        manifest = run(
            Preparation(sources, ByteTokenizer(), shards_dir, 0.05, filters={"near": NearDuplicates()}), engine
        )
        found[name] = round(time.perf_counter() - begin, 1)
        assert manifest is not None
        kept.add(json.dumps(manifest.to_dict(), sort_keys=True))  # with the hash of each chunk
        found["kept"] = sum(split["text"].documents for split in manifest.splits.values())
    assert len(kept) == 1, "not all kept the same documents"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--texts", type=int, default=30_000)
    arguments = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    for n in arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            process = context.Process(target=decide, args=(n, folder, results))
            process.start()
            rows.append(row := results.get())
            process.join()
        print(
            f"{n:>9,} documents: {row['seconds']:.1f} s, {row['memory_mib']:.0f} MiB more memory, "
            f"{row['disk_bytes_per_document']:.0f} bytes a document on the disk, "
            f"{row['removed']:,} of {row['planted']:,} copies removed"
        )
    with tempfile.TemporaryDirectory() as folder:
        texts = whole(arguments.texts, Path(folder))
    for name, value in texts.items():
        print(f"{name}: {value if isinstance(value, int) else f'{value:.1f} s'}")
    device = hardware.device_name("cpu")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"deduplication-{hardware_slug(device)}.json"
    content = {"device": device, "cores": os.cpu_count(), "decide": rows, "whole": texts}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
