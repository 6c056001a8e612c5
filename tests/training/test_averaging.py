"""callbacks=ema and lawa: the average is the formula's, also after a resume; it is validated, and can be exported."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thunderhead.core import config
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.core.module import LanguageModel
from thunderhead.release.evaluate import evaluate
from thunderhead.release.export import export
from thunderhead.training.record import read_rows
from tiny import plan_of, tiny, train_here

SETTINGS = (
    *("callbacks=ema", "callbacks.average.decay=0.6", "callbacks.checkpoint.every_n_train_steps=1"),
    *("callbacks.checkpoint.save_top_k=-1", "budget.steps=4", "validation.every=2"),
    *("optimizer.lr=0.02", "dropout=gpt2"),
)


def weights_of(checkpoint: Path, key: str) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint, weights_only=True)[key]
    return {name: tensor for name, tensor in content.items() if name.startswith("decoder.")}


@pytest.fixture(scope="module")
def trained(text_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("averaged")
    train_here(tiny(text_corpus, run_dir / "shards", *SETTINGS), run_dir)
    return run_dir


def test_the_average_is_that_of_the_formula(trained: Path) -> None:
    """Of the weights after each step; the first one is of the step's own decay, (1 + 1) / (10 + 1)."""
    files = [trained / "checkpoints" / f"step-{step}.ckpt" for step in range(1, 5)]
    average = weights_of(files[0], "averaged")
    for step, file in enumerate(files[1:], start=2):
        decay, weights = min(0.6, (1 + step) / (10 + step)), weights_of(file, "state_dict")
        average = {name: decay * tensor + (1 - decay) * weights[name] for name, tensor in average.items()}
        for name, tensor in weights_of(file, "averaged").items():
            torch.testing.assert_close(tensor, average[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(average["decoder.embedding.weight"], weights["decoder.embedding.weight"])


def test_it_is_validated_beside_the_weights(trained: Path, text_corpus: Path) -> None:
    """By the loss that a model of these weights has on the same text."""
    columns, rows = read_rows(trained / "metrics.csv")
    assert "val/loss_averaged" in columns
    summary = read_mapping(trained / "summary.json")
    assert float(rows[-1]["val/loss_averaged"]) == pytest.approx(summary["loss_averaged"], rel=1e-6)
    assert summary["loss_averaged"] != pytest.approx(summary["val_loss"], rel=1e-4)

    def scored(averaged: bool) -> float:
        asked = [f"run={trained}", f"averaged={averaged}", "accelerator=cpu"]
        text = ["data=text", f"data.path={text_corpus / '000.txt'}"]
        return evaluate(config.compose([*asked, *text], "evaluate"))["text"]["loss"]

    gap = summary["loss_averaged"] - summary["val_loss"]
    assert (scored(True) - scored(False)) * gap > 0


def test_a_resumed_run_has_the_same_average(trained: Path, text_corpus: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    for file in (run_dir / "checkpoints").glob("*.ckpt"):
        if file.name != "step-2.ckpt":
            file.unlink()
    (run_dir / "summary.json").unlink()
    train_here([*tiny(text_corpus, trained / "shards", *SETTINGS), f"resume={run_dir}"], tmp_path / "new")
    for key in ("state_dict", "averaged"):
        before, after = (weights_of(each / "checkpoints" / "last.ckpt", key) for each in (trained, run_dir))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), key


def test_the_mean_of_the_last_k_is_theirs_also_after_a_resume(text_corpus: Path, tmp_path: Path) -> None:
    """Of the snapshots after steps 2, 4 and 6, the last two; resumed between them; validated and exported."""
    settings = [*SETTINGS[2:], "callbacks=lawa", "callbacks.average.k=2", "callbacks.average.every=2", "budget.steps=6"]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train_here(tiny(text_corpus, tmp_path / "shards", *settings, "validation.every=1"), run_dir)
    made, files = run_dir / "checkpoints", [f"step-{step}.ckpt" for step in range(1, 7)]
    assert weights_of(made / files[0], "averaged") == {}
    for ends in ((2,), (2, 4), (4, 6)):
        each = [weights_of(made / f"step-{step}.ckpt", "state_dict") for step in ends]
        for file in files[ends[-1] - 1 : ends[-1] + 1]:
            for name, tensor in weights_of(made / file, "averaged").items():
                torch.testing.assert_close(tensor, sum(weights[name] for weights in each) / len(each))
    _, rows = read_rows(run_dir / "metrics.csv")
    losses = [(float(row["val/loss"]), row["val/loss_averaged"]) for row in rows if row["val/loss"]]
    assert losses[0][1] == ""
    assert float(losses[1][1]) == pytest.approx(losses[1][0], rel=1e-6)  # of one snapshot: the weights
    assert float(losses[5][1]) != pytest.approx(losses[5][0], rel=1e-6)
    before = torch.load(made / "last.ckpt", weights_only=True)
    for file in {*made.glob("*.ckpt")} - {made / "step-5.ckpt"}:
        file.unlink()
    (run_dir / "summary.json").unlink()
    train_here([*tiny(text_corpus, tmp_path / "shards", *settings), f"resume={run_dir}"], tmp_path / "new")
    after = torch.load(made / "last.ckpt", weights_only=True)
    for one, two in zip(
        [before["averaged"], *before["averaged_latest"]], [after["averaged"], *after["averaged_latest"]], strict=True
    ):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    export(config.compose([f"run={run_dir}", "averaged=true", f"out={tmp_path / 'out'}"], "export"))
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, before["averaged"]["decoder.final_norm.weight"])


@pytest.mark.usefixtures("memory_is_counted")
def test_the_plan_counts_the_copies(text_corpus: Path, tmp_path: Path) -> None:
    def planned(*overrides: str) -> dict[str, int]:
        return plan_of(config.plain(config.compose(tiny(text_corpus, tmp_path, *overrides)))).memory

    plain = planned("callbacks=default")
    assert planned("callbacks=ema") == plain | {"averages": plain["parameters"]}
    assert planned("callbacks=lawa", "callbacks.average.k=3") == plain | {"averages": 4 * plain["parameters"]}


def test_it_is_exported_when_asked_for(trained: Path, tmp_path: Path) -> None:
    out = export(config.compose([f"run={trained}", "averaged=true", f"out={tmp_path / 'out'}"], "export"))
    average = weights_of(trained / "checkpoints" / "last.ckpt", "averaged")["decoder.final_norm.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["model.norm.weight"], average)
    with pytest.raises(ConfigError, match=r"averaged: .* is an exported model, and has what was exported"):
        evaluate(config.compose([f"run={out}", "averaged=true", "data=text", f"data.path={out}"], "evaluate"))


def test_what_cannot_be_averaged(text_corpus: Path, tmp_path: Path, exported: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks: averaged weights are whole, and strategy=fsdp divides them"):
        plan_of(config.plain(config.compose(tiny(text_corpus, tmp_path, "callbacks=ema", "strategy=fsdp"))))
    both = ("callbacks=ema", "+callbacks.other={_target_: thunderhead.training.callbacks.averaging.AverageLatest}")
    with pytest.raises(ConfigError, match=r"^callbacks: average and other both average the weights"):
        plan_of(config.plain(config.compose(tiny(text_corpus, tmp_path, *both))))
    with pytest.raises(ValueError, match=r"^averaged=true: .* holds no averaged weights"):
        LanguageModel.load_from_checkpoint(exported.parent / "checkpoints" / "last.ckpt", averaged=True)
    with pytest.raises(ConfigError, match=r"^averaged=true: .* holds no averaged weights"):
        export(config.compose([f"run={exported.parent}", "averaged=true", f"out={tmp_path / 'out'}"], "export"))
