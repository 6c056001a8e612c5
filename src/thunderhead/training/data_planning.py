"""A run's data before it begins: settings, the shards if they are there, and what so many steps draw from them."""

import bisect
import inspect
from typing import Any, NamedTuple

from thunderhead.core.config import Problem, build, build_all, factory
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.data.mixture import LITTLE_IS_GAINED_AFTER, Turns, plan_turns, repetition, weights_by_fraction
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.object_storage import is_remote
from thunderhead.corpus.prepare import check_sources, find_manifest
from thunderhead.corpus.prepared_shards import check_cache, find_prepared, shares
from thunderhead.corpus.sources import Share, Source
from thunderhead.options.synthetic_tasks import Task
from thunderhead.training.plan import EpochsBudget
from thunderhead.training.problems import Problems


def find_data(
    config: dict[str, Any], manifest: Manifest | Task | None, problems: Problems
) -> tuple[dict[str, Any], Manifest | Task | None, int, int]:
    """Settings of the data module, the manifest if the data is prepared, and the vocabulary's size and EOS.

    A synthetic task takes the manifest's place: there is nothing to prepare, and the tokens are its own.
    """
    data: dict[str, Any] = {}
    filters: dict[str, Filter] = {}
    with problems.collect():
        filters = build_filters(config["curation"])
    tokenizer, prepared, is_readable = None, is_prepared(config), False
    if config.get("tokenizer") is not None:
        with problems.collect():
            tokenizer = build(config["tokenizer"])
    elif not prepared:
        problems.note(Problem("tokenizer", "needs an option: tokenizer=bpe"))
    with problems.collect():
        data = data_settings(config)
    if isinstance(task := data.get("task"), Task):
        if filters:
            problems.note(Problem("curation", "a synthetic task has no documents to filter: use curation=none"))
        if isinstance(build(config["budget"]), EpochsBudget):
            problems.note(Problem("budget.epochs", "a synthetic task has no epochs: use budget=steps or budget=tokens"))
        return data, task, task.vocab_size, task.eos_id
    if prepared and data:
        if filters:
            problems.note(Problem("curation", "was done when these shards were prepared: use curation=none"))
        data["sources"] = data["sources"] or {}
        with problems.collect():
            found = manifest if isinstance(manifest, Manifest) else find_prepared(tokenizer, **location(data))
            data["sources"] = shares(found, data["sources"])
            if is_remote(data["path"]):
                names = "cache_bytes", "shuffle_window", "max_training_tokens"
                check_cache(found, config["model"]["context_length"], **{name: data[name] for name in names})
            manifest = found
    elif data:
        with problems.collect():
            check_sources(data["sources"], data.get("path"))
            is_readable = True
    if data:
        with problems.collect():
            weights_by_fraction(data["sources"])
    if is_readable and manifest is None and tokenizer is not None:
        with problems.collect():
            manifest = find_manifest(data["sources"], tokenizer, filters=filters, **shard_settings(data))
    if manifest is not None:
        with problems.collect():
            manifest.load_tokenizer()
        return data, manifest, manifest.vocab_size, manifest.eos_id
    if tokenizer is None:
        return data, None, 2**16, 0
    # An untrained tokenizer knows how many tokens it will have at most.
    return data, None, tokenizer.settings.get("vocab_size", 0) or tokenizer.vocab_size, 0


def is_prepared(config: dict[str, Any]) -> bool:
    """Whether the shards lie somewhere already, and bring their tokenizer."""
    return str(config["data"]["_target_"]).endswith(".PreparedShards")


