"""Adafactor against algorithms 4 and 5 of Shazeer & Stern 1804.04235 and against torch's own."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from thunderhead.options.adafactor import Adafactor

SHAPES = [(6, 9), (9, 6), (1, 7), (7, 1), (5,), (2, 3, 4)]


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(shape))
    return [scale * torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(steps)]


def train(cls: type, start: Tensor, grads: list[Tensor], **settings: object) -> Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = cls([parameter], **settings)
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def paper(x: Tensor, grads: list[Tensor], lr: float, d: float, weight_decay: float) -> Tensor:
    """Algorithm 4 (matrices: sums R over columns and C over rows, V = R·C / sum R) and 5 (vectors), in float64."""
    r = c = v = torch.zeros(())
    for t, g in enumerate(grads, start=1):
        beta2 = 1 - t**-0.8
        if g.ndim == 2:
            r = beta2 * r + (1 - beta2) * (g**2 + 1e-30).sum(1)
            c = beta2 * c + (1 - beta2) * (g**2 + 1e-30).sum(0)
            estimate = torch.outer(r, c) / r.sum()
        else:
            estimate = v = beta2 * v + (1 - beta2) * (g**2 + 1e-30)
        u = g / estimate.sqrt()
        u = u / max(1.0, float(rms(u)) / d)
        alpha = max(1e-3, float(rms(x))) * min(lr, t**-0.5)
        x = x * (1 - lr * weight_decay) - alpha * u
    return x


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5,)])
@pytest.mark.parametrize(("lr", "d", "weight_decay"), [(1e-2, 1.0, 0.0), (0.9, 1.0, 0.1), (1e-2, 1.5, 0.5)])
def test_paper(shape, lr, d, weight_decay):
    # lr = 0.9 is capped by 1/sqrt(t) from the second step on
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = gradients(shape, 10, torch.float64)
    ours = train(Adafactor, start, grads, lr=lr, d=d, weight_decay=weight_decay, eps=(1e-15, 1e-3))
    torch.testing.assert_close(ours, paper(start, grads, lr, d, weight_decay), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"lr": 0.5, "weight_decay": 0.1, "d": 2.0, "eps": (1e-2, 0.3)}])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_torch(shape, settings, scale):
    start = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        train(cls, start, gradients(shape, 8, torch.float32, scale), **settings)
        for cls in (Adafactor, torch.optim.Adafactor)
    )
    # float32 in another order of operations: a few units in the last place (6e-8) over 8 steps
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    assert scale == 0 or not torch.allclose(ours, start, rtol=2e-6, atol=1e-6)


def test_a_state_of_torch_continues():
    start, grads = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), gradients((4, 3), 6, torch.float32)
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    theirs, ours = torch.optim.Adafactor(parameters[:1]), Adafactor(parameters[1:])
    for step, gradient in enumerate(grads):
        parameters[0].grad, parameters[1].grad = gradient.clone(), gradient.clone()
        theirs.step()
        if step == 2:
            ours.load_state_dict(deepcopy(theirs.state_dict()))  # torch goes on in place
            parameters[1].data.copy_(parameters[0].data)
        elif step > 2:
            ours.step()
    torch.testing.assert_close(parameters[1], parameters[0], rtol=1e-6, atol=1e-7)


def test_bfloat16_parameters_keep_float32_state_and_it_survives_loading():
    parameter = nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = Adafactor([parameter])
    for gradient in gradients((8, 4), 3, torch.bfloat16):
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(state, torch.float32)
    assert not torch.equal(state["row_var"], state["row_var"].bfloat16()), "or the next assertion would prove nothing"
    loaded = Adafactor([parameter])
    loaded.load_state_dict(optimizer.state_dict())
    for key, value in state.items():
        assert torch.equal(loaded.state[parameter][key], value)
        assert loaded.state[parameter][key].dtype == torch.float32


def test_a_closure_is_evaluated_with_gradients():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Adafactor([parameter])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (parameter < 1).all()
