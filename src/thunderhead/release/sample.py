"""Text from a trained decoder, one token at a time.

Shape letters: B batch, T tokens so far, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Gt, Le
from torch import Tensor

from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Share = Annotated[float, Gt(0), Le(1)]


class NextTokenModel(Protocol):
    """What `generate` needs of a decoder: an `nn.Module` with a context length and next-token logits (B, T, V).

    With `new_cache(n_sequences, n_tokens, device)` as `Decoder` has it, `logits` gets that cache and new tokens only.
    """

    training: bool
    context_length: int

    def logits(self, tokens_BT: Tensor, cache: Any = ..., /) -> Tensor: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...


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
    stop: Sequence[str] = (),
    seed: NonNegativeInt = 0,
) -> str:
    """The prompt and its continuation, up to the end of the document; an empty prompt starts one. See `generate`.

    It ends before the first of the texts in `stop`.
    """
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    settings: dict[str, Any] = {"temperature": temperature, "stop": stop, "seed": seed, **cuts}
    return sample_texts(decoder, tokenizer, device, [prompt], max_new_tokens=max_new_tokens, **settings)[0]


def sample_texts(
    decoder: NextTokenModel,
    tokenizer: Tokenizer,
    device: torch.device,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **settings: Any,
) -> list[str]:
    """Several prompts, of any lengths, with their continuations: all at once. `settings` are those of `generate`."""
    ids = [[int(token) for token in tokenizer.encode(prompt)] or [tokenizer.eos_id] for prompt in prompts]

    def text_of(row: int, n_tokens: int, tokens_BT: Tensor) -> str:
        # A published vocabulary may have rows that the tokenizer does not know.
        shown = [token for token in tokens_BT[row, :n_tokens].tolist() if token < tokenizer.vocab_size]
        return tokenizer.decode([token for token in shown if token != tokenizer.eos_id])

    longest, lengths_B = max(map(len, ids)), torch.tensor([len(row) for row in ids])
    padded = [row + [tokenizer.eos_id] * (longest - len(row)) for row in ids]
    read = [len(text_of(row, len(own), torch.tensor(padded))) for row, own in enumerate(ids)]  # characters of prompts

    def stops(row: int, n_tokens: int, tokens_BT: Tensor) -> list[int]:
        text = text_of(row, n_tokens, tokens_BT)
        return [place for end in stop if (place := text.find(end, read[row])) >= 0]

    def ended(tokens_BT: Tensor) -> list[bool]:
        return [bool(stops(row, tokens_BT.size(1), tokens_BT)) for row in range(len(ids))]

    tokens_BT = generate(
        decoder,
        torch.tensor(padded, device=device),
        max_new_tokens,
        lengths_B=lengths_B,
        eos_id=tokenizer.eos_id,
        ended=ended if stop else None,
        **settings,
    )
    texts = []
    for row, own in enumerate(ids):
        text = text_of(row, len(own) + max_new_tokens, tokens_BT)
        texts.append(text[: min(stops(row, len(own) + max_new_tokens, tokens_BT), default=len(text))])
    return texts


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
    seed: int = 0,
    eos_id: int | None = None,
    ended: Callable[[Tensor], list[bool]] | None = None,
) -> Tensor:
    """Continue prompts (B, T), T ≥ 1, by sampling from the decoder: (B, T + n), n ≤ max_new_tokens.

    The decoder is put into eval mode and back. It sees at most its context length of the latest tokens. Up to that it
    goes on from a cache, if it has one; beyond, where every token changes its place, it computes all anew each time.
    Sampling is in float32 on the CPU, so that the seed draws the same on every device.

    With `lengths_B`, prompts of several lengths stand at the left: a row goes on where its own ends, with at most
    max_new_tokens tokens, which takes no padding and no mask: while the longer ones are still being read, the others
    are continued already, token by token.

    The logits of tokens that the row has seen are divided by `repetition_penalty` if they are positive, and multiplied
    by it if not (CTRL, 1909.05858). Then all are divided by `temperature`; 0 is the limit: always the most probable
    token. `top_k` keeps the k most probable tokens only, `top_p` the fewest most probable ones whose probabilities sum
    to at least p after that (nucleus sampling, Holtzman et al. 1904.09751), and `min_p` those at least min_p times as
    probable as the most probable one (2407.01082). A row that has produced `eos_id`, or is `ended`, is finished and
    filled up with eos_id; the text ends when all rows are.
    """
    assert prompt_ids_BT.ndim == 2, "the prompt is (B, T)"
    assert prompt_ids_BT.size(1) >= 1, "the prompt has at least one token"
    lengths_B = torch.full((len(prompt_ids_BT),), prompt_ids_BT.size(1)) if lengths_B is None else lengths_B.cpu()
    shortest, longest = int(lengths_B.min()), int(lengths_B.max())
    random, tokens_BT = torch.Generator().manual_seed(seed), prompt_ids_BT[:, :shortest]
    finished_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
    was_training, cache = decoder.training, None
    decoder.eval()
    try:
        if hasattr(decoder, "new_cache") and shortest <= decoder.context_length:
            cache = decoder.new_cache(len(tokens_BT), longest + max_new_tokens, tokens_BT.device)
        for place in range(shortest, longest + max_new_tokens):
            if cache is not None and tokens_BT.size(1) <= decoder.context_length:
                logits_BTV = decoder.logits(tokens_BT[:, cache.n_seen :], cache)
            else:
                logits_BTV = decoder.logits(tokens_BT[:, -decoder.context_length :])
            logits_BV = logits_BTV[:, -1].float().cpu()
            if repetition_penalty != 1.0:
                logits_BV = _penalized(logits_BV, tokens_BT.cpu(), repetition_penalty)
            next_B = _choose(logits_BV, temperature, top_k, top_p, min_p, random)
            is_new_B = place >= lengths_B
            if eos_id is not None:
                next_B = next_B.masked_fill(finished_B, eos_id)
                finished_B |= (next_B == eos_id) & is_new_B
            if place < longest:
                next_B = torch.where(is_new_B, next_B, prompt_ids_BT[:, place].cpu())
            tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT)], dim=1)
            finished_B |= place + 1 >= lengths_B + max_new_tokens
            if ended is not None:
                finished_B |= torch.tensor(ended(tokens_BT)) & is_new_B
            if finished_B.all():
                break
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
