"""Exported decoders against transformers' own code: the same logits, whatever options they have, or a refusal."""

import copy
import functools
import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import yaml

from thunderhead.core import config
from thunderhead.core.config import Config
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import build_decoder
from thunderhead.release.architectures import ARCHITECTURES
from thunderhead.release.exported import ExportedModel
from thunderhead.release.facts import Misfit
from thunderhead.release.huggingface import architecture_of, converted
from thunderhead.release.sample import Outcome, generate
from tiny import DEFAULTS

VOCAB, CONTEXT = 101, 32
CHOICES = (
    (
        *("attention=mha", "attention=gqa", "attention=mqa", "attention=sliding_window", "attention=mla"),
        "attention=gqa attention.qk_norm=true norm.eps=0.000001",
        "attention=gqa attention.qkv_bias=true",
        "attention=mha attention.head_dim=12",
        "attention=gqa attention.window=7",
        "attention=mla attention.q_lora_rank=20 attention.v_head_dim=6",
    ),
    (
        *("position=rope", "position=learned", "position=sinusoidal", "position=none", "position=alibi"),
        "position=rope position.fraction=0.5",
        "position=rope position.theta=500000.0 position.scaling=ntk position.factor=2",
        "position=rope position.scaling=linear position.factor=2",
        "position=rope position.scaling=llama3 position.factor=4 position.original_context_length=16",
        "position=sinusoidal position.scale_embedding=false",
    ),
    (
        *(f"activation={name}" for name in ("swiglu", "geglu", "reglu", "gelu", "relu", "relu2", "silu")),
        "activation=gelu activation.approximate=tanh",
    ),
    (
        *("norm=rmsnorm", "norm=layernorm", "norm=layernorm norm.bias=false", "norm=rmsnorm norm.eps=0.01"),
        *("norm=rmsnorm norm.elementwise_affine=false", "norm=layernorm norm.elementwise_affine=false"),
    ),
    (
        *(f"block={name}" for name in ("pre", "sandwich", "parallel", "post", "peri")),
        "block=parallel block.shared_norm=false",
    ),
    ("model.bias=false", "model.bias=true"),
    ("model.tie_embeddings=true", "model.tie_embeddings=false"),
    ("parametrization=standard", "parametrization=mup parametrization.base_d_model=16"),
)


@functools.cache
def _base() -> Config:
    return config.plain(config.compose([*DEFAULTS["model"], "loss=next_token"]))


def decoder_of(choices: Iterable[str], vocab_size: int = VOCAB) -> Decoder:
    """With random biases and weights of norms: those drawn at first are 0 and 1, and would hide where they go."""
    lines = dict(line.split("=", 1) for line in " ".join(choices).split())
    if lines["norm"] == "layernorm" and lines.get("norm.eps") == "0.000001":
        del lines["norm.eps"]
    composed = copy.deepcopy(_base())
    for key, value in sorted(lines.items(), key=lambda item: "." in item[0]):
        if "." in key:
            composed = config.set_value(composed, key, yaml.safe_load(value))
        else:
            composed[key] = config.values_of(key, value)
    decoder = build_decoder(composed, vocab_size, vocab_size - 1)
    decoder.initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return decoder.eval()


def difference_of(decoder: Decoder, model: Any) -> float:
    """How far the logits of a model of transformers are off, relative to the largest."""
    tokens_BT = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours, theirs = decoder.logits(tokens_BT), model(tokens_BT).logits
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / ours.abs().max())


PRE, PLAIN = "block=pre", ("model.bias=false", "model.tie_embeddings=true", "parametrization=standard")
LAYERNORM, ROPE = ("norm=layernorm",), "position=rope"
EXAMPLES = {
    "Llama": ("attention=gqa", ROPE, "activation=swiglu", "norm=rmsnorm", PRE),
    "Mistral": ("attention=sliding_window", ROPE, "activation=swiglu", "norm=rmsnorm", PRE),
    "Qwen2": ("attention=gqa attention.qkv_bias=true", ROPE, "activation=swiglu", "norm=rmsnorm", PRE),
    "Qwen3": ("attention=gqa attention.qk_norm=true", ROPE, "activation=swiglu", "norm=rmsnorm norm.eps=0.000001", PRE),
    "SmolLM3": ("attention=gqa", "position=none", "activation=swiglu", "norm=rmsnorm", PRE),
    "Arcee": ("attention=gqa", ROPE, "activation=relu2", "norm=rmsnorm", PRE),
    "Gemma2": ("attention=gqa", ROPE, "activation=geglu", "norm=rmsnorm", "block=sandwich"),
    "DeepseekV2": ("attention=mla", ROPE, "activation=swiglu", "norm=rmsnorm", PRE),
    "GPT2": ("attention=mha", "position=learned", "activation=gelu", *LAYERNORM, PRE),
    "GPTBigCode": ("attention=mqa", "position=learned", "activation=gelu", *LAYERNORM, PRE),
    "OPT": ("attention=mha", "position=sinusoidal", "activation=relu", *LAYERNORM, "block=post"),
    "GPTNeoX": ("attention=mha", ROPE, "activation=gelu", *LAYERNORM, "block=parallel block.shared_norm=false"),
    "Starcoder2": ("attention=gqa attention.window=7", ROPE, "activation=gelu", *LAYERNORM, PRE),
    "Nemotron": ("attention=gqa attention.head_dim=12", ROPE, "activation=relu2", *LAYERNORM, PRE),
    "StableLm": ("attention=gqa", "position=rope position.fraction=0.5", "activation=swiglu", *LAYERNORM, PRE),
    "Phi": ("attention=gqa", ROPE, "activation=gelu", *LAYERNORM, "block=parallel"),
    "Cohere": ("attention=gqa", ROPE, "activation=swiglu", "norm=layernorm norm.bias=false", "block=parallel"),
    "Mpt": ("attention=mha", "position=alibi", "activation=gelu", "norm=layernorm norm.bias=false", PRE),
}


