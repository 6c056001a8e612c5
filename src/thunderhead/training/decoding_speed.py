"""How fast a model writes text, measured."""

import statistics
import time

import torch
from torch.distributed.tensor import DTensor

from thunderhead.core.model.decoder import Decoder

WARM_UP = 3  # tokens that do not count
ENOUGH = 256  # tokens


@torch.inference_mode()
def decode_tokens_per_second(decoder: Decoder, device: torch.device, max_seconds: float = 0.5) -> float | None:
    """Tokens a second of one sequence, each from those before it by a key/value cache.

    From a prompt of half the context to its end, and again, until `max_seconds` or ENOUGH tokens: one over the median
    time of a token. None where it would not be that of the model: its parameters are spread over devices, a layer has
    no cache, or there is no room for a second token.
    """
    context = decoder.context_length
    if context == 1 or any(isinstance(parameter, DTensor) for parameter in decoder.parameters()):
        return None
    tokens_1T = torch.randint(decoder.vocab_size, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    was_training, seconds, begin = decoder.training, list[float](), time.perf_counter()
    decoder.eval()
    try:
        while len(seconds) < ENOUGH and (time.perf_counter() - begin < max_seconds or len(seconds) <= WARM_UP):
            cache = decoder.new_cache(device=device)
            if cache is None:
                return None
            decoder.logits(tokens_1T[:, : context // 2], cache)
            for place in range(context // 2, context):
                start = _now(device)
                decoder.logits(tokens_1T[:, place : place + 1], cache).argmax(dim=-1)
                seconds.append(_now(device) - start)
                if len(seconds) > WARM_UP and seconds[-1] + time.perf_counter() - begin > max_seconds:
                    break
    finally:
        decoder.train(was_training)
    return 1 / statistics.median(seconds[WARM_UP:])


def _now(device: torch.device) -> float:
    """Seconds, after all that the device was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
