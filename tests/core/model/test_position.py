import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oracles import naive_rotate
from thunderhead.core.model.position import (
    NoPosition,
    rotate,
)
from thunderhead.options.positions import AlibiPosition, LearnedPosition, ScaledRotaryPosition, SinusoidalPosition

CPU = torch.device("cpu")


def rotary(**settings: Any) -> ScaledRotaryPosition:
    return ScaledRotaryPosition(64, **settings)


def hugging_face_frequencies(rope_type: str, **parameters: float) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": rope_type, "rope_theta": 500000.0, **parameters},
    )
    frequencies, attention_scale = ROPE_INIT_FUNCTIONS[rope_type](config, CPU)
    assert attention_scale == 1.0
    return frequencies


def test_frequencies_are_the_papers() -> None:
    expected = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(rotary().frequencies(CPU), expected)


def test_llama3_scaling_equals_transformers() -> None:
    ours = rotary(theta=500000.0, scaling="llama3", factor=32.0)
    theirs = hugging_face_frequencies(
        "llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    torch.testing.assert_close(ours.frequencies(CPU), theirs, rtol=1e-5, atol=0)  # a few float32 roundings


def test_llama3_scaling_with_other_factors_equals_transformers() -> None:
    ours = rotary(
        theta=500000.0,
        scaling="llama3",
        factor=4.0,
        low_freq_factor=2.0,
        high_freq_factor=9.0,
        original_context_length=512,
    )
    theirs = hugging_face_frequencies(
        "llama3", factor=4.0, low_freq_factor=2.0, high_freq_factor=9.0, original_max_position_embeddings=512
    )
    torch.testing.assert_close(ours.frequencies(CPU), theirs, rtol=1e-5, atol=0)


def test_linear_scaling_equals_transformers() -> None:
    theirs = hugging_face_frequencies("linear", factor=4.0)
    torch.testing.assert_close(rotary(theta=500000.0, scaling="linear", factor=4.0).frequencies(CPU), theirs)


def test_ntk_scaling_keeps_the_highest_and_interpolates_the_lowest_frequency() -> None:
    # What the NTK-aware base is chosen for: the first pair is untouched, the last slowed down by exactly the factor.
    plain, scaled = rotary().frequencies(CPU), rotary(scaling="ntk", factor=8.0).frequencies(CPU)
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 8, rel=1e-5)


def test_rotation_equals_complex_multiplication() -> None:
    position = rotary()
    position_ids = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    x = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    expected = naive_rotate(x, position_ids, position.frequencies(CPU))
    exact = rotate(x, position.rotation(position_ids, torch.float64))
    theirs = naive_rotate(x, position_ids, position.frequencies(CPU, torch.float64))
    torch.testing.assert_close(exact, theirs, rtol=1e-12, atol=1e-12)
    rotated = rotate(x.float(), position.rotation(position_ids))
    torch.testing.assert_close(rotated.double(), expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_a_fraction_rotates_the_first_dimensions_only() -> None:
    position = rotary(fraction=0.25)
    position_ids = torch.arange(5)[None]
    x = torch.randn(2, 3, 5, 64)
    rotated = rotate(x, position.rotation(position_ids))
    assert torch.equal(rotated[..., 16:], x[..., 16:])
    expected = naive_rotate(x[..., :16].double(), position_ids, 10000 ** -(torch.arange(0, 16, 2).double() / 16))
    torch.testing.assert_close(rotated[..., :16].double(), expected, rtol=1e-5, atol=1e-5)


def test_rotation_of_bfloat16_is_rounded_once() -> None:
    rotation = rotary().rotation(torch.arange(5)[None])
    x = torch.randn(2, 3, 5, 64).bfloat16()
    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 2.0}, r"position.factor=2 changes nothing with position.scaling=none"),
        ({"scaling": "linear"}, r"position.scaling=linear needs position.factor"),
        ({"scaling": "ntk", "factor": 2.0, "low_freq_factor": 1.0}, r"low_freq_factor, .* are for .*llama3 only"),
        ({"scaling": "llama3", "factor": 2.0, "low_freq_factor": 5.0}, r"low_freq_factor=5 must be below"),
        ({"fraction": 0.05}, r"position.fraction=0.05 = 3 must be a positive even number"),
    ],
)
def test_refused_rotary_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(**settings)


def test_alibi_slopes_of_a_power_of_two() -> None:
    # 2108.12409, section 3: for 8 heads 1/2, 1/4, …, 1/256
    slopes = AlibiPosition(8).slopes(CPU)
    assert slopes.tolist() == [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize("n_heads", [1, 3, 6, 12, 25])
def test_alibi_slopes_of_any_number_of_heads(n_heads: int) -> None:
    def authors(n: int) -> list[float]:  # the recursion of the authors' get_slopes
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        closest = 2 ** math.floor(math.log2(n))
        return authors(closest) + authors(2 * closest)[0::2][: n - closest]

    slopes = AlibiPosition(n_heads).slopes(CPU)
    torch.testing.assert_close(slopes, torch.tensor(authors(n_heads)))


@pytest.mark.parametrize("scale_embedding", [True, False])
def test_sinusoids_equal_the_papers_formula(scale_embedding: bool) -> None:
    position_ids = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    x = torch.randn(2, 4, 64).double()
    expected = x * 8 if scale_embedding else x.clone()
    for b in range(2):
        for t in range(4):
            for i in range(32):
                angle = position_ids[b, t].item() / 10000 ** (2 * i / 64)
                expected[b, t, 2 * i] += math.sin(angle)
                expected[b, t, 2 * i + 1] += math.cos(angle)
    position = SinusoidalPosition(64, scale_embedding=scale_embedding)
    torch.testing.assert_close(position.embed(x, position_ids), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(position.embed(x.float(), position_ids).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_odd_width_has_no_sinusoids() -> None:
    with pytest.raises(ValueError, match="d_model=63 must be even"):
        SinusoidalPosition(63)


def test_learned_positions_are_looked_up() -> None:
    position = LearnedPosition(64, 32)
    position_ids = torch.tensor([[0, 1, 0, 31]])
    embedded = position.embed(torch.ones(1, 4, 64), position_ids)
    torch.testing.assert_close(embedded, 1 + position.embedding.weight[[0, 1, 0, 31]][None])


def test_no_position_changes_nothing() -> None:
    position, x = NoPosition(), torch.randn(1, 4, 64)
    assert position.embed(x, torch.arange(4)[None]) is x
    assert position.rotation(torch.arange(4)[None]) is None
    assert position.slopes(CPU) is None
