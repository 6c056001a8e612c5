"""Text from a trained decoder, one token at a time.

Shape letters: B batch, T tokens so far, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Gt, Le, MinLen
from torch import Tensor

from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Share = Annotated[float, Gt(0), Le(1)]
BeyondContext = Literal["slide", "stop"]


class NextTokenModel(Protocol):
    """What `generate` needs of a decoder: an `nn.Module` with a context length and next-token logits (B, T, V).

    With `new_cache(n_sequences, n_tokens, device)` as `Decoder` has it, `logits` gets that cache and new tokens only;
    of the cache, `n_seen` and `bytes_per_token` are read.
    """

    training: bool
    context_length: int

    def logits(self, tokens_BT: Tensor, cache: Any = ..., /) -> Tensor: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...


@dataclass
class Outcome:
    """What `generate` took, as measured, and how it ended; rows share the seconds."""

    prefill_tokens: int = 0  # of the prompts, read at once
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # new ones after the first, one at a time, of all rows
    decode_seconds: float = 0.0
    cache_bytes_per_token: float | None = None  # of one row; None: no cache
    rows_cut: int = 0  # that ended only because the context did

    def __str__(self) -> str:
        parts = [
            f"{name} {tokens / seconds if tokens else 0:,.0f} tokens/s ({tokens:,} tokens)"
            for name, tokens, seconds in (
                ("prefill", self.prefill_tokens, self.prefill_seconds),
                ("decode", self.decode_tokens, self.decode_seconds),
            )
        ]
        cache = self.cache_bytes_per_token
        return ", ".join([*parts, "no cache" if cache is None else f"cache {cache:,.0f} bytes a token"])


def sample_text(
    decoder: NextTokenModel,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    prompt: str,
    max_new_tokens: PositiveInt,
    temperature: NonNegativeFloat = 1.0,
    top_k: PositiveInt | None = None,
    top_p: Share | None = None,
    min_p: Share | None = None,
    repetition_penalty: PositiveFloat = 1.0,
    stop: Sequence[Annotated[str, MinLen(1)]] = (),
    beyond_context: BeyondContext = "slide",
    seed: NonNegativeInt = 0,
) -> str:
    """The prompt and its continuation, up to the end of the document; an empty prompt starts one. See `generate`.

    It ends before the first of the texts in `stop`.
    """
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    ends = {"stop": stop, "beyond_context": beyond_context}
    settings: dict[str, Any] = {"temperature": temperature, "seed": seed, **cuts, **ends}
    return sample_texts(decoder, tokenizer, device, [prompt], max_new_tokens=max_new_tokens, **settings)[0]


def sample_texts(
    decoder: NextTokenModel,
    tokenizer: Tokenizer,
    device: torch.device,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    only_new: bool = False,
    show: Callable[[str], object] | None = None,
    **settings: Any,
) -> list[str]:
    """Several prompts, of any lengths, with their continuations: all at once. `settings` are those of `generate`.

    A prompt is a text or its tokens; `only_new` gives the continuations without them.

    Of the first prompt `show` gets each part of the text as soon as nothing can change it any more: the prompt, then
    whole characters, and no part of a text in `stop`.
    """
    known = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = [[int(token) for token in tokens] or [tokenizer.eos_id] for tokens in known]

    def text_of(tokens: list[int]) -> str:
        # A published vocabulary may have rows that the tokenizer does not know.
        return tokenizer.decode([t for t in tokens if t < tokenizer.vocab_size and t != tokenizer.eos_id])

    read, shown = [len(text_of(own)) for own in ids], 0  # characters

    def cut(row: int, tokens: list[int]) -> tuple[str, bool]:
        """The text up to the first of `stop`, and whether there is one."""
        text = text_of(tokens)
        places = [place for end in stop if (place := text.find(end, read[row])) >= 0]
        return text[: min(places, default=len(text))], bool(places)

    def told(text: str) -> None:
        nonlocal shown
        if show is not None and len(text) > shown:
            show(text[shown:])
            shown = len(text)

    def ended(tokens_BT: Tensor) -> list[bool]:
        found = [cut(row, tokens) for row, tokens in enumerate(tokens_BT.tolist())]
        text, is_whole = found[0]
        told(text if is_whole else _settled(text, read[0], stop))
        return [is_cut for _, is_cut in found]

    told(text_of(ids[0]))
    longest, lengths_B = max(map(len, ids)), torch.tensor([len(row) for row in ids])
    padded = [row + [tokenizer.eos_id] * (longest - len(row)) for row in ids]
    tokens_BT = generate(
        decoder,
        torch.tensor(padded, device=device),
        max_new_tokens,
        lengths_B=lengths_B,
        eos_id=tokenizer.eos_id,
        ended=ended if stop or show else None,
        **settings,
    )
    rows = zip(ids, tokens_BT.tolist(), strict=True)
    texts = [cut(row, tokens[: len(own) + max_new_tokens])[0] for row, (own, tokens) in enumerate(rows)]
    told(texts[0])
    return [text[n:] for text, n in zip(texts, read, strict=True)] if only_new else texts


def _settled(text: str, n_read: int, stop: Sequence[str]) -> str:
    """The text without the bytes of a character at its end that is not whole yet, and what may begin a stop text."""
    text = text.rstrip("\ufffd")
    first = max(n_read, len(text) - max(map(len, stop), default=0))
    return next((text[:n] for n in range(first, len(text)) if any(end.startswith(text[n:]) for end in stop)), text)


@torch.inference_mode()
def generate(
    decoder: NextTokenModel,
    prompt_ids_BT: Tensor,
    max_new_tokens: PositiveInt,
    *,
    lengths_B: Tensor | None = None,
    temperature: NonNegativeFloat = 1.0,
    top_k: PositiveInt | None = None,
    top_p: Share | None = None,
    min_p: Share | None = None,
    repetition_penalty: PositiveFloat = 1.0,
    beyond_context: BeyondContext = "slide",
    seed: int = 0,
    eos_id: int | None = None,
    ended: Callable[[Tensor], list[bool]] | None = None,
    outcome: Outcome | None = None,
) -> Tensor:
    """Continue prompts (B, T), T ≥ 1, by sampling from the decoder: (B, T + n), n ≤ max_new_tokens.

    The decoder is put into eval mode and back. It sees at most its context length of the latest tokens. Up to that it
    goes on from a cache, if it has one; beyond, where every token changes its place, it computes all anew each time.
    With beyond_context="stop" a row ends there instead, prompt included: raises ValueError for a prompt that leaves no
    room. Sampling is in float32 on the CPU, so that the seed draws the same on every device.

    With `lengths_B`, prompts of several lengths stand at the left: a row goes on where its own ends, with at most
    max_new_tokens tokens, which takes no padding and no mask: while the longer ones are still being read, the others
    are continued already, token by token.

    The logits of tokens that the row has seen are divided by `repetition_penalty` if they are positive, and multiplied
    by it if not (CTRL, 1909.05858). Then all are divided by `temperature`; 0 is the limit: always the most probable
    token. `top_k` keeps the k most probable tokens only, `top_p` the fewest most probable ones whose probabilities sum
    to at least p after that (nucleus sampling, Holtzman et al. 1904.09751), and `min_p` those at least min_p times as
    probable as the most probable one (2407.01082). A row that has produced `eos_id`, or is `ended`, is finished and
    filled up with eos_id; the text ends when all rows are. `outcome` is told what it took.
    """
    assert prompt_ids_BT.ndim == 2, "the prompt is (B, T)"
    assert prompt_ids_BT.size(1) >= 1, "the prompt has at least one token"
    lengths_B = torch.full((len(prompt_ids_BT),), prompt_ids_BT.size(1)) if lengths_B is None else lengths_B.cpu()
    shortest, longest = int(lengths_B.min()), int(lengths_B.max())
    outcome, end_B = outcome or Outcome(), lengths_B + max_new_tokens
    if beyond_context == "stop":
        if longest >= decoder.context_length:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of {decoder.context_length}")
        end_B = end_B.clamp(max=decoder.context_length)
    random, tokens_BT = torch.Generator().manual_seed(seed), prompt_ids_BT[:, :shortest]
    finished_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
    was_training, cache = decoder.training, None
    decoder.eval()
    try:
        if hasattr(decoder, "new_cache") and shortest <= decoder.context_length:
            cache = decoder.new_cache(len(tokens_BT), longest + max_new_tokens, tokens_BT.device)
        began = time.perf_counter()
        for place in range(shortest, int(end_B.max())):
            if cache is not None and tokens_BT.size(1) <= decoder.context_length:
                logits_BTV = decoder.logits(tokens_BT[:, cache.n_seen :], cache)
            else:
                logits_BTV = decoder.logits(tokens_BT[:, -decoder.context_length :])
            logits_BV = logits_BTV[:, -1].float().cpu()
            is_new_B = place >= lengths_B
            if place == shortest:
                outcome.prefill_tokens = logits_BTV.shape[0] * logits_BTV.shape[1]
                outcome.prefill_seconds, began = time.perf_counter() - began, time.perf_counter()
            else:
                outcome.decode_tokens += int((is_new_B & ~finished_B).sum())
            if repetition_penalty != 1.0:
                logits_BV = _penalized(logits_BV, tokens_BT.cpu(), repetition_penalty)
            next_B = _choose(logits_BV, temperature, top_k, top_p, min_p, random)
            if eos_id is not None:
                next_B = next_B.masked_fill(finished_B, eos_id)
                finished_B |= (next_B == eos_id) & is_new_B
            if place < longest:
                next_B = torch.where(is_new_B, next_B, prompt_ids_BT[:, place].cpu())
            tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT)], dim=1)
            if ended is not None:
                finished_B |= torch.tensor(ended(tokens_BT)) & is_new_B
            at_end_B = place + 1 >= end_B
            outcome.rows_cut += int((at_end_B & ~finished_B & (end_B < lengths_B + max_new_tokens)).sum())
            finished_B |= at_end_B
            if finished_B.all():
                break
        outcome.decode_seconds = time.perf_counter() - began
        outcome.cache_bytes_per_token = None if cache is None else cache.bytes_per_token
    finally:
        decoder.train(was_training)
    return tokens_BT


def _penalized(logits_BV: Tensor, tokens_BT: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that a row has, less probable by the penalty."""
    seen_BT = logits_BV.gather(1, tokens_BT)
    return logits_BV.scatter(1, tokens_BT, torch.where(seen_BT > 0, seen_BT / penalty, seen_BT * penalty))


def _choose(  # noqa: PLR0917
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    random: torch.Generator,
) -> Tensor:
    """One token a row, (B,)."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # Sorted, so that both cuts are the end of the row, and ties at a cut do not let more tokens in.
    logits_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    logits_BV = logits_BV[:, :top_k] - logits_BV[:, :1]  # at most 0: no temperature is too low for float32
    probabilities_BV = (logits_BV / temperature).softmax(-1)
    if top_p is not None:
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV  # 0 for the first: one token always stays
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0.0)
    if min_p is not None:
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < min_p * probabilities_BV[:, :1], 0.0)
    place_B1 = torch.multinomial(probabilities_BV, 1, generator=random)
    return ids_BV.gather(1, place_B1).squeeze(1)
