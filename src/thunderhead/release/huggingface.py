"""A decoder as a model of Hugging Face's transformers: the class that has all of its options, and its weights there."""

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from thunderhead.core.model.decoder import Decoder
from thunderhead.options.positions import LearnedPosition, SinusoidalPosition
from thunderhead.release.architectures import ARCHITECTURES, Architecture
from thunderhead.release.facts import fitting
from thunderhead.release.rearrange import Weights


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Transformers, without its bars, and without what it says of packages that it tries to import meanwhile."""
    logging.disable(logging.WARNING)
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        yield transformers
    finally:
        logging.disable(logging.NOTSET)


def architecture_of(decoder: Decoder, preferred: str | None = None) -> Architecture:
    """The class that has all options of a decoder, the `preferred` before others; raises Misfit if none has."""
    return fitting(decoder, sorted(ARCHITECTURES, key=lambda each: each.name != preferred))


def converted(decoder: Decoder, preferred: str | None = None) -> Any:
    """The decoder as a model of transformers, in float32: the same logits. Raises Misfit if no class is like it.

    It is of the `preferred` class if that is like it.
    """
    architecture = architecture_of(decoder, preferred)
    weights = {name: tensor.detach().float() for name, tensor in decoder.state_dict().items()}
    weights = folded(decoder, weights, "position.embedding" in architecture.names)
    tied = decoder.head is None and "head.weight" not in weights and architecture.name != "Gemma2"  # see its weights
    if not tied:
        weights.setdefault("head.weight", weights["embedding.weight"])
    theirs = architecture.change(decoder, renamed(weights, architecture.names))
    if tied:
        names = architecture.names
        theirs[f"{names['head']}.weight"] = theirs[f"{names['embedding']}.weight"]
    config = configured(architecture, decoder, tied)
    with quiet_transformers() as transformers:
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config)
        for name, tensor in empty.state_dict().items():
            if name not in theirs:  # biases that ours has not, and weights of norms that have none
                theirs[name] = torch.full(tensor.shape, architecture.unit if name.endswith("weight") else 0.0)
        assert theirs.keys() == empty.state_dict().keys(), sorted(theirs.keys() ^ empty.state_dict().keys())
        model = type(empty).from_pretrained(None, config=config, state_dict=theirs, dtype=torch.float32)
    return model.eval()


def configured(architecture: Architecture, decoder: Decoder, tied: bool) -> Any:
    """A decoder's configuration as a class of transformers; `tied`: whether its head is the embedding."""
    with quiet_transformers() as transformers:
        kind = getattr(transformers, f"{architecture.name}Config")
    known, settings = inspect.signature(kind).parameters, architecture.settings(decoder)
    return kind(tie_word_embeddings=tied, **{name: value for name, value in settings.items() if name in known})


def renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Weights under other names: of the longest part of a dotted name that is known."""
    known = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w]){re.escape(name)}(?![\w])" for name in known))
    return {pattern.sub(lambda found: names[found[0]], name): tensor for name, tensor in weights.items()}


def folded(decoder: Any, weights: Weights, with_table: bool) -> Weights:
    """Weights that do the same without padding of the vocabulary, muP's factors, and positions that are no weights.

    There is a `head.weight` if it is no longer the embedding's. `with_table`: the class has a table of positions.
    """
    weights = dict(weights)
    for name in weights.keys() & {"embedding.weight", "head.weight"}:
        weights[name] = weights[name][: decoder.vocab_size]
    head = weights.get("head.weight", weights["embedding.weight"])
    if decoder.output_scale != 1:
        weights["head.weight"] = head * decoder.output_scale
    position = decoder.position
    if with_table and not isinstance(position, LearnedPosition):
        nothing_1TD = torch.zeros(1, decoder.context_length, decoder.embedding.embedding_dim)
        weights["position.embedding.weight"] = position.embed(nothing_1TD, torch.arange(decoder.context_length)[None])[
            0
        ]
    if isinstance(position, SinusoidalPosition) and position.embedding_scale != 1:
        weights["embedding.weight"] = weights["embedding.weight"] * position.embedding_scale
        weights.setdefault("head.weight", head)
    for index, mixer in enumerate(decoder.mixers):
        if mixer.score_scale is not None:
            part = "q_proj" if isinstance(mixer.q_norm, nn.Identity) else "q_norm"
            for name in [f"blocks.{index}.attention.{part}.{kind}" for kind in ("weight", "bias")]:
                if name in weights:
                    weights[name] = weights[name] * mixer.score_scale * mixer.head_dim**0.5
    return weights
