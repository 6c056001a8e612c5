"""`python prepare.py`: shards of a corpus, made or found, and what is in them."""

from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, build
from thunderhead.core.data.manifest import Manifest, verify
from thunderhead.core.types import PositiveInt
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.curation_report import write_report
from thunderhead.corpus.prepare import check_sources, find_manifest, prepare
from thunderhead.training import display
from thunderhead.training.data_planning import build_filters, data_settings, is_prepared, shard_settings
from thunderhead.training.problems import Problems, one_line


def _settings(*, processes: PositiveInt | None = None) -> None:
    """Say which settings beside the groups there are."""


def prepare_corpus(config: DictConfig) -> Manifest:
    """Make the shards of `data` and `tokenizer`, or find and verify those that are there, and print what they hold.

    Raises:
        ConfigError: the configuration is refused, a source cannot be read or reached, or shards that were there are
            damaged.
    """
    resolved = configuration.plain(config)
    if problems := configuration.check(resolved, _settings):
        raise ConfigError(problems)
    if is_prepared(resolved):
        message = "data=shards is prepared already: give the text to prepare, as data=text data.path=…"
        raise ConfigError([Problem("data", message)])
    if resolved.get("tokenizer") is None:
        raise ConfigError([Problem("tokenizer", "needs an option: tokenizer=bpe")])
    problems = Problems()
    tokenizer: Any = None
    filters: dict[str, Filter] = {}
    data: dict[str, Any] = {}
    with problems.collect():
        tokenizer = build(resolved["tokenizer"])
    with problems.collect():
        filters = build_filters(resolved["curation"])
    with problems.collect():
        data = data_settings(resolved)
        if "sources" not in data:
            raise ValueError("data: a synthetic task is made while it is trained on: there is nothing to prepare")
        check_sources(data["sources"], data.get("path"))
    if problems:
        raise ConfigError(problems)
    try:
        manifest = find_manifest(data["sources"], tokenizer, filters=filters, **shard_settings(data))
        if manifest is not None:
            verify(manifest)
            display.say("Prepared already, nothing to do (its checksums were compared and are right)")
    except ValueError as error:
        raise ConfigError([Problem("", one_line(error))]) from error
    if manifest is None:
        display.say(f"Preparing {', '.join(data['sources'])} with the {tokenizer.name} tokenizer")
        manifest = make_shards(resolved, data)
    _show(manifest)
    curation = manifest.folder / "curation.json"
    if curation.exists():
        display.say(f"curation   {write_report(curation)}")
    return manifest


def make_shards(config: dict[str, Any], data: dict[str, Any]) -> Manifest:
    """Prepare the shards of a resolved configuration, whose data module has the settings `data`.

    Raises:
        ConfigError: a source cannot be read or reached.
    """
    try:
        return prepare(
            data["sources"],
            build(config["tokenizer"]),
            filters=build_filters(config["curation"]),
            processes=config.get("processes"),
            **shard_settings(data),
        )
    except (ValueError, ConnectionError) as error:
        raise ConfigError([Problem("", one_line(error))]) from error


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
