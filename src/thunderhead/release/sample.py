"""Text from a trained decoder, one token at a time.

Shape letters: B batch, T tokens so far, V vocabulary.
"""

from typing import Annotated, Any, Protocol

import torch
from annotated_types import Gt, Le
from torch import Tensor

from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import NonNegativeFloat, NonNegativeInt, PositiveInt


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
    top_p: Annotated[float, Gt(0), Le(1)] | None = None,
    seed: NonNegativeInt = 0,
) -> str:
    """The prompt and its continuation, up to the end of the document; an empty prompt starts one. See `generate`."""
    ids = [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.eos_id]
    sampled = generate(
        decoder,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    # A published vocabulary may have rows that the tokenizer does not know.
    known = [token for token in sampled[0].tolist() if token < tokenizer.vocab_size and token != tokenizer.eos_id]
    return tokenizer.decode(known)


@torch.inference_mode()
def generate(
    decoder: NextTokenModel,
    prompt_ids_BT: Tensor,
    max_new_tokens: PositiveInt,
    *,
    temperature: NonNegativeFloat = 1.0,
    top_k: PositiveInt | None = None,
    top_p: Annotated[float, Gt(0), Le(1)] | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Tensor:
    """Continue prompts of one length (B, T), T ≥ 1, by sampling from the decoder: (B, T + n), n ≤ max_new_tokens.

    The decoder is put into eval mode and back. It sees at most its context length of the latest tokens. Up to that it
    goes on from a cache, if it has one; beyond, where every token changes its place, it computes all anew each time.
    Sampling is in float32 on the CPU, so that the seed draws the same on every device.

    Logits are divided by `temperature`; 0 is the limit: always the most probable token. `top_k` keeps the k most
    probable tokens only, and `top_p` the fewest most probable ones whose probabilities sum to at least p after that
    (nucleus sampling, Holtzman et al. 1904.09751). A row that has produced `eos_id` is finished and filled up with it;
    the text ends when all rows are.
    """
    assert prompt_ids_BT.ndim == 2, "the prompt is (B, T)"
    assert prompt_ids_BT.size(1) >= 1, "the prompt has at least one token"
    random, tokens_BT = torch.Generator().manual_seed(seed), prompt_ids_BT
    finished_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
    was_training, cache = decoder.training, None
    decoder.eval()
    try:
        if hasattr(decoder, "new_cache") and tokens_BT.size(1) <= decoder.context_length:
            cache = decoder.new_cache(len(tokens_BT), tokens_BT.size(1) + max_new_tokens, tokens_BT.device)
        for _ in range(max_new_tokens):
            if cache is not None and tokens_BT.size(1) <= decoder.context_length:
                logits_BTV = decoder.logits(tokens_BT[:, cache.n_seen :], cache)
            else:
                logits_BTV = decoder.logits(tokens_BT[:, -decoder.context_length :])
            next_B = _choose(logits_BTV[:, -1].float().cpu(), temperature, top_k, top_p, random)
            if eos_id is not None:
                next_B = next_B.masked_fill(finished_B, eos_id)
                finished_B |= next_B == eos_id
            tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT)], dim=1)
            if finished_B.all():
                break
    finally:
        decoder.train(was_training)
    return tokens_BT


def _choose(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, random: torch.Generator
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
    place_B1 = torch.multinomial(probabilities_BV, 1, generator=random)
    return ids_BV.gather(1, place_B1).squeeze(1)
