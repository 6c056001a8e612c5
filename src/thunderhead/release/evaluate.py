"""`python evaluate.py`: loss, perplexity and bits per byte of a model on any text.

Shape letters: B windows, T tokens of a window, D model dimensions, V vocabulary, N tokens that are scored.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from thunderhead import command_line
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, build, first_line
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import PathText, PositiveInt
from thunderhead.release.command import load
from thunderhead.release.exported import ExportedModel

LOGITS = 2**27  # at most so many are held in float32: half a GiB


def settings(
    *,
    run: PathText,
    checkpoint: Literal["last", "best"] = "last",
    stride: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    json: bool = False,
    accelerator: str = "auto",
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/evaluate.yaml says what each does."""


@dataclass
class Score:
    """Sums over the documents of a source."""

    documents: int = 0
    bytes: int = 0  # of text
    tokens: int = 0  # that were scored: all, and no end of document
    nats: float = 0.0  # −log probability of all of them

    def to_dict(self) -> dict[str, float]:
        """With what follows: `loss` in nats a token, `perplexity`, `bits_per_byte`; NaN where there is no text."""
        loss = self.nats / self.tokens if self.tokens else math.nan
        bits = self.nats / math.log(2) / self.bytes if self.bytes else math.nan
        perplexity = math.exp(loss) if not loss > 700 else math.inf
        return {**asdict(self), "loss": loss, "perplexity": perplexity, "bits_per_byte": bits}


class Window(NamedTuple):
    """Tokens to read, and of each the next one to score, or IGNORED_TARGET."""

    tokens: list[int]
    targets: list[int]


