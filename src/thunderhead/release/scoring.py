"""Probabilities that a model gives to text, each token scored once.

Shape letters: B windows, T tokens of a window, D model dimensions, V vocabulary, N tokens that are scored.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.release.exported import ExportedModel

LOGITS = 2**27  # at most so many are held in float32: half a GiB


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
def scored(decoder: Decoder | ExportedModel, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Of each window −log probability of its targets, (B,), in float64, and whether each of these is the likeliest.

    Windows are filled up at the right, where nobody looks.
    """
    longest, device = max(len(window.tokens) for window in batch), next(decoder.parameters()).device
    tokens_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets_BT = torch.full_like(tokens_BT, IGNORED_TARGET)
    for row, (tokens, targets) in enumerate(batch):
        tokens_BT[row, : len(tokens)], targets_BT[row, : len(targets)] = torch.tensor(tokens), torch.tensor(targets)
    tokens_BT, targets_BT = tokens_BT.to(device), targets_BT.to(device)
    losses, misses = [torch.zeros(0, device=device)], [torch.zeros(0, device=device, dtype=torch.bool)]
    for logits_NV, targets_N in _logits(decoder, tokens_BT, targets_BT):
        losses.append(F.cross_entropy(logits_NV.float(), targets_N, reduction="none"))
        misses.append(logits_NV.argmax(-1) != targets_N)
    rows_N = (targets_BT != IGNORED_TARGET).nonzero()[:, 0].cpu()
    sums_B2 = torch.zeros(len(batch), 2, dtype=torch.float64)  # on the CPU: MPS has no float64
    sums_B2.index_add_(0, rows_N, torch.stack([torch.cat(losses).cpu(), torch.cat(misses).cpu()], dim=1).double())
    return sums_B2[:, 0], sums_B2[:, 1] == 0


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
                found.nats += float(scored(decoder, waiting)[0].sum())
                waiting = []
    if waiting:
        found.nats += float(scored(decoder, waiting)[0].sum())
    return found
