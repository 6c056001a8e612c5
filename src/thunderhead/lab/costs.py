"""What an arm costs: in training, until it reaches a loss, and when text is made with it."""

import logging
from typing import NamedTuple

import numpy as np
import torch

from thunderhead.core.module import build_decoder
from thunderhead.lab.runs import Curve, Run

CACHE_DTYPE = torch.bfloat16
CACHE_BYTES = CACHE_DTYPE.itemsize
_log = logging.getLogger(__name__)


class Cost(NamedTuple):
    """Of training up to some point."""

    tokens: float
    flops: float
    seconds: float  # without validation


def cost_to_reach(curve: Curve, loss: float) -> Cost | None:
    """What training had cost when a validation curve first came down to a loss, between validations by a straight line.

    None if it never did. The first validation is a point without one before it: what comes out there is at most.
    """
    below = np.flatnonzero(curve.loss <= loss)
    if below.size == 0:
        return None
    after = int(below[0])
    if after == 0:
        return Cost(*(float(axis[0]) for axis in curve[:3]))
    part = (curve.loss[after - 1] - loss) / (curve.loss[after - 1] - curve.loss[after])
    return Cost(*(float(axis[after - 1] + part * (axis[after] - axis[after - 1])) for axis in curve[:3]))


def kv_cache_bytes_per_token(run: Run) -> float | None:
    """Bytes that the key/value cache of all layers takes for each token of a full context, in bfloat16.

    A window keeps no more than its own tokens, so that it needs less for each token of the context. None if the model
    cannot be built here (a class of the user's that this program does not find).
    """
    try:
        with torch.device("meta"):
            decoder = build_decoder(run.config, run.plan["vocab_size"], 0)
    except Exception as error:  # whatever a user's own class raises: the report goes without this number
        _log.warning("the model of %s cannot be built, its key/value cache is unknown: %s", run.folder, error)
        return None
    return decoder.cache_bytes_per_token(CACHE_DTYPE)
