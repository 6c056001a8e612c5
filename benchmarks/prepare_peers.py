"""Tokens per second of CPU: preparing here, beside the tokenizer alone, datatrove, litgpt and nanoGPT's procedure.

    python benchmarks/prepare_peers.py --megabytes 40 --rounds 3

All encode the same text (code of the standard library, files of about 1 MB, a document each) with the same BPE
tokenizer of 8,192 tokens, through the library tokenizers, with one process for the work:

- tokenizer: `encode_batch_fast` of `tokenizers`, of text in memory, a MB at a time; nothing else
- thunderhead: `python prepare.py` without its imports: read, checked, split, encoded, remembered, hashed and written
- datatrove: its LocalPipelineExecutor with JsonlReader and DocumentTokenizer, documents not shuffled
- litgpt: the data module TextFiles (pip install --no-deps litgpt: python with it in PYTHONPATH), which calls
  litdata's `optimize` with its own Tokenizer; its first file is for validation
- nanoGPT: the procedure of its data/openwebtext/prepare.py, as its README describes it: `datasets.map`, and numpy's
  memmap in 1,024 batches; with this tokenizer instead of tiktoken's

Each is timed inside a fresh process, imports not counted; CPU time is that of the process and those that it started.
Rounds alternate.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from prepare import cpu_seconds
from results_folder import RESULTS, hardware_slug

from thunderhead.corpus.python_code import StandardLibrary
from thunderhead.corpus.trained_tokenizers import BpeTokenizer
from thunderhead.training import hardware

EOS = "<|endoftext|>"


def write_corpus(folder: Path, n_bytes: int) -> None:
    """Texts of about 1 MB, as files and as lines of JSON."""
    for kind in ("txt", "jsonl"):
        (folder / kind).mkdir()
    texts, text, written = [], "", 0
    while written < n_bytes:
        for document in StandardLibrary(include_code=True, include_topics=False).documents():
            text += f"# {written}\n{document.text}"
            if len(text) > 1e6:
                texts.append(text.strip())
                written, text = written + len(text), ""
            if written >= n_bytes:
                break
    for number, text in enumerate(texts):
        (folder / "txt" / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "jsonl" / "all.jsonl").write_text("\n".join(lines), encoding="utf-8")


def tokenizer_alone(folder: Path, out: Path) -> Callable[[], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [file.read_text() for file in sorted((folder / "txt").iterdir())]
    return lambda: sum(len(tokenizer.encode_batch_fast([text])[0].ids) + 1 for text in texts)


def thunderhead(folder: Path, out: Path) -> Callable[[], int]:
    import litdata.streaming.item_loader  # noqa: F401 - which writing imports

    from thunderhead.corpus.prepare import prepare
    from thunderhead.corpus.published_tokenizers import HuggingFaceTokenizer
    from thunderhead.corpus.sources import LocalText

    tokenizer = HuggingFaceTokenizer(path=str(folder / "tokenizer.json"))
    source = LocalText(path=str(folder / "txt"), max_document_bytes=None)

    def work() -> int:
        held_out = {"validation": "00000.txt", "validation_fraction": 0.1}  # as litgpt's
        manifest = prepare({"text": source}, tokenizer, shards_dir=out, processes=1, **held_out)
        return sum(split["text"].tokens for split in manifest.splits.values())

    return work


def datatrove(folder: Path, out: Path) -> Callable[[], int]:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(folder / "jsonl")),
        DocumentTokenizer(
            str(out / "tokens"),
            tokenizer_name_or_path=str(folder / "tokenizer.json"),
            eos_token=EOS,
            shuffle_documents=False,
        ),
    ]
    executor = LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out / "logs"))

    def work() -> int:
        executor.run()
        return sum(file.stat().st_size for file in (out / "tokens").glob("*.ds")) // 2

    return work


def litgpt(folder: Path, out: Path) -> Callable[[], int]:
    import litdata.streaming  # noqa: F401
    from litgpt.data.text_files import TextFiles
    from litgpt.tokenizer import Tokenizer

    (out / "tokenizer").mkdir()
    for name, content in (
        ("tokenizer.json", (folder / "tokenizer.json").read_text()),
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": EOS, "bos_token": EOS})),
    ):
        (out / "tokenizer" / name).write_text(content)
    texts = out / "texts"
    texts.mkdir()
    for file in (folder / "txt").iterdir():
        (texts / file.name).symlink_to(file)
    data = TextFiles(train_data_path=texts)
    data.connect(Tokenizer(out / "tokenizer"), max_seq_length=1024)

    def work() -> int:
        data.prepare_data()
        chunks = [json.loads((texts / split / "index.json").read_text())["chunks"] for split in ("train", "val")]
        return sum(chunk["dim"] for split in chunks for chunk in split)

    return work


def nanogpt(folder: Path, out: Path) -> Callable[[], int]:
    import datasets
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)

    def encoded(row: dict[str, str]) -> dict[str, Any]:
        ids = [*tokenizer.encode(row["text"], add_special_tokens=False).ids, eos]
        return {"ids": ids, "len": len(ids)}

    def work() -> int:
        rows = datasets.load_dataset(
            "json", data_files=str(folder / "jsonl" / "all.jsonl"), cache_dir=str(out / "cache"), split="train"
        )
        found, total = rows.train_test_split(test_size=0.1, seed=1), 0
        for name, split in found.map(encoded, remove_columns=["text"]).items():
            length = int(np.sum(split["len"], dtype=np.uint64))
            array = np.memmap(out / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(length,))
            place, n_batches = 0, min(1024, len(split))
            for batch in range(n_batches):
                part = split.shard(num_shards=n_batches, index=batch, contiguous=True).with_format("numpy")
                ids = np.concatenate(part["ids"])
                array[place : place + len(ids)] = ids
                place += len(ids)
            array.flush()
            total += length
        return total

    return work


SIDES: dict[str, Callable[[Path, Path], Callable[[], int]]] = {
    "tokenizer": tokenizer_alone,
    "thunderhead": thunderhead,
    "datatrove": datatrove,
    "litgpt": litgpt,
    "nanogpt": nanogpt,
}


def measure(side: str, folder: Path) -> None:
    """Print tokens and seconds of CPU of one side; runs in a fresh process."""
    with tempfile.TemporaryDirectory() as out:
        work = SIDES[side](folder, Path(out))
        before = cpu_seconds()
        tokens = work()
        print(f"\nMEASURED {json.dumps([tokens, cpu_seconds() - before])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    needs = {"litgpt": "litgpt", "datatrove": "datatrove", "nanogpt": "datasets"}
    missing = [side for side, package in needs.items() if importlib.util.find_spec(package) is None]
    sides = [side for side in SIDES if side not in missing]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    tokens: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder)
        write_corpus(corpus, int(args.megabytes * 1e6))
        texts = [file.read_text() for file in sorted((corpus / "txt").iterdir())[:4]]
        (corpus / "tokenizer.json").write_text(BpeTokenizer(vocab_size=8192).train(texts).to_json())
        for round_ in range(args.rounds):
            for side in sides if round_ % 2 == 0 else sides[::-1]:
                command = [sys.executable, __file__, "--measure", side, str(corpus)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    sys.exit(f"{side}: {done.stderr[-2000:]}")
                tokens[side], seconds = json.loads(done.stdout.rpartition("MEASURED ")[2])
                rates[side].append(tokens[side] / seconds)
    rows = [
        {
            "side": side,
            "tokens": tokens[side],
            "tokens_per_cpu_second": round(statistics.median(rates[side])),
            "of_tokenizer": round(
                statistics.median(one / alone for one, alone in zip(rates[side], rates["tokenizer"], strict=True)), 3
            ),
        }
        for side in sides
    ]
    for row in rows:
        print(row)
    for side in missing:
        print(f"{side}: left out, its package is not installed")
    device = hardware.device_name("cpu")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"prepare-peers-{hardware_slug(device)}.json"
    content = {
        "device": device,
        "cores": os.cpu_count(),
        "megabytes": args.megabytes,
        "rounds": args.rounds,
        "rows": rows,
    }
    file.write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
