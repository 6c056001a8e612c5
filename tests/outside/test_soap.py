"""An optimizer from outside of the package, with lists in its state and two learning rates."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from oracles import storages
from outside.soap import SOAP
from thunderhead.core import config
from thunderhead.core.model_spec import ModelSpec
from thunderhead.options.precision import Precision
from thunderhead.parallel.strategies import single
from thunderhead.training import memory
from tiny import tiny

VOCAB = 257
HERE = __file__.rpartition("/")[0]


def resolved(*overrides: str) -> dict[str, Any]:
    lines = tiny("x", "x", f"hydra.searchpath=[file://{HERE}/conf]", "optimizer=soap", *overrides)
    return config.plain(config.compose(lines))


def naive_soap(
    start: NDArray[np.float64], gradients: list[NDArray[np.float64]], node: dict[str, Any], large: int
) -> Any:
    """Algorithm 3 of 2409.11321 for one matrix, entry by entry where Adam is meant; all steps' parameters."""
    (b1, b2), lr, w = node["betas"], node["lr"], start.copy()
    m, n = w.shape
    left = np.zeros((m, m)) + (1 - b2) * gradients[0] @ gradients[0].T
    right = np.zeros((n, n)) + (1 - b2) * gradients[0].T @ gradients[0]
    ql = np.linalg.eigh(left)[1][:, ::-1] if m <= large else np.eye(m)
    qr = np.linalg.eigh(right)[1][:, ::-1] if n <= large else np.eye(n)
    first, second, path = np.zeros((m, n)), np.zeros((m, n)), [w.copy()]
    for t, g in enumerate(gradients[1:], start=1):
        rotated = ql.T @ g @ qr
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * rotated * rotated
        momentum, step = ql.T @ first @ qr, np.zeros((m, n))
        for i in range(m):
            for j in range(n):
                step[i, j] = momentum[i, j] / (1 - b1**t) / (np.sqrt(second[i, j] / (1 - b2**t)) + node["eps"])
        w = (w - lr * ql @ step @ qr.T) * (1 - lr * node["weight_decay"])
        path.append(w.copy())
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t % node["precondition_frequency"] == 0:
            if m <= large:
                order = np.argsort(-np.diag(ql.T @ left @ ql))
                second, ql = second[order], np.linalg.qr(left @ ql[:, order])[0]
            if n <= large:
                order = np.argsort(-np.diag(qr.T @ right @ qr))
                second, qr = second[:, order], np.linalg.qr(right @ qr[:, order])[0]
    return path


# No two sides of unequal length: the longer one's first statistic has eigenvalues of 0, and any basis for them.
@pytest.mark.parametrize(("shape", "large"), [((5, 5), 10), ((4, 6), 5), ((6, 4), 5), ((5, 5), 4)])
def test_formula(shape: tuple[int, int], large: int) -> None:
    node: dict[str, Any] = {
        "lr": 0.1,
        "betas": (0.9, 0.8),
        "eps": 1e-30,
        "weight_decay": 0.3,
        "precondition_frequency": 3,
    }
    draw = np.random.default_rng(0)
    start, gradients = draw.normal(size=shape), [draw.normal(size=shape) for _ in range(10)]
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = SOAP([{"name": "matrices", "params": [parameter]}], **node, max_precondition_size=large)
    expected = naive_soap(start, gradients, node, large)
    for gradient, after in zip(gradients, expected, strict=True):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        # float64 on both sides; small eigenvalues of a first statistic of low rank amplify rounding
        np.testing.assert_allclose(parameter.detach().numpy(), after, rtol=1e-7, atol=1e-9)


def test_embeddings_have_their_own_rate() -> None:
    with torch.device("meta"):
        spec = ModelSpec.of(resolved())
        optimizer = spec.optimizer(spec.decoder(VOCAB, None))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "matrices": 3e-3,
        "embeddings": 1e-3,
        "vectors": 3e-3,
    }


@pytest.mark.parametrize("overrides", [(), ("optimizer.max_precondition_size=64",)])
def test_the_plan_counts_all_of_its_state(overrides: tuple[str, ...]) -> None:
    spec = ModelSpec.of(resolved(*overrides))
    planned = memory.estimate(
        spec.decoder(VOCAB, 0),
        spec.optimizer,
        micro_batch_size=2,
        precision=Precision(kind="fp32"),
        parallelism=single(1),
    )
    decoder = spec.decoder(VOCAB, 0)
    decoder.initialize(0)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = storages()
    optimizer = spec.optimizer(decoder)
    for _ in range(12):  # the basis is renewed at the tenth
        optimizer.step()
    real = sum(n_bytes for address, n_bytes in storages().items() if address not in before)
    assert planned["optimizer_state"] == pytest.approx(real, rel=0.05)
    assert real > 3 * planned["parameters"] or overrides


def test_mup_refuses_it_and_says_what_it_lacks() -> None:
    spec = ModelSpec.of(resolved("parametrization=mup", "parametrization.base_d_model=16"))
    with torch.device("meta"):
        decoder = spec.decoder(VOCAB, None)
    with pytest.raises(ValueError, match=r"^parametrization=mup: .*SOAP.* width_multiplier\(group, growth\)"):
        spec.optimizer(decoder)