def location(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings that say where prepared shards lie."""
    return {name: data[name] for name in ("path", "cache_dir", "attempts", "timeout")}


def build_filters(curation: dict[str, Any]) -> dict[str, Filter]:
    """The filters of the group `curation`, by name.

    Raises:
        ConfigError: settings of filters contradict each other; names them.
    """
    return build_all(curation["filters"], "curation.filters", Filter)  # type: ignore[type-abstract]


def data_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the data module, with its sources built; those that are left out at their defaults.

    Raises:
        ConfigError: settings of sources contradict each other; names them.
    """
    data = config["data"]
    build_all(data.get("sources") or {}, "data.sources", Share if is_prepared(config) else Source)
    made: Any = factory(data)  # a partial
    parameters = inspect.signature(made.func).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return defaults | made.keywords  # type: ignore[no-any-return]


def shard_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Those settings of the data module that say which shards, and where."""
    return {name: data[name] for name in ("shards_dir", "validation_fraction")}


class Drawn(NamedTuple):
    """What a run draws from its sources."""

    steps: int
    epochs: dict[str, float]
    shares: dict[str, float]
    notes: list[str]


def draw(  # noqa: PLR0917
    data: dict[str, Any], available: dict[str, int], steps: int, sequences: int, problems: Problems, is_dry: bool
) -> Drawn:
    """Work out what `steps` steps draw from each source, and fewer steps where a source that ends ends the run.

    Too much repetition refuses a run; the plan alone may be of one that will have other data.
    """
    sources, at_max_epochs = data["sources"], data.get("at_max_epochs", "redistribute")

    def turns_of(steps: int) -> Turns:
        return plan_turns(
            sources,
            available,
            temperature=data.get("temperature", 1.0),
            at_max_epochs=at_max_epochs,
            steps=steps,
            sequences_per_step=sequences,
        )

    asked, turns, notes = steps, turns_of(steps), []
    while turns.end is not None and turns.end < steps * sequences:
        steps = turns.end // sequences
        if steps == 0:
            raise ValueError(
                f"data.sources: max_epochs leaves {turns.end} sequences, fewer than the {sequences} of one step:"
                " raise it, or lower batch.global_tokens"
            )
        turns = turns_of(steps)  # stages are fractions of the run, which is shorter now
    if steps < asked:
        sources_told = " and ".join(
            f"{s} (data.sources.{s}.max_epochs={sources[s].max_epochs:g})" for s in turns.used_up
        )
        if at_max_epochs == "redistribute":
            message = (
                f"only lasts for {steps:,} of {asked:,} steps: all with a weight are used up: {sources_told}; raise"
            )
            message += f" max_epochs, or lower the budget, as budget=steps budget.steps={steps}"
            problems.note(Problem("data.sources", message))
        notes.append(f"stops after {steps:,} of {asked:,} steps, when {sources_told} is used up")
    elif at_max_epochs == "redistribute":
        notes += [
            f"{source} reaches max_epochs={sources[source].max_epochs:g} in step {n // sequences + 1:,}, then the"
            " others take its place"
            for source, n in turns.used_up.items()
            if n < steps * sequences
        ]
    counts = turns.counts(steps * sequences)
    epochs = {source: counts[source] / n for source, n in available.items()}
    shares = {source: counts[source] / (steps * sequences) for source in available}
    allowed = [name for name, source in sources.items() if source.max_epochs is not None]

    def is_too_long(steps: int) -> bool:
        turns = turns_of(steps)
        counts = turns.counts(min(steps * sequences, turns.end or steps * sequences))
        return any(counts[s] > LITTLE_IS_GAINED_AFTER * n for s, n in available.items() if s not in allowed)

    repeated, refused = repetition(
        epochs,
        allowed,
        is_part=data.get("max_training_tokens") is not None,
        fitting=lambda: bisect.bisect_left(range(1, steps), True, key=is_too_long),
    )
    if is_dry:
        notes += [f"a run would be refused: {message}" for message in refused]
    else:
        for message in refused:
            problems.note(Problem("", message))
    return Drawn(steps, epochs, shares, notes + repeated)


def storage_notes(data: dict[str, Any]) -> list[str]:
    """Where shards are read from and kept, if that is not on this machine."""
    if not is_remote(str(data.get("path"))):
        return []
    size = f"{data['cache_bytes'] / 1e9:,.3g} GB"
    return [
        f"data is fetched from {data['path']} into {data['cache_dir']}: at most {size}, then the longest unused goes"
    ]


def part_notes(data: dict[str, Any]) -> list[str]:
    """What is trained on, if that is not all."""
    limit = data.get("max_training_tokens")
    return (
        [f"an epoch is {limit:,} tokens, spread evenly over the training data: the rest is left out"] if limit else []
    )