def windows(document: Sequence[int], eos_id: int, context_length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows that begin `stride` tokens apart, so that each of its tokens is scored once.

    The first window begins with EOS, as in training; each further one scores what those before it did not, its last
    `stride` tokens at most: a token has at least context_length - stride tokens before it, where there are so many.
    """
    sequence, scored = [eos_id, *document], 0
    for begin in range(0, len(document), stride):
        end = min(begin + context_length, len(document))
        targets = sequence[begin + 1 : end + 1]
        known = scored - begin
        yield Window(sequence[begin:end], [IGNORED_TARGET] * known + targets[known:])
        scored = end
        if end == len(document):
            return


@torch.inference_mode()
def nats(decoder: Decoder | ExportedModel, batch: Sequence[Window]) -> float:
    """−log probability of all targets, summed in float64. Windows are filled up at the right, where nobody looks."""
    longest, device = max(len(window.tokens) for window in batch), next(decoder.parameters()).device
    tokens_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, IGNORED_TARGET)
    for row, (tokens, targets) in enumerate(batch):
        tokens_BT[row, : len(tokens)], targets_BT[row, : len(targets)] = torch.tensor(tokens), torch.tensor(targets)
    tokens_BT, targets_BT = tokens_BT.to(device), targets_BT.to(device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for logits_NV, targets_N in _logits(decoder, tokens_BT, targets_BT):
        total += F.cross_entropy(logits_NV.float(), targets_N, reduction="none").double().sum()
    return float(total)


def _logits(decoder: Decoder | ExportedModel, tokens_BT: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, V) where there is a target, and these, (N,): about LOGITS numbers at a time."""
    asked_BT = targets_BT != IGNORED_TARGET
    if isinstance(decoder, Decoder):
        at_once, states_ND = max(1, LOGITS // decoder.vocab_size), decoder.hidden(tokens_BT)[0][asked_BT]
        parts = (torch.split(x, at_once) for x in (states_ND, targets_BT[asked_BT]))
        for hidden_ND, targets_N in zip(*parts, strict=True):
            yield F.linear(hidden_ND, decoder.head_weight)[:, : decoder.vocab_size], targets_N
    else:
        at_once = max(1, LOGITS // (decoder.vocab_size * tokens_BT.shape[1]))  # rows
        for rows in torch.split(torch.arange(len(tokens_BT), device=tokens_BT.device), at_once):
            yield decoder.logits(tokens_BT[rows])[asked_BT[rows]], targets_BT[rows][asked_BT[rows]]


def score(
    decoder: Decoder | ExportedModel,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score texts, each as a document of its own; `stride`: see `windows`, None = half of the context length."""
    found, waiting, context_length = Score(), list[Window](), decoder.context_length
    stride = stride or max(1, context_length // 2)
    for text in texts:
        ids = [int(token) for token in tokenizer.encode(text)]
        found.documents, found.bytes = found.documents + 1, found.bytes + len(text.encode())
        found.tokens += len(ids)
        for window in windows(ids, tokenizer.eos_id, context_length, stride):
            waiting.append(window)
            if len(waiting) == batch_size:
                found.nats += nats(decoder, waiting)
                waiting = []
    if waiting:
        found.nats += nats(decoder, waiting)
    return found


def evaluate(config: DictConfig) -> dict[str, dict[str, float]]:
    """Score each of `data.sources` by the model of a run: what `Score.to_dict` says, by name, and of `all`.

    Raises ConfigError if the configuration is refused, there is no run, or no text.
    """
    resolved = configuration.plain(config)
    problems = configuration.check(resolved, settings)
    sources = resolved.get("data", {}).get("sources")
    if not sources:
        problems.append(Problem("data", "has no sources of text: choose data=text data.path=…"))
    for key in sorted(command_line.chosen(command_line.invocation_overrides())):
        if key.startswith("data.") and not key.startswith(("data.sources", "data.path")):
            problems.append(Problem(key, "changes nothing here: all text of data.sources is scored"))
    if problems:
        raise ConfigError(problems)
    built = {name: build(node) for name, node in sources.items()}
    _ask(built, "check")
    loaded = load(resolved)
    decoder = loaded.decoder.eval()
    if resolved["stride"] is not None and resolved["stride"] > decoder.context_length:
        limit = f"is longer than the model's context length: {decoder.context_length} at most, or tokens were left out"
        raise ConfigError([Problem("stride", limit)])
    _ask(built, "connect")  # it may download: only when all is well on this machine
    scores = {}
    asked = {"stride": resolved["stride"], "batch_size": resolved["batch_size"]}
    for name, source in built.items():
        try:
            with loaded.autocast(), _progress(name, source) as texts:
                scores[name] = score(decoder, loaded.tokenizer, texts, **asked)
        except (ValueError, ConnectionError) as error:  # what cannot be read, or text that the tokenizer cannot write
            raise ConfigError([Problem(f"data.sources.{name}", first_line(error))]) from error
    if len(scores) > 1:
        parts = scores.values()
        sums = {
            field: sum(getattr(part, field) for part in parts) for field in ("documents", "bytes", "tokens", "nats")
        }
        scores["all"] = Score(**sums)
    results = {name: found.to_dict() for name, found in scores.items()}
    if resolved["json"]:
        print(json.dumps(results, indent=2))
    else:
        _show(results)
    return results


def _ask(sources: dict[str, Any], what: Literal["check", "connect"]) -> None:
    """Call each source's `check` or `connect`; raises one ConfigError for all that fail."""
    problems = []
    for name, source in sources.items():
        try:
            getattr(source, what)()
        except (ValueError, ConnectionError) as error:
            problems.append(Problem(f"data.sources.{name}", first_line(error)))
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def _progress(name: str, source: Any) -> Iterator[Iterator[str]]:
    """Texts of a source, with a bar of its bytes on the terminal."""
    columns = TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(name), total=source.disk_bytes())
        yield (document.text for document in source.documents(lambda n_bytes: bar.advance(task, n_bytes)))


def _show(results: dict[str, dict[str, float]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for heading in ("source", "documents", "bytes", "tokens", "loss", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, found in results.items():
        counts = [f"{found[count]:,}" for count in ("documents", "bytes", "tokens")]
        table.add_row(
            escape(name), *counts, f"{found['loss']:.4f}", f"{found['perplexity']:.2f}", f"{found['bits_per_byte']:.4f}"
        )
    Console(highlight=False).print(table)
