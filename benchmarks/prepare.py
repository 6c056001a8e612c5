"""How much of the time of preparing is in the tokenizer itself, and how memory grows with the corpus.

    python benchmarks/prepare.py --megabytes 8 --rounds 3

Both sides encode the same batches of the same documents with the same trained BPE tokenizer: one only that, in memory
and on one core; the other is `prepare` as a whole (starting processes, reading files, splitting, encoding, remembering,
writing and hashing the shards) in 1, 2 … processes. Rounds alternate in one run. The share of the tokenizer is that of
CPU time, over all processes: on a busy machine wall time says how busy it is. Speed is in wall time.

Peak memory is that of `prepare` in fresh processes, with a corpus and one of four times its size: this process and its
workers, each with the share of the pages that it has for itself (PSS). There tokens are bytes and
chunks 4 MB, so that a corpus is many times what is held at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process, on both sides

from results_folder import RESULTS, hardware_slug

from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.batches import Batches
from thunderhead.corpus.preparation import CHUNK_BYTES
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.published_tokenizers import HuggingFaceTokenizer
from thunderhead.corpus.python_code import StandardLibrary
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import BpeTokenizer, ByteTokenizer
from thunderhead.training import hardware


def write_corpus(folder: Path, n_bytes: int) -> None:
    """Code of the standard library, again and again, in a file of lines and a record a document."""
    code = StandardLibrary(include_code=True, include_topics=False)
    folder.mkdir()
    written = round_ = 0
    with open(folder / "corpus.jsonl", "w") as file:
        while written < n_bytes:
            for document in code.documents():
                text = f"# {round_}\n{document.text}"
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= n_bytes:
                    break
            round_ += 1


def cpu_seconds() -> float:
    """CPU time of this process and of its children that ended."""
    return sum(os.times()[:4])


def timed_prepare(
    corpus: Path, tokenizer: Tokenizer, processes: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[float, float, int]:
    """Seconds of one preparation, those of CPU, and its tokens."""
    with tempfile.TemporaryDirectory() as shards_dir:
        start, cpu_start = time.perf_counter(), cpu_seconds()
        manifest = prepare(
            {"corpus": LocalText(path=str(corpus))},
            tokenizer,
            shards_dir=shards_dir,
            validation_fraction=0.05,
            processes=processes,
            chunk_bytes=chunk_bytes,
        )
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    return seconds, cpu, sum(split["corpus"].tokens for split in manifest.splits.values())


def peak_mib(corpus: Path, processes: int) -> float:
    """Peak memory of a preparation in a fresh process."""
    arguments = ["--measure", str(corpus), str(processes)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure(corpus: str, processes: str) -> None:
    """Prepare, and print the largest sum of memory of this process and its children; looked at ten times a second."""
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, proportional_kib(os.getpid()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    timed_prepare(Path(corpus), ByteTokenizer(), int(processes), chunk_bytes=4 * 2**20)
    ended.set()
    thread.join()
    print(peak / 1024)


def proportional_kib(parent: int) -> int:
    """Proportional set size of a process and its children, in KiB."""
    total = 0
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in (int(entry.name), ppid):
                rollup = (entry / "smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8, help="text of the corpus")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    size = int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        corpus, trained = Path(folder, "corpus"), Path(folder, "tokenizer.json")
        write_corpus(corpus, size)
        source = LocalText(path=str(corpus))
        batches = [[document.text for document in batch.documents] for batch in Batches({"corpus": source})]
        trained.write_text(BpeTokenizer(vocab_size=8192).train(batches[0]).to_json())
        tokenizer = HuggingFaceTokenizer(path=str(trained))
        alone: list[float] = []
        whole: dict[int, list[tuple[float, float]]] = {n: [] for n in args.processes}
        n_tokens = 0
        for _ in range(args.rounds):
            start = cpu_seconds()
            for batch in batches:
                tokenizer.encode_batch(batch)
            alone.append(cpu_seconds() - start)
            for n, times in whole.items():
                seconds, cpu, n_tokens = timed_prepare(corpus, tokenizer, n)
                times.append((seconds, cpu))
        print(f"{args.megabytes} MB, {n_tokens / 1e6:.1f} M tokens, medians of {args.rounds} rounds")
        print(f"tokenizer alone: {statistics.median(alone):.2f} s of CPU")
        rows = []
        for n, times in whole.items():
            shares = [one / cpu for one, (_, cpu) in zip(alone, times, strict=True)]
            wall = statistics.median(seconds for seconds, _ in times)
            row = {"processes": n, "seconds": round(wall, 2), "tokens_per_second": round(n_tokens / wall)}
            rows.append({**row, "share_of_tokenizer": round(statistics.median(shares), 3)})
            print(rows[-1])
        peaks = []
        for factor in (2, 8):
            text = Path(folder, str(factor))
            write_corpus(text, factor * size)
            peaks.append({"megabytes": factor * args.megabytes, "peak_mib": round(peak_mib(text, args.processes[-1]))})
            print(peaks[-1])
    device = hardware.device_name("cpu")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"prepare-{hardware_slug(device)}.json"
    load = os.getloadavg()[0]
    settings = {"megabytes": args.megabytes, "rounds": args.rounds, "load_average": round(load, 1)}
    content = {"device": device, "cores": os.cpu_count(), **settings, "rows": rows, "memory": peaks}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
