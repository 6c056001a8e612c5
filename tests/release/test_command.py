"""`python generate.py run=…`: the model and the tokenizer of a run, read back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.command import generate_text


def test_a_runs_model_goes_on_with_a_prompt(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default")
    asked = [f"run={folder}", "accelerator=cpu", "generation.prompt=def", "generation.max_new_tokens=4"]
    text = generate_text(config.compose(asked, "generate"))
    assert text.startswith("def")
    assert text == generate_text(config.compose(asked, "generate"))


def test_many_prompts_and_a_checkpoint_of_its_own(run: Callable[..., Path], tmp_path: Path) -> None:
    """Greedily each is continued as alone; whatever they are printed as, and the file of a checkpoint will do."""
    folder = run("callbacks=default")
    settings = ["accelerator=cpu", "generation.max_new_tokens=5", "generation.temperature=0.0"]
    (tmp_path / "prompts.txt").write_text("def f(\nclass Word\n\nx\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f("}\n{"prompt": "é\\nb"}\n', encoding="utf-8")

    def made(*overrides: str) -> str:
        checkpoint = config.quoted(str(folder / "checkpoints" / "last.ckpt"))
        return generate_text(config.compose([f"run={checkpoint}", *settings, *overrides], "generate"))

    alone = [made(f"generation.prompt='{prompt}'") for prompt in ("def f(", "class Word", "x")]
    assert made(f"prompts={tmp_path / 'prompts.txt'}") == "\n\n".join(alone)
    lines = [json.loads(line) for line in made(f"prompts={tmp_path / 'prompts.jsonl'}", "json=true").splitlines()]
    assert lines[0] == {"prompt": "def f(", "text": alone[0]}
    assert lines[1]["text"].startswith("é\nb")


@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("empty.txt", " \n"), ("a.jsonl", '{"text": "x"}')])
def test_a_file_without_prompts_is_refused(
    name: str, content: str | None, run: Callable[..., Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    asked = [f"run={run('callbacks=default')}", f"prompts={tmp_path / name}", "accelerator=cpu"]
    with pytest.raises(ConfigError, match=r"prompts: .*a prompt a line"):
        generate_text(config.compose(asked, "generate"))
