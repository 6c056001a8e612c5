"""`python generate.py run=…`: the model and the tokenizer of a run, read back."""

from collections.abc import Callable
from pathlib import Path

from thunderhead.core import config
from thunderhead.release.command import generate_text


def test_a_runs_model_goes_on_with_a_prompt(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default")
    asked = [f"run={folder}", "accelerator=cpu", "generation.prompt=def", "generation.max_new_tokens=4"]
    text = generate_text(config.compose(asked, "generate"))
    assert text.startswith("def")
    assert text == generate_text(config.compose(asked, "generate"))