def test_each_class_has_an_example() -> None:
    assert EXAMPLES.keys() == {architecture.name for architecture in ARCHITECTURES}


@pytest.mark.parametrize("parametrization", ["parametrization=standard", CHOICES[-1][1]], ids=["standard", "mup"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_logits_are_those_of_transformers(name: str, parametrization: str) -> None:
    """In float32 sums in another order: 1e-5 of the largest."""
    decoder = decoder_of((*EXAMPLES[name], "model.bias=false", "model.tie_embeddings=true", parametrization))
    model = converted(decoder)
    assert type(model).__name__.startswith(name)
    assert difference_of(decoder, model) < 1e-5


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_option_that_a_class_is_said_to_have_is_right(name: str) -> None:
    """All options of CHOICES, one at a time beside those of the example; what the class lacks is another class's."""
    example, tried = (*EXAMPLES[name], "model.bias=false", "model.tie_embeddings=true", "parametrization=standard"), 0
    for place, options in enumerate(CHOICES):
        for option in options:
            try:
                decoder = decoder_of((*example[:place], option, *example[place + 1 :]))
                same = architecture_of(decoder, name).name == name
            except ValueError:  # no class, or refused before
                continue
            if same:
                assert difference_of(decoder, converted(decoder, name)) < 1e-5, option
                tried += 1
    assert tried >= len(CHOICES)  # the example itself, once for each place


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_class_continues_text_from_its_cache(name: str) -> None:
    """Greedily as ours does, which goes on beyond the context."""
    decoder = decoder_of((*EXAMPLES[name], "model.bias=false", "model.tie_embeddings=true", "parametrization=standard"))
    model, tokens_BT = ExportedModel(converted(decoder)), torch.arange(12).view(2, 6)
    assert (model.context_length, model.vocab_size) == (CONTEXT, VOCAB)
    outcome, settings = Outcome(), {"temperature": 0.0, "lengths_B": torch.tensor([6, 3])}
    theirs = generate(model, tokens_BT, CONTEXT, outcome=outcome, **settings)
    assert torch.equal(theirs, generate(decoder, tokens_BT, CONTEXT, **settings))
    if "window" not in EXAMPLES[name][0]:  # of which ours has no more than the window
        assert outcome.cache_bytes_per_token == decoder.cache_bytes_per_token(torch.float32)


def is_exported(choices: tuple[str, ...]) -> bool:
    """Whether there is a class for these options; its logits and its greedy text, from its cache, are the same then."""
    try:
        decoder = decoder_of(choices)
        model = converted(decoder)
    except ValueError:  # a Misfit, or refused before: positions that mla cannot have, muP without weights of norms …
        return False
    assert difference_of(decoder, model) < 1e-5, choices
    texts = [generate(each, torch.arange(6)[None], 4, temperature=0.0) for each in (decoder, ExportedModel(model))]
    assert torch.equal(*texts), choices
    return True


@pytest.mark.parametrize("n", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_any_options_are_exported_or_refused(n: int) -> None:
    chosen = random.Random(n).sample(list(itertools.product(*CHOICES)), n)
    assert sum(is_exported(choices) for choices in chosen) > n / 30


def test_a_refusal_names_what_the_nearest_class_lacks() -> None:
    decoder = decoder_of(("attention=gqa", ROPE, "activation=swiglu", "norm=rmsnorm", "block=parallel", *PLAIN))
    with pytest.raises(Misfit, match=r"Llama comes nearest, but does not have block=parallel"):
        architecture_of(decoder)
