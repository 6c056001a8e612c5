"""How fast tokens are read, how soon the first batch is there, and how long training waits for data.

    python benchmarks/data.py --rounds 5 [overrides of train.py for the last part, e.g. model=micro trainer=gpu]

Reading: batches of int64 at T = 1024 from 134 M random tokens in two forms, shards and one flat file, both in the page
cache. Ours is `PreparedShards.train_dataloader()` with num_workers=0. Against it, in one process and in turns: a bare
memory map in nanoGPT's way (random offsets, inputs and targets taken one by one), a lean one (both in one slice, as
ours), and litdata's StreamingDataset on the same shards. "verifying" is ours when each chunk's checksum is compared on
the way: an epoch in which every chunk is used for the first time.

First batch: manifests of 10 M to 100 B tokens, whose chunks are sparse files of zeros (64 MiB each, their checksums are
real and compared). Time from before the manifest is read to the first batch of 8, imports left out.

Waiting: a run of train.py; the time inside the loader's `next` over the time of the training steps.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from litdata import StreamingDataset
from litdata.streaming.item_loader import TokensLoader
from results_folder import RESULTS, hardware_slug

from thunderhead.core import config as configuration
from thunderhead.core.data import datamodule
from thunderhead.core.data.manifest import FORMAT, Chunk, Manifest, Shard, TokenizerRecord, sha256_of
from thunderhead.corpus.preparation import CHUNK_BYTES
from thunderhead.corpus.prepared_shards import PreparedShards
from thunderhead.corpus.shard_files import DATA_FORMATS, ShardWriter
from thunderhead.corpus.trained_tokenizers import ByteTokenizer
from thunderhead.training import hardware
from thunderhead.training.record import read_summary
from thunderhead.training.run import train

T = 1024
TOKENS = 2**27  # 134 M
DOCUMENT = 2**16  # tokens


def save_manifest(folder: Path, train: Shard, val: Shard) -> None:
    """Write what prepare.py would have written beside the shards."""
    tokenizer = ByteTokenizer()
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    manifest = Manifest(
        format=FORMAT,
        key="benchmark",
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        max_token_id=max(train.max_token_id, val.max_token_id),
        dtype=tokenizer.dtype.name,
        tokenizer=TokenizerRecord(tokenizer.name, tokenizer.settings, tokenizer.sha256),
        split_rule="",
        validation_fraction=0.01,
        sources={"text": {}},
        splits={"train": {"text": train}, "val": {"text": val}},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))


def loader(folder: Path, batch_size: int, verify: str) -> Iterator[torch.Tensor]:
    """Look up shards as train.py does, and load their batches."""
    module = PreparedShards(T, batch_size, batch_size, 0, None, {}, path=str(folder), verify=verify)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(global_step=0, max_steps=-1, strategy=strategy, global_rank=0, world_size=1)
    module.prepare_data()
    module.setup("fit")
    return iter(module.train_dataloader())


# --- reading ---------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path) -> None:
    """The same random tokens as shards and as flat.bin."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 257, TOKENS, dtype=np.uint16)
    tokens.tofile(folder / "flat.bin")
    shards = {}
    for split, part in (("train", tokens), ("val", tokens[: 10 * DOCUMENT])):
        writer = ShardWriter(folder / "text" / split, vocab_size=257, chunk_bytes=CHUNK_BYTES)
        for start in range(0, len(part), DOCUMENT):
            writer.add(part[start : start + DOCUMENT], 2 * DOCUMENT)
        shards[split] = writer.close()
    save_manifest(folder, shards["train"], shards["val"])


def nanogpt(folder: Path, batch_size: int) -> Iterator[Any]:
    """karpathy/nanoGPT, train.py::get_batch, with the map opened once."""
    data = np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r")
    while True:
        ix = torch.randint(len(data) - T, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in ix])
        yield x, y


