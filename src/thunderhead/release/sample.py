"""A sample of text from a model, for people to read."""

from typing import Annotated

import torch
from annotated_types import Gt, Le

from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from thunderhead.release.generation import NextTokenModel, generate


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
    """The prompt and its continuation, up to the end of the document; see `generation.generate`.

    An empty prompt starts a document.
    """
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
