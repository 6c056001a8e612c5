"""Where a message belongs."""

import pytest

from thunderhead.core.components import placed


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("max_bytes=5 is too few", "a.b.max_bytes=5 is too few"),
        ("both are false", "a.b: both are false"),
        ("/x=1/y.txt: not UTF-8", "a.b: /x=1/y.txt: not UTF-8"),
        ("a.b.c=1 is known already", "a.b.c=1 is known already"),
        ("a.b: is known already", "a.b: is known already"),
        ("a.bc=1 is another", "a.b: a.bc=1 is another"),
    ],
)
def test_a_path_is_completed(message: str, told: str) -> None:
    assert placed("a.b", message) == told


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Expected more", "activation: Expected more"),
        ("top_k=5 is too many", "activation.top_k=5 is too many"),
        ("activation.top_k=5 is too many", "activation.top_k=5 is too many"),
        ("model.d_ff=64 is odd", "model.d_ff=64 is odd"),
        ("position=rope rotates pairs", "position=rope rotates pairs"),
    ],
)
def test_a_refusal_begins_with_a_path(message: str, told: str) -> None:
    assert placed("activation", message) == told
    assert placed("", message) == message
