import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import randomize
from thunderhead.core.model.feedforward import FeedForward, GatedFeedForward

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish2": lambda x: x / (1 + torch.exp(-2 * x)),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("relu", {"activation": "relu"}),
    ("gelu", {"activation": "gelu"}),
    ("gelu_tanh", {"activation": "gelu", "approximate": "tanh"}),
    ("silu", {"activation": "silu"}),
    ("swish2", {"activation": "silu", "beta": 2.0}),
    ("relu2", {"activation": "relu2"}),
]


@pytest.mark.parametrize(("formula", "settings"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_ungated_equals_its_formula(formula: str, settings: dict[str, Any], bias: bool) -> None:
    layer = FeedForward(8, None, bias, **settings).double()
    randomize(layer)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    weights = dict(layer.named_parameters())
    hidden = x @ weights["up_proj.weight"].T + weights.get("up_proj.bias", torch.zeros(32))
    expected = FORMULAS[formula](hidden) @ weights["down_proj.weight"].T + weights.get("down_proj.bias", torch.zeros(8))
    torch.testing.assert_close(layer(x), expected)
    assert len(weights) == (4 if bias else 2)


@pytest.mark.parametrize(("formula", "settings"), [case for case in CASES if case[0] != "relu2"])
def test_gated_equals_its_formula(formula: str, settings: dict[str, Any]) -> None:
    renamed = {"gate" if name == "activation" else name: value for name, value in settings.items()}
    layer = GatedFeedForward(8, None, False, **renamed).double()
    randomize(layer)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gate, up, down = (projection.weight.T for projection in (layer.gate_proj, layer.up_proj, layer.down_proj))
    torch.testing.assert_close(layer(x), (FORMULAS[formula](x @ gate) * (x @ up)) @ down)


@pytest.mark.parametrize("d_model", [96, 256, 512, 768])
def test_gated_and_ungated_have_the_same_parameters_before_rounding(d_model: int) -> None:
    def count(layer: torch.nn.Module) -> int:
        return sum(p.numel() for p in layer.parameters())

    with torch.device("meta"):
        ungated = count(FeedForward(d_model, None, False, activation="relu"))
        exact = d_model % 3 == 0
        gated = count(GatedFeedForward(d_model, None, False, gate="relu", multiple_of=1 if exact else None))
    assert ungated == 8 * d_model**2
    assert gated == ungated if exact else ungated < gated < 1.01 * ungated


def test_the_hidden_size_is_rounded_up() -> None:
    # Llama 1, 7B: 8/3 · 4096 = 10922.67, rounded up to a multiple of 256
    with torch.device("meta"):
        layer = GatedFeedForward(4096, None, False, gate="silu", multiple_of=256)
        given = GatedFeedForward(4096, 11111, False, gate="silu")
    assert layer.up_proj.out_features == 11008
    assert given.up_proj.out_features == 11111


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu", "beta": 2.0}, "activation.beta=2 is Swish's and needs activation.activation=silu"),
        ({"activation": "relu", "approximate": "tanh"}, "activation.approximate=tanh needs activation.activation=gelu"),
        (
            {"activation": "relu", "hidden_ratio": 4.0},
            "model.d_ff=32 fixes the hidden size, activation.hidden_ratio=4.0",
        ),
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForward(8, 32, False, **settings)


def test_a_rounding_multiple_beside_d_ff_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation.multiple_of=256 would change nothing"):
        GatedFeedForward(8, 32, False, gate="silu", multiple_of=256)
