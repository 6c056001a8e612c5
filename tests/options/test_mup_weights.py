"""What muP makes of a decoder, against the formulas of Yang et al. 2203.03466 (table 8 and definition 4.1)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.decoder import Decoder
from thunderhead.options.mup import Growth, MaximalUpdate

WIDE = ("model.d_model=64", "model.n_heads=8", "model.init_std=0.02")
BASE = ("model.d_model=16", "model.n_heads=2")  # heads of 8, as in WIDE
MUP = MaximalUpdate(base_d_model=16)
M = 4  # WIDE is four times as wide


@pytest.fixture
def grown(build: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """grown("attention=gqa", …) is a wide decoder, drawn after it was told its base."""

    def built(*overrides: str, base: tuple[str, ...] = BASE) -> Decoder:
        decoder = build(*WIDE, *overrides)
        MUP.scale(decoder, build(*base, *overrides, device="meta"))
        decoder.initialize(seed=1)
        return decoder

    return built


def std(parameter: torch.Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt())


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_are_those_of_table_8(grown, build, tied):
    settings = ("attention=mha", "activation=gelu", "position=learned", f"model.tie_embeddings={str(tied).lower()}")
    wide, standard = grown(*settings), build(*WIDE, *settings)
    plain = dict(standard.named_parameters())
    for name, parameter in wide.named_parameters():
        hidden = name.startswith("blocks.") and parameter.ndim == 2
        # The same draws, times a factor; float32 rounds once more on the way.
        expected = plain[name] * (1 / math.sqrt(M) if hidden else 1)
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert std(wide.embedding.weight) == pytest.approx(0.02, rel=0.05)  # of 61 × 64 draws
    assert (wide.head is None) is tied


def test_logits_are_divided_by_the_growth_of_the_width(grown, build):
    wide, standard = grown("model.tie_embeddings=false"), build(*WIDE, "model.tie_embeddings=false")
    standard.load_state_dict(wide.state_dict())
    tokens = torch.randint(61, (2, 16))
    torch.testing.assert_close(wide.logits(tokens), standard.logits(tokens) / M)
    # and the loss is of these logits
    expected = F.cross_entropy(standard.logits(tokens).flatten(0, 1) / M, tokens.flatten())
    torch.testing.assert_close(wide(tokens, tokens).loss, expected)


@pytest.mark.parametrize(
    ("attention", "part", "expected"),
    [
        ("mqa", "q_proj", Growth((64, 64), (16, 16))),
        ("mqa", "k_proj", Growth((8, 64), (8, 16))),  # one head of 8 at both widths
        ("mla", "kv_down_proj", Growth((36, 64), (36, 16))),  # a latent of four heads of 8, and 4 rotary dimensions
        ("mla", "kv_proj", Growth((128, 32), (32, 32))),
    ],
)
def test_growth_of_grouped_and_low_rank_projections(grown, attention, part, expected):
    assert grown(f"attention={attention}").growth[f"blocks.0.attention.{part}.weight"] == expected


@pytest.mark.parametrize(
    ("shape", "base_shape", "factor"),
    [
        ((64, 64), (16, 16), 1 / 2),
        ((128, 64), (32, 16), 1 / 2),
        ((8, 64), (8, 16), 1 / 2),
        ((64, 8), (16, 8), 1.0),  # only the output grows: as an embedding
        ((8, 8), (16, 16), math.sqrt(2)),  # narrower than the base
        ((16, 16), (16, 16), 1.0),
    ],
)
def test_factor_of_the_initial_std(shape, base_shape, factor):
    model, base = (
        nn.ModuleDict({"embedding": nn.Embedding(2, 4), "hidden": nn.Linear(n_in, n_out, bias=False)})
        for n_out, n_in in (shape, base_shape)
    )
    MUP.scale(model, base)
    assert model.std_factors == {"hidden.weight": pytest.approx(factor)}


def test_what_is_no_hidden_matrix_has_no_growth(grown):
    names = set(grown("attention=mha", "position=learned", "model.tie_embeddings=false", "model.bias=true").growth)
    assert names == {
        f"blocks.{i}.{part}.weight"
        for i in (0, 1)
        for part in (
            *(f"attention.{p}_proj" for p in ("q", "k", "v", "out")),
            *(f"feedforward.{p}_proj" for p in ("gate", "up", "down")),
        )
    }


@pytest.mark.parametrize("attention", ["mha", "sliding_window"])
def test_scores_fall_with_the_size_of_a_head(grown, attention):
    wider_heads = grown(f"attention={attention}", base=("model.d_model=16", "model.n_heads=8"))  # 8 now, 2 in the base
    layer = wider_heads.mixers[0]
    assert layer.head_dim == 8
    q, k, v = torch.randn(3, 1, 8, 5, 8).unbind()
    context = SequenceContext(torch.arange(5)[None])
    context = context._replace(**layer.masks(context))
    allowed = torch.ones(5, 5).tril().bool()
    scores = (q @ k.mT * math.sqrt(2) / 8).masked_fill(~allowed, -math.inf)
    if attention == "mha":  # the window is of 8 tokens, more than 5
        assert context.mask is None
    torch.testing.assert_close(layer.attend(q, k, v, context), scores.softmax(-1) @ v)


def test_heads_of_the_bases_size_keep_torchs_own_scale(grown):
    assert grown("attention=mha").mixers[0].score_scale is None


def test_scaled_embeddings_keep_the_bases_scale(grown):
    assert grown("position=sinusoidal").position.embedding_scale == math.sqrt(16)


def test_at_the_bases_width_nothing_changes(grown, build):
    settings = ("attention=gqa", "position=sinusoidal", "model.tie_embeddings=false")
    same, standard = grown(*settings, base=WIDE), build(*WIDE, *settings)
    for name, parameter in standard.named_parameters():
        assert torch.equal(same.get_parameter(name), parameter), name
    tokens = torch.randint(61, (2, 16))
    assert torch.equal(same.logits(tokens), standard.logits(tokens))


def test_another_model_is_no_base(build):
    with pytest.raises(ValueError, match=r"^the base model .* different: blocks\.2\.attention\.k_proj\.weight"):
        MUP.scale(build(*WIDE, "model.n_layers=3"), build(*BASE))
    model, base = nn.Linear(4, 4), nn.Linear(2, 2)
    base.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"otherwise different: .*weight"):
        MUP.scale(model, base)
