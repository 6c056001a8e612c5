"""Learning-rate multipliers against Yang et al.'s package `mup`, and against what the optimizers really do."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mup
import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import FeedForward
from thunderhead.core.model.loss import NextTokenLoss
from thunderhead.core.optim.parameter_groups import parameter_groups
from thunderhead.options.activation_checkpointing import ActivationCheckpointing
from thunderhead.options.adafactor import Adafactor
from thunderhead.options.latent_attention import MultiHeadLatentAttention
from thunderhead.options.muon import Muon, update_scale
from thunderhead.options.mup import Growth, MaximalUpdate, Standard
from thunderhead.options.positions import LearnedPosition

LR, DECAY = 1e-3, 0.1
MUP = MaximalUpdate(base_d_model=16)


def decoder(d_model: int, attention: Callable[..., Any] = GroupedQueryAttention, tied: bool = False) -> Decoder:
    return Decoder(
        50,
        None,
        attention,
        LearnedPosition,
        partial(FeedForward, activation="gelu"),
        nn.LayerNorm,
        ResidualDropout,
        Block,
        NextTokenLoss,
        ActivationCheckpointing,
        n_layers=2,
        d_model=d_model,
        n_heads=d_model // 8,
        context_length=8,
        vocab_multiple=1,
        tie_embeddings=tied,
        bias=True,
    )


def grown(d_model: int = 64, base: int = 16, **settings: Any) -> Decoder:
    model = decoder(d_model, **settings)
    MUP.scale(model, decoder(base, **settings))
    model.initialize(seed=1)
    return model


def optimize(model: Decoder, kind: Callable[..., Optimizer], **settings: Any) -> Optimizer:
    optimizer = kind(parameter_groups(model), lr=LR, weight_decay=DECAY, **settings)
    MUP.scale_learning_rates(optimizer, model)
    return optimizer


def by_parameter(model: nn.Module, optimizer: Optimizer, key: str) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_equals_the_mup_package(tied):
    ours, theirs = grown(tied=tied), decoder(64, tied=tied)
    optimizer = optimize(ours, AdamW)
    # do_assert wants its own class as the head, whose multiplier is our decoder's output_scale
    mup.set_base_shapes(theirs, decoder(16, tied=tied), rescale_params=False, do_assert=False)
    reference = mup.MuAdamW(parameter_groups(theirs), lr=LR, weight_decay=DECAY)
    for key in ("lr", "weight_decay"):
        expected = by_parameter(theirs, reference, key)
        assert by_parameter(ours, optimizer, key) == pytest.approx(expected)
        assert len(set(expected.values())) == (2 if key == "lr" else 3)  # it does tell parameters apart
    assert ours.output_scale == pytest.approx(1 / theirs.embedding.weight.infshape.width_mult())
    for name, parameter in theirs.named_parameters():  # and the initial weights
        if name in ours.growth:
            mup.init.normal_(parameter, std=ours.init_std / (2 if "out_proj" in name or "down_proj" in name else 1))
            drawn, expected_std = (float(p.detach().std()) for p in (ours.get_parameter(name), parameter))
            # of 4,096 draws or more: 1 % each; ours are cut at three sigma (1.3 % less)
            assert drawn == pytest.approx(expected_std, rel=0.06), name


def test_low_rank_projections():
    model = grown(attention=MultiHeadLatentAttention)
    rates = by_parameter(model, optimize(model, AdamW), "lr")
    for part, rate in {"q_proj": LR / 4, "kv_down_proj": LR / 4, "kv_proj": LR, "out_proj": LR / 4}.items():
        assert rates[f"blocks.1.attention.{part}.weight"] == pytest.approx(rate), part


def test_lions_step_is_a_quarter_at_four_times_the_width():
    moved = {}
    for width in (16, 64):
        model = grown(width)
        optimizer = optimize(model, Lion, betas=(0.9, 0.99))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
        moved[width] = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}
    for name in moved[16]:
        factor = 4 if name in grown().growth else 1
        assert moved[16][name] == pytest.approx(factor * moved[64][name], rel=1e-3), name  # float32 weights near 1


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("attention", [partial(GroupedQueryAttention, n_kv_heads=1), MultiHeadLatentAttention])
def test_muons_update_has_the_spectral_norm_of_its_shape(adjust, attention):
    """Yang, Simon & Bernstein 2310.17813, condition 1: it grows as sqrt(fan_out / fan_in)."""
    norms: dict[int, dict[str, float]] = {}
    for width in (16, 64):
        model = grown(width, attention=attention)
        optimizer = optimize(model, Muon, adjust_lr_fn=adjust, ns_steps=30, ns_coefficients=(1.875, -1.25, 0.375))
        before = {name: model.get_parameter(name).detach().clone() for name in model.growth}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
        norms[width] = {
            name: float(torch.linalg.matrix_norm(model.get_parameter(name).detach() - start, ord=2))
            for name, start in before.items()
        }
    for name, growth in grown(attention=attention).growth.items():
        expected = math.sqrt(growth.fan_out / growth.fan_in)
        # Newton–Schulz with coefficients that converge to 1, in bfloat16
        assert norms[64][name] / norms[16][name] == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_update_scale_is_torchs(adjust, shape):
    matrix = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust, nesterov=False, momentum=0.0,
                                 ns_steps=30, ns_coefficients=(1.875, -1.25, 0.375))  # fmt: skip
    matrix.grad = torch.randn(shape)
    optimizer.step()
    norm = float(torch.linalg.matrix_norm(matrix.detach(), ord=2))
    assert norm == pytest.approx(update_scale(adjust, *shape), rel=0.02)  # bfloat16


@pytest.mark.parametrize("kind", [AdamW, Lion, Muon])
def test_what_weight_decay_takes_off_does_not_depend_on_the_width(kind):
    model = grown()
    optimizer = optimize(model, kind)
    for group in optimizer.param_groups:
        expected = 0.0 if group["name"] == "vectors" else LR * DECAY
        assert group["lr"] * group["weight_decay"] == pytest.approx(expected)
        assert group["lr"] == LR * group["lr_multiplier"]


@pytest.mark.parametrize("kind", [AdamW, Lion, Muon])
def test_at_the_bases_width_the_groups_are_as_they_were(kind):
    model = grown(64, base=64)
    plain = kind(parameter_groups(model), lr=LR, weight_decay=DECAY).param_groups
    scaled = optimize(model, kind).param_groups
    assert len(scaled) == len(plain)
    for group, other in zip(scaled, plain, strict=True):
        assert group.pop("lr_multiplier") == 1.0
        assert [id(p) for p in group.pop("params")] == [id(p) for p in other.pop("params")]
        assert group == other


def test_without_a_base_nothing_is_touched():
    model = decoder(16)
    optimizer = AdamW(parameter_groups(model), lr=LR)
    groups = optimizer.param_groups
    Standard().scale_learning_rates(optimizer, model)
    assert optimizer.param_groups is groups
    Standard().scale_learning_rates(SGD(model.parameters(), lr=LR), model)  # any optimizer will do


def test_each_parameter_exactly_once_and_schedules_multiply():
    model = grown()
    optimizer = optimize(model, AdamW)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] / group["lr_multiplier"] for group in optimizer.param_groups} == {LR / 2}


class Square(AdamW):
    """Someone's optimizer, whose updates are of another size than those of the class that it is made of."""


class Ruled(SGD):
    """Someone's optimizer with a rule, which sees its own group."""

    def width_multiplier(self, group: dict[str, Any], growth: Growth) -> float:
        return (10 if group["name"] == "embeddings" else 1) * growth.fan_out / growth.fan_in


@pytest.mark.parametrize("kind", [SGD, Adafactor, Square])
def test_an_optimizer_without_a_rule_is_refused(kind):
    with pytest.raises(
        ValueError, match=rf"^parametrization=mup: {kind.__name__} .* width_multiplier\(group, growth\)"
    ):
        optimize(grown(), kind)


def test_an_optimizer_brings_its_own_rule():
    model = grown(attention=partial(GroupedQueryAttention, n_kv_heads=1))
    optimizer = optimize(model, Ruled)
    rates = by_parameter(model, optimizer, "lr")
    assert rates["blocks.0.attention.q_proj.weight"] == LR
    assert rates["blocks.0.attention.k_proj.weight"] == pytest.approx(LR / 4)  # one head of 8 at both widths
    assert rates["embedding.weight"] == LR  # no hidden matrix: not asked
