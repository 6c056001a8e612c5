"""`python prepare.py`: shards of a corpus, made or found, and what is in them."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from thunderhead import command_line
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.components import build
from thunderhead.core.config import Config, ConfigError, Problem, first_line, quoted
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.run import Problems, build_data
from thunderhead.core.types import PathText, PositiveInt
from thunderhead.corpus.curation_report import write_report
from thunderhead.corpus.merge import merge
from thunderhead.corpus.prepare import read_reading, told_overlap
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.text_data import TextData
from thunderhead.terminal import Console, say

_SHOWN = 10  # kinds of files that were passed over, files of which something was skipped


def _settings(
    *, processes: PositiveInt | None = None, merge: list[PathText] | None = None, out: PathText | None = None
) -> None:
    """Say which settings beside the groups there are."""


def prepare_corpus(config: DictConfig) -> Manifest | None:
    """Make or verify the shards of `data` and `tokenizer`, and print what they hold; raises ConfigError.

    Returns None where jobs of a cluster make them.
    """
    resolved = configuration.plain(config)
    if wrong := components.check(resolved, _settings):
        raise ConfigError(wrong)
    if resolved["merge"] is not None:
        return _merge(resolved)
    problems = Problems()
    if resolved["out"] is not None:
        problems.note(Problem("out", "is of merge=[…]; shards that are prepared go to data.shards_dir"))
    with problems.collect("engine"):
        engine = build(resolved["engine"])
    data = build_data(resolved | {"seed": 0}, context_length=1, sequences_per_step=1)  # nothing is loaded here
    if not isinstance(data, TextData):
        message = "there is nothing to prepare: give text to make shards of, as data=text data.path=…"
        raise ConfigError([Problem("data", message)])
    problems.note(*data.problems(None))
    problems.refuse()
    was_prepared = data.is_prepared
    try:
        if was_prepared:
            verify(data.manifest)
            say("Prepared already, nothing to do (its checksums were compared and are right)")
        data.prepare_data(engine)
    except (ValueError, ConnectionError) as error:
        raise ConfigError([Problem("", first_line(error))]) from error
    if not data.is_prepared:
        return None
    _show(data.manifest)
    if was_prepared and (overlap := told_overlap(data.manifest.folder)):
        say(overlap)
    if (reading := read_reading(data.manifest.folder)) is not None:
        _show_reading(reading, data.manifest.folder / "reading.json")
    curation = data.manifest.folder / "curation.json"
    if curation.exists():
        say(f"curation   {write_report(curation)}")
    return data.manifest


def _merge(config: Config) -> Manifest:
    groups = ("data", "tokenizer", "curation", "engine", "processes")
    chosen = {path.partition(".")[0] for path in command_line.chosen(command_line.invocation_overrides())}
    problems = [Problem(name, "is decided by the merged shards: leave it out") for name in groups if name in chosen]
    if config["out"] is None:
        problems.append(Problem("out", "needs a value: the folder of the merged shards"))
    if problems:
        raise ConfigError(problems)
    manifest = merge(config["merge"], Path(config["out"]))
    _show(manifest)
    say(f"train with  {command_line.shown('train.py', 'data=shards', f'data.path={quoted(manifest.folder)}')}")
    return manifest


def _show(manifest: Manifest) -> None:
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for heading in ("source", "split", "documents", "tokens", "bytes per token", "unigram entropy"):
        table.add_column(heading, justify="left" if heading in ("source", "split") else "right")
    for split, by_source in manifest.splits.items():
        for source, shard in by_source.items():
            numbers = f"{shard.documents:,}", f"{shard.tokens:,}", f"{shard.bytes / shard.tokens:.2f}"
            table.add_row(escape(source), split, *numbers, f"{shard.unigram_entropy:.3f} nats")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"[cyan]tokenizer[/]  {manifest.tokenizer.name}, {manifest.vocab_size:,} tokens")
    console.print(f"[cyan]folder   [/]  {escape(str(manifest.folder))}", soft_wrap=True)


def _show_reading(reading: dict[str, Any], file: Path) -> None:
    """Say which files of each source were read, and which were not, and why."""
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for heading in ("source", "files", "suffix", "what became of them"):
        table.add_column(heading, justify="right" if heading == "files" else "left")
    skipped = []
    for source, found in reading["sources"].items():
        passed = sorted(found["passed_over"], key=lambda row: -row["files"])
        rows = [(n, suffix or "(none)", "read") for suffix, n in found["read"].items()]
        rows += [(row["files"], row["suffix"] or "(none)", f"passed over: {row['why']}") for row in passed[:_SHOWN]]
        if rest := passed[_SHOWN:]:
            rows.append((sum(row["files"] for row in rest), f"{len(rest)} others", f"passed over: see {file}"))
        for n, *told in rows:
            table.add_row(escape(source), f"{n:,}", *map(escape, told))
        skipped += found["skipped"]
    if table.row_count:
        Console(highlight=False).print(table)
    for row in skipped[:_SHOWN]:
        say(f"skipped    {row['file']}: {row['documents']:,} of its documents ({row['why']})")
    if skipped:
        n = sum(row["documents"] for row in skipped)
        say(f"skipped    {n:,} documents of {len(skipped):,} files in all: see {file}")
