"""`run=<exported folder>`: text and scores are those of the run; what cannot be read is refused, naming `run`."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.command import generate_text
from thunderhead.release.evaluate import evaluate

TEXT = "Some text, é, that is longer than the context of the model: " * 5


@pytest.fixture
def folder(exported: Path) -> Path:
    return exported


def text_from(place: Path, *overrides: str) -> str:
    return generate_text(config.compose([f"run={place}", "accelerator=cpu", *overrides], "generate"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_that_of_the_run(folder: Path, temperature: float, tmp_path: Path) -> None:
    """Also beyond the context, and of prompts of several lengths."""
    (tmp_path / "prompts.txt").write_text("Some\nlonger than it, é\n", encoding="utf-8")
    asked = [f"generation.temperature={temperature}", "generation.max_new_tokens=40"]
    for prompts in ("generation.prompt=Some", "generation.prompt=''", f"prompts={tmp_path / 'prompts.txt'}"):
        assert text_from(folder, *asked, prompts) == text_from(folder.parent, *asked, prompts)


@pytest.mark.parametrize("stride", [1, 16])
def test_scores_are_those_of_the_run(folder: Path, stride: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")

    def scored(place: Path) -> dict[str, float]:
        asked = [f"run={place}", "data=text", f"data.path={tmp_path / 'a.txt'}", "accelerator=cpu", f"stride={stride}"]
        return evaluate(config.compose(asked, "evaluate"))["text"]

    assert scored(folder) == pytest.approx(scored(folder.parent), rel=1e-6)


def test_scores_are_what_transformers_says(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of documents that fit into the context, of several lengths; also when a row of logits is all that is held."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    monkeypatch.setattr("thunderhead.release.scoring.LOGITS", 1)
    expected = n_tokens = 0
    for name, text in (("a", "Some"), ("b", "another text, é")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        n_tokens += ids.shape[1] - 1
        expected += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
    asked = [f"run={folder}", "data=text", f"data.path={tmp_path}", "accelerator=cpu"]
    found = evaluate(config.compose(asked, "evaluate"))["text"]
    assert found["tokens"] == n_tokens
    assert found["nats"] == pytest.approx(expected, rel=1e-5)


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]  # and the head, which is tied to it
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "SHA256SUMS").unlink()


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damaging", "message"),
    [
        (
            without_a_tensor,
            r"run: .* is damaged, or no exported model \(2 of its weights are missing .* lm_head.weight",
        ),
        (flipped, r"run: .* is damaged, .*model.safetensors is not what SHA256SUMS says"),
        (cut_off, r"run: .* is damaged, or no exported model \("),
        (lambda folder: (folder / "model.safetensors").unlink(), r"run: .* no exported model \(.*model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), r"run: .* no exported model \(.*config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"run: .* no exported model \(.*tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), r"run: .* is no run folder"),
    ],
)
def test_a_damaged_folder_is_refused(
    damaging: Callable[[Path], object], message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damaging(tmp_path / "copy")
    with pytest.raises(ConfigError, match=message) as refused:
        text_from(tmp_path / "copy")
    assert "\n" not in str(refused.value)


def test_there_is_one_checkpoint(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: .* is an exported model, and holds one: give the run"):
        text_from(folder, "checkpoint=best")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"run: .* needs transformers: pip install"):
        text_from(folder)


def test_no_code_of_the_folder_runs(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Model: pass\n")
    content = json.loads((copy / "config.json").read_text())
    named = {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Model"}
    for model_type in ("llama", "unknown"):
        (copy / "config.json").write_text(json.dumps(content | {"auto_map": named, "model_type": model_type}))
        with contextlib.suppress(ConfigError):
            text_from(copy)
    assert not (tmp_path / "marker").exists()