def lean(folder: Path, batch_size: int) -> Iterator[Any]:
    """The least that gives the same batches as ours, at random offsets."""
    data, draw = np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r"), np.random.default_rng(1)
    while True:
        offsets = draw.integers(0, len(data) - T, batch_size).tolist()
        yield torch.from_numpy(np.stack([data[i : i + T + 1] for i in offsets]).astype(np.int64))


def litdata(folder: Path, batch_size: int) -> Iterator[Any]:
    """Read random blocks through litdata's own reader."""
    data, draw = StreamingDataset(str(folder / "text/train"), item_loader=TokensLoader(T + 1)), np.random.default_rng(2)
    while True:
        rows = [data[i] for i in draw.integers(0, len(data), batch_size).tolist()]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def seconds_of(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """Wall and process time of `count` batches."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - wall, time.process_time() - cpu


def reading(rounds: int, batch_size: int) -> dict[str, dict[str, float]]:
    """Tokens a second of wall and of process time; medians of rounds of an eighth of an epoch, in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        count = TOKENS // T // batch_size // 8
        contenders: dict[str, Iterator[Any]] = {
            "thunderhead": loader(folder, batch_size, "full"),
            "nanogpt": nanogpt(folder, batch_size),
            "lean memmap": lean(folder, batch_size),
            "litdata": litdata(folder, batch_size),
        }
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in (*contenders, "verifying")}
        for batches in contenders.values():
            seconds_of(batches, count)  # pages, maps
        for _ in range(rounds):
            for side, batches in contenders.items():
                seconds_of(batches, 3)
                seconds[side].append(seconds_of(batches, count))
            whole = seconds_of(loader(folder, batch_size, "first_use"), 8 * count)
            seconds["verifying"].append((whole[0] / 8, whole[1] / 8))
    tokens = count * batch_size * T
    return {
        side: {
            "tokens_per_second": tokens / statistics.median(wall for wall, _ in found),
            "tokens_per_cpu_second": tokens / statistics.median(cpu for _, cpu in found),
            "ratio_to_nanogpt": statistics.median(
                other[1] / own[1] for own, other in zip(found, seconds["nanogpt"], strict=True)
            ),
        }
        for side, found in seconds.items()
    }


# --- the first batch -------------------------------------------------------------------------------------------------


