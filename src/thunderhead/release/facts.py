"""What a decoder is, as far as it decides which of other libraries' classes can be it."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import nn
from torch.nn import functional as F

from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.block import Block
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import FeedForward, GatedFeedForward, squared_relu
from thunderhead.core.model.position import NoPosition, RotaryPosition
from thunderhead.options.blocks import ParallelBlock, PostNormBlock, SandwichBlock
from thunderhead.options.latent_attention import MultiHeadLatentAttention
from thunderhead.options.positions import AlibiPosition, LearnedPosition, ScaledRotaryPosition, SinusoidalPosition

Facts = dict[str, str]
"""By config path, in few words; a class that is none of ours stands there by its name."""


PLAIN: Facts = {
    "layers": "alike",
    "attention": "softmax",
    "attention.n_kv_heads": "all",
    "attention.head_dim": "d_model / n_heads",
    "attention.window": "null",
    "attention.qk_norm": "false",
    "attention.qkv_bias": "false",
    "attention.logit_softcap": "null",
    "block": "pre",
    "norm": "rmsnorm",
    "norm.bias": "false",
    "activation": "gated",
    "position": "rope",
    "position.fraction": "1",
    "position.scaling": "none",
    "model.bias": "false",
}
"""What a class can be where nothing else is said of it."""


class Misfit(ValueError):  # noqa: N818 - no fault of anybody's
    """No class has these options together."""


class Candidate(Protocol):
    """A class of another library."""

    @property
    def name(self) -> str:
        """Its name there."""

    @property
    def allows(self) -> Mapping[str, set[str]]:
        """Values of facts that it can be; of facts that are not named, PLAIN's."""


C = TypeVar("C", bound=Candidate)


def misfits(candidate: Candidate, facts: Facts) -> list[str]:
    """What of a decoder a class does not have, as config paths with their values."""
    wanted = {fact: {plain} for fact, plain in PLAIN.items()} | dict(candidate.allows)
    if facts.get("attention.qk_norm") == "true":
        wanted["norm.eps"] = {"qk_norm's"}
    wanted.setdefault("function", {"gelu", "gelu_pytorch_tanh", "silu", "relu", "relu2"})
    return [f"{fact}={facts[fact]}" for fact, values in wanted.items() if fact in facts and facts[fact] not in values]


def fitting(decoder: Decoder, candidates: Iterable[C]) -> C:
    """The first that has all options of a decoder; raises Misfit, which names those that the nearest does not have."""
    facts = facts_of(decoder)
    found = [(misfits(candidate, facts), candidate) for candidate in candidates]
    missing, nearest = min(found, key=lambda each: len(each[0]))  # the first of equals
    if missing:
        raise Misfit(f"{nearest.name} comes nearest, but does not have {', '.join(missing)}")
    return nearest


def facts_of(decoder: Decoder) -> Facts:
    """The facts of a decoder."""
    kinds = [
        _facts_of_layer(decoder, block, mixer) for block, mixer in zip(decoder.blocks, decoder.mixers, strict=True)
    ]
    facts = kinds[0] | {"layers": "alike" if all(kind == kinds[0] for kind in kinds) else "different"}
    position: Any = decoder.position
    positions: dict[type, str] = {
        RotaryPosition: "rope",
        ScaledRotaryPosition: "rope",
        LearnedPosition: "learned",
        SinusoidalPosition: "sinusoidal",
        NoPosition: "none",
        AlibiPosition: "alibi",
    }
    facts["position"] = positions.get(type(position), type(position).__name__)
    facts["position.fraction"], facts["position.scaling"] = "1", "none"
    if isinstance(position, RotaryPosition):
        facts["position.fraction"] = "1" if position.rotated_dim == decoder.mixers[0].rotary_dim else "less"
        scaling = getattr(position, "scaling", "none")
        facts["position.scaling"] = "none" if scaling == "ntk" else scaling  # which is another theta
    return facts


def _facts_of_layer(decoder: Decoder, block: Any, mixer: Any) -> Facts:
    blocks = {Block: "pre", SandwichBlock: "sandwich", ParallelBlock: "parallel", PostNormBlock: "post"}
    kind = blocks.get(type(block), type(block).__name__)
    if kind == "sandwich" and block.needs_embedding_norm:
        kind = "peri"
    if kind == "parallel" and not block.shared_norm:
        kind = "parallel with shared_norm=false"
    norms = {nn.RMSNorm: "rmsnorm", nn.LayerNorm: "layernorm"}
    mixers = {GroupedQueryAttention: "softmax", MultiHeadLatentAttention: "mla"}
    norm, feedforward = block.attention_norm, block.feedforward
    facts = {
        "block": kind,
        "norm": norms.get(type(norm), type(norm).__name__),
        "norm.bias": _said(getattr(norm, "bias", None) is not None),
        "activation": {FeedForward: "ungated", GatedFeedForward: "gated"}.get(
            type(feedforward), type(feedforward).__name__
        ),
        "function": function_of(feedforward),
        "model.bias": _said(any(m.bias is not None for m in feedforward.modules() if isinstance(m, nn.Linear))),
        "attention": mixers.get(type(mixer), type(mixer).__name__),
    }
    if type(mixer) in mixers:
        groups, d_model = {decoder.n_heads: "all", 1: "one"}, decoder.embedding.embedding_dim
        is_latent = type(mixer) is MultiHeadLatentAttention
        plain = d_model % decoder.n_heads == 0 if is_latent else mixer.head_dim * decoder.n_heads == d_model
        same_eps = mixer.q_norm.eps == norm.eps if isinstance(mixer.q_norm, nn.RMSNorm) else True
        facts |= {
            "attention.n_kv_heads": groups.get(mixer.n_kv_heads, "fewer"),
            "attention.head_dim": "d_model / n_heads" if plain else "given",
            "attention.window": "null" if mixer.window is None else "given",
            "attention.qk_norm": "false" if isinstance(mixer.q_norm, nn.Identity) else "true",
            "attention.qkv_bias": _said(mixer.q_proj.bias is not None),
            "attention.logit_softcap": "null" if mixer.logit_softcap is None else "given",
            "norm.eps": "qk_norm's" if same_eps else "other than qk_norm's 1e-6",
        }
    return facts


def _said(value: bool) -> str:
    return str(value).lower()


def function_of(feedforward: Any) -> str:
    """Transformers' name for the nonlinearity, or one that it does not have."""
    function = getattr(feedforward, "function", None)
    if isinstance(function, functools.partial):
        if function.func is F.gelu:
            return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[function.keywords["approximate"]]
        return "swish with beta"
    functions: dict[Any, str] = {F.relu: "relu", F.silu: "silu", squared_relu: "relu2"}
    return functions.get(function, "unknown")
