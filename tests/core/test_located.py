"""Where a message belongs."""

import pytest

from thunderhead.core.config import located


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
    assert located("a.b", message) == told