def sparse_shard(folder: Path, tokens: int) -> Shard:
    """A shard of zeros that takes no room on the disk."""
    folder.mkdir(parents=True)
    per_chunk = (CHUNK_BYTES - 12) // 2
    sizes = [per_chunk] * (tokens // per_chunk) + [tokens % per_chunk] * (tokens % per_chunk > T)
    hashes: dict[int, str] = {}
    chunks = []
    for number, size in enumerate(sizes):
        file = folder / f"chunk-0-{number}.bin"
        with open(file, "wb") as stream:
            stream.truncate(12 + 2 * size)
        hashes[size] = hashes.get(size) or sha256_of(file)
        chunks.append(Chunk(file.name, hashes[size], 12 + 2 * size, size, 1))
    rows = [{"chunk_bytes": c.bytes, "chunk_size": 1, "dim": c.tokens, "filename": c.filename} for c in chunks]
    index = folder / "index.json"
    index.write_text(json.dumps({"chunks": rows, "config": {"data_format": [DATA_FORMATS["uint16"]]}}))
    return Shard(sum(sizes), len(sizes), 2 * sum(sizes), 0.0, 0, sha256_of(index), tuple(chunks))


def first_batch(tokens: int, rounds: int) -> dict[str, float]:
    """Seconds to the first batch of 8."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = [sparse_shard(folder / "text" / split, n) for split, n in (("train", tokens), ("val", tokens // 100))]
        save_manifest(folder, *shards)
        walls, cpus = [], []
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            next(loader(folder, 8, "first_use"))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return {
        "tokens": tokens,
        "chunks": len(shards[0].chunks),
        "seconds": statistics.median(walls),
        "cpu_seconds": statistics.median(cpus),
        "longest": max(walls),
    }


# --- waiting ---------------------------------------------------------------------------------------------------------


class TimedLoader(datamodule.ResumableLoader):
    """A loader that adds up how long its consumer waited."""

    seconds = 0.0
    batches = 0

    def __iter__(self) -> Iterator[Any]:
        """Time each `next` of training; a loader of validation batches ends and is left out."""
        batches, endless = super().__iter__(), len(self) == datamodule.ENDLESS
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if endless:
                TimedLoader.seconds += time.perf_counter() - start
                TimedLoader.batches += 1
            yield batch


def waiting(overrides: list[str], steps: int) -> dict[str, float]:
    """Share of the training time that train.py spends in its loader."""
    fixed = ["budget=steps", f"budget.steps={steps}", f"validation.every={steps}", "callbacks=none"]
    with tempfile.TemporaryDirectory() as run_dir, patch.object(datamodule, "ResumableLoader", TimedLoader):
        train(configuration.compose([*fixed, "generation.max_new_tokens=1", *overrides]), Path(run_dir))
        summary = read_summary(Path(run_dir))
    assert summary is not None
    seconds = summary["tokens"] / summary["tokens_per_second"]
    return {
        "steps": steps,
        "step_seconds": seconds / steps,
        "waiting_seconds": TimedLoader.seconds,
        "share": TimedLoader.seconds / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of the run")
    parser.add_argument("--parts", nargs="+", default=["reading", "first_batch", "waiting"])
    parser.add_argument("overrides", nargs="*", help="of train.py")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = hardware.device_name("cpu")
    settings = {"rounds": args.rounds, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"data-{hardware_slug(device)}"
    known = json.loads(file.with_suffix(".json").read_text()) if file.with_suffix(".json").exists() else {}
    content: dict[str, Any] = {**known, "device": device, "torch": torch.__version__, "context_length": T, **settings}
    parts: dict[str, Callable[[], Any]] = {
        "reading": lambda: {f"batch {size}": reading(args.rounds, size) for size in (8, 32)},
        "first_batch": lambda: [first_batch(10**power, args.rounds) for power in (7, 8, 9, 10, 11)],
        "waiting": lambda: waiting(args.overrides, args.steps),
    }
    for part in args.parts:
        content[part] = parts[part]()
    text = table(content)
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)
    print(text + f"written to {file}.json and .md")


def table(content: dict[str, Any]) -> str:
    """The results for readers."""
    lines = [f"# benchmarks/data.py on {content['device']}", ""]
    lines += [
        f"{content['cores']} cores, {content['torch_threads']} torch threads, medians of {content['rounds']} rounds."
    ]
    for name, sides in content.get("reading", {}).items():
        lines += [
            "",
            f"| reading, T=1024, {name} | M tokens/s | M tokens/CPU-second | against nanoGPT |",
            "|---|--:|--:|--:|",
        ]
        lines += [
            f"| {side} | {found['tokens_per_second'] / 1e6:.0f} | {found['tokens_per_cpu_second'] / 1e6:.0f}"
            f" | {found['ratio_to_nanogpt']:.2f} |"
            for side, found in sides.items()
        ]
    if "first_batch" in content:
        lines += ["", "| tokens | chunks | first batch | CPU | longest |", "|--:|--:|--:|--:|--:|"]
        lines += [
            f"| {row['tokens']:,} | {row['chunks']:,} | {row['seconds']:.3f} s | {row['cpu_seconds']:.3f} s"
            f" | {row['longest']:.3f} s |"
            for row in content["first_batch"]
        ]
    if "waiting" in content:
        row = content["waiting"]
        lines += [
            "",
            f"Waiting for data: {row['share']:.2%} of the steps' time ({row['waiting_seconds'] * 1e3:.0f} ms in"
            f" {row['steps']} steps of {row['step_seconds']:.3f} s).",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
