"""Every option of the optimizer group, with the settings as shipped, against its paper's formula in float64.

Muon and Adafactor have test files of their own; what holds for all five options is here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from thunderhead.core.components import check, factory

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
STEPS = 12


def shipped(option: str, **changes: Any) -> dict[str, Any]:
    node = yaml.safe_load((CONF / "optimizer" / f"{option}.yaml").read_text())
    assert set(changes) <= set(node)
    return node | changes


def run(node: dict[str, Any], start: Tensor, gradients: list[Tensor], factors: list[float]) -> list[Tensor]:
    """The parameter after each step, with a schedule."""
    parameter = nn.Parameter(start.clone())
    optimizer = factory(node)([{"name": "matrices", "params": [parameter]}])
    path = []
    for gradient, factor in zip(gradients, factors, strict=True):
        optimizer.param_groups[0]["lr"] = node["lr"] * factor
        parameter.grad = gradient.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def adamw(node: dict[str, Any], p: Tensor, gradients: list[Tensor], factors: list[float]) -> list[Tensor]:
    """Loshchilov & Hutter 1711.05101, algorithm 2, with lr·weight_decay as the decay (as everyone has it since)."""
    (b1, b2), m, v, path = node["betas"], torch.zeros_like(p), torch.zeros_like(p), []
    for t, (g, factor) in enumerate(zip(gradients, factors, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + node["eps"])
        p = p - factor * node["lr"] * (step + node["weight_decay"] * p)
        path.append(p)
    return path


def lion(node: dict[str, Any], p: Tensor, gradients: list[Tensor], factors: list[float]) -> list[Tensor]:
    """Chen et al. 2302.06675, algorithm 2."""
    (b1, b2), m, path = node["betas"], torch.zeros_like(p), []
    for g, factor in zip(gradients, factors, strict=True):
        c = b1 * m + (1 - b1) * g
        decay = node["weight_decay"] / (factor * node["lr"] / factor if node["decoupled_weight_decay"] else 1)
        p = p - factor * node["lr"] * (torch.sign(c) + decay * p)
        m = b2 * m + (1 - b2) * g
        path.append(p)
    return path


def sgd(node: dict[str, Any], p: Tensor, gradients: list[Tensor], factors: list[float]) -> list[Tensor]:
    """Sutskever et al. 2013 in torch's form (the learning rate outside of the momentum), with L2 weight decay."""
    velocity, path = torch.zeros_like(p), []
    for t, (gradient, factor) in enumerate(zip(gradients, factors, strict=True)):
        g = gradient + node["weight_decay"] * p
        velocity = node["momentum"] * velocity + (1 - node["dampening"] if t else 1) * g
        p = p - factor * node["lr"] * (g + node["momentum"] * velocity if node["nesterov"] else velocity)
        path.append(p)
    return path


@pytest.mark.parametrize(
    ("formula", "changes"),
    [
        (adamw, {}),
        (adamw, {"betas": [0.5, 0.8], "eps": 0.1, "weight_decay": 2.0, "fused": False}),
        (lion, {}),
        (lion, {"betas": [0.95, 0.98], "weight_decay": 0.1, "decoupled_weight_decay": True}),
        (sgd, {}),
        (sgd, {"weight_decay": 0.3, "nesterov": True}),
        (sgd, {"momentum": 0.5, "dampening": 0.25, "fused": True}),
    ],
)
@pytest.mark.parametrize("shape", [(5, 7), (6,)])
def test_formula(formula, changes, shape):
    random = torch.Generator().manual_seed(len(shape))
    start = torch.randn(shape, generator=random, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(STEPS)]
    factors = [0.5, 1.0] + [0.9**i for i in range(STEPS - 2)]
    node = shipped(formula.__name__, **changes)
    # float64 on both sides; 12 steps of rounding stay far below 1e-12
    for ours, expected in zip(
        run(node, start, gradients, factors), formula(node, start, gradients, factors), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_option_passes_the_check_and_learns(option):
    """Least squares with a matrix and a vector: 60 steps at the shipped learning rate lower the loss."""
    node = shipped(option)
    assert check({"optimizer": node}) == []
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    x, target = torch.randn(64, 16), torch.randn(64, 8)
    optimizer = factory(node)(
        [
            {"name": "matrices", "params": [layer.weight]},
            {"name": "vectors", "params": [layer.bias], "weight_decay": 0.0},
        ]
    )
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.999
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_saved_optimizer_continues_bit_for_bit(option, tmp_path):
    """Saved after 3 steps through weights_only, loaded into a new optimizer that has already taken a step."""

    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(1)
        layer = nn.Linear(6, 4)
        groups = [
            {"name": "matrices", "params": [layer.weight]},
            {"name": "vectors", "params": [layer.bias], "weight_decay": 0.0},
        ]
        return layer, factory(shipped(option))(groups)

    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            for p in layer.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.step()

    layer, optimizer = build()
    steps(layer, optimizer, range(3))
    torch.save({"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    steps(layer, optimizer, range(3, 6))

    resumed, other = build()
    steps(resumed, other, range(90, 91))
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["layer"])
    other.load_state_dict(saved["optimizer"])
    steps(resumed, other, range(3, 6))
    for ours, expected in zip(resumed.parameters(), layer.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("option", OPTIONS)
def test_loss_scaling(option):
    """fp16-mixed: under a GradScaler a step is the unscaled step, and a step with an infinite gradient is skipped."""

    def build() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        return parameter, factory(shipped(option))([{"name": "matrices", "params": [parameter]}])

    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain, optimizer = build()
    plain.grad = gradient.clone()
    optimizer.step()

    scaled, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for bad in (True, False):
        loss = (scaled * gradient).sum() * (float("inf") if bad else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    # a power of two scales exactly, so the gradients are equal; fused kernels may round their own division otherwise
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
