"""Why a job failed, by what it printed."""

from pathlib import Path

import pytest

from thunderhead.lab.execution import last_words

TRACEBACK = """step 1/6  loss 5.2
Traceback (most recent call last):
  File "x.py", line 1, in f
    g()
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in f
    raise
RuntimeError: boom
second line
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.mark.parametrize(("log", "said"), [
    ("", "nothing was printed"),
    ("one\n\ntwo\n\n", "two"),
    (TRACEBACK, "RuntimeError: boom"),
    ("error: 2 problems, nothing was started\n  optimizer.lr is bad\n  x is bad\n", "optimizer.lr is bad"),
    ("error: diverged\n", "error: diverged"),
    (TRACEBACK + "error: the configuration is refused\n  x is bad\n", "x is bad"),
])  # fmt: skip
def test_the_last_words_of_a_log(log: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert last_words(tmp_path / "log.txt") == said
