"""The composite Muon against torch's two optimizers run apart, and against the formula with exact arithmetic."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from thunderhead.options.muon import Muon

SHAPES = {"matrices": [(12, 20), (20, 12)], "embeddings": [(30, 12)], "vectors": [(12,)]}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, list[nn.Parameter]]:
    random = torch.Generator().manual_seed(0)
    return {
        name: [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
        for name, shapes in SHAPES.items()
    }


def groups(named: dict[str, list[nn.Parameter]]) -> list[dict]:
    no_decay = {"vectors": {"weight_decay": 0.0}}
    return [{"name": name, "params": params} | no_decay.get(name, {}) for name, params in named.items()]


def give_gradients(named: dict[str, list[nn.Parameter]], seed: int) -> None:
    random = torch.Generator().manual_seed(100 + seed)
    for params in named.values():
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


@pytest.mark.parametrize("adamw_lr", [None, 3e-4])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torchs_two_optimizers_bit_for_bit(adjust, adamw_lr):
    ours, theirs = parameters(), parameters()
    optimizer = Muon(groups(ours), lr=2e-3, weight_decay=0.3, adjust_lr_fn=adjust, adamw_lr=adamw_lr)
    muon = torch.optim.Muon(theirs["matrices"], lr=2e-3, weight_decay=0.3, adjust_lr_fn=adjust)
    rest = [{"params": theirs["embeddings"]}, {"params": theirs["vectors"], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=adamw_lr or 2e-3, betas=(0.9, 0.95), weight_decay=0.3)
    schedules = [LambdaLR(o, lambda step: 1 / (step + 1)) for o in (optimizer, muon, adamw)]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for one in (optimizer, muon, adamw):
            one.step()
        for schedule in schedules:
            schedule.step()
    for name in SHAPES:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(a, b), name


def newton_schulz(x: Tensor, a: float = 3.4445, b: float = -4.775, c: float = 2.0315) -> Tensor:
    """Jordan 2024, by its definition: the quintic a·s + b·s³ + c·s⁵, five times, on the singular values; in float64."""
    u, s, vh = torch.linalg.svd(x.double() / x.double().norm(), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def test_formula_over_several_steps():
    named = parameters()
    settings = {"lr": 1e-2, "weight_decay": 0.5, "momentum": 0.9}
    optimizer = Muon(groups(named), **settings)
    expected = [p.detach().double() for p in named["matrices"]]
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(4):
        give_gradients(named, step)
        for i, p in enumerate(named["matrices"]):
            buffers[i] = 0.9 * buffers[i] + 0.1 * p.grad.double()
            nesterov = 0.9 * buffers[i] + 0.1 * p.grad.double()
            scale = 0.2 * max(p.shape) ** 0.5  # match_rms_adamw, 2502.16982 equation 4
            expected[i] = expected[i] * (1 - 1e-2 * 0.5) - 1e-2 * scale * newton_schulz(nesterov)
        optimizer.step()
    for p, start, target in zip(named["matrices"], parameters()["matrices"], expected, strict=True):
        # torch iterates in bfloat16 (8 bits, 0.4 %) and the iteration amplifies that: 3 % of the way made
        way = (target - start.double()).norm()
        assert (p.double() - target).norm() < 0.03 * way


def test_the_update_has_the_rms_of_adamw():
    """match_rms_adamw aims at an RMS of 0.2 of the learning rate (2502.16982 §2.2); the singular values are 0.7-1.2."""
    named = parameters()
    before = [p.detach().clone() for p in named["matrices"]]
    give_gradients(named, 0)
    Muon(groups(named), lr=1.0, weight_decay=0.0).step()
    for p, old in zip(named["matrices"], before, strict=True):
        assert 0.2 * 0.7 < (p - old).square().mean().sqrt().item() < 0.2 * 1.2


def test_one_optimizer_from_outside():
    named = parameters()
    optimizer = Muon(groups(named), lr=1e-3)
    assert [group["name"] for group in optimizer.param_groups] == list(SHAPES)
    give_gradients(named, 0)
    optimizer.step()
    assert set(optimizer.state) == {p for params in named.values() for p in params}
    assert set(optimizer.state[named["matrices"][0]]) == {"momentum_buffer"}
    assert set(optimizer.state[named["vectors"][0]]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.zero_grad()
    assert all(p.grad is None for params in named.values() for p in params)


def test_groups_given_are_not_changed():
    given = groups(parameters())
    Muon(given, lr=1e-3)
    assert given[0].keys() == {"name", "params"}


def test_matrices_that_do_not_decay_go_to_muon_too():
    named = parameters()
    named = {"matrices_no_decay": named["matrices"], "vectors": named["vectors"]}
    optimizer = Muon([{"name": n, "params": p, "weight_decay": 0.0} for n, p in named.items()], lr=1e-3)
    give_gradients(named, 0)
    optimizer.step()
    assert set(optimizer.state[named["matrices_no_decay"][0]]) == {"momentum_buffer"}


def test_matrices_alone_suffice():
    named = {"matrices": parameters()["matrices"]}
    optimizer = Muon(groups(named), lr=1e-3)
    give_gradients(named, 0)
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_without_matrices_it_is_refused():
    named = parameters()
    del named["matrices"]
    with pytest.raises(
        ValueError, match=r"^optimizer: Muon needs a parameter group named matrices .*embeddings, vectors"
    ):
        Muon(groups(named), lr=1e-3)
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        Muon([{"name": "matrices", "params": [nn.Parameter(torch.zeros(2, 3, 4))]}], lr=1e-3)
