"""examples/finetune.py learns from instructions on an exported model, and leaves a folder that generate.py reads."""

import json
import runpy
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.release.command import generate_text
from thunderhead.training.record import REPOSITORY


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_finetuning(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(REPOSITORY / "examples" / "finetune.py"))["main"]
    found = main([str(exported), str(tmp_path / "out"), "--steps=40", "--batch-size=4", "--held-out=2", "--lr=0.01"])
    assert found["after"]["loss"] < 0.9 * found["before"]["loss"]
    assert json.loads((tmp_path / "out" / "finetuning.json").read_text()) == found
    asked = [f"run={tmp_path / 'out'}", "accelerator=cpu", "generation.max_new_tokens=4", "generation.temperature=0"]
    assert generate_text(config.compose([*asked, f"generation.prompt={config.quoted(found['prompt'])}"], "generate"))
