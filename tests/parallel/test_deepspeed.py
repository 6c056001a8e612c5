"""DeepSpeed's strategies: what is planned, refused and handed to DeepSpeed; and, where it is installed, the losses."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import Case, train_in_processes
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.parallel.deepspeed import config_of, zero
from thunderhead.training import hardware
from thunderhead.training.fit import _stopped
from thunderhead.training.plan import Plan
from thunderhead.training.planning import plan_run
from thunderhead.training.record import read_rows
from thunderhead.training.resume import find
from tiny import tiny

GPUS = ("trainer.accelerator=gpu", "trainer.devices=2")
installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")


@pytest.fixture
def plan(text_corpus: Path, shards_dir: Path) -> Callable[..., Plan]:
    def plan(*overrides: str) -> Plan:
        lines = tiny(text_corpus, shards_dir, *GPUS, "dry_run=true", *overrides)
        return plan_run(config.plain(config.compose(lines))).plan

    return plan


def test_each_stage_divides_more(plan: Callable[..., Plan]) -> None:
    whole = plan("strategy=ddp", "precision=bf16-mixed").memory
    stages = [plan(f"strategy=deepspeed_zero{n}", "precision=bf16-mixed").memory for n in (1, 2, 3)]
    state = whole["optimizer_state"] + whole["parameters"]  # with float32 master weights
    half = whole["parameters"] // 2  # bfloat16
    assert [memory["optimizer_state"] for memory in stages] == [state // 2] * 3
    assert [memory["gradients"] for memory in stages] == [half, half // 2, half // 2]
    assert [memory["parameters"] for memory in stages] == [half, half, half // 2]
    assert [memory.get("gathered") for memory in stages] == [None, None, half]  # of two blocks, both
    offloaded = plan("strategy=deepspeed_zero1", "strategy.offload_optimizer=true", "precision=bf16-mixed").memory
    assert offloaded.keys() == stages[0].keys() - {"optimizer_state"}


def test_the_plan_says_what_is_different(plan: Callable[..., Plan]) -> None:
    found = plan("strategy=deepspeed_zero2", "compile=auto")
    assert found.compile == "none"
    assert "checkpoints are DeepSpeed's, which resume= does not read" in found.notes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer=muon",), "optimizer: needs whole matrices, and strategy=deepspeed_zero3 keeps"),
        (("optimizer=adafactor",), "optimizer: needs whole matrices"),
        (("precision=bf16-true",), "precision=bf16-true does not go with strategy=deepspeed_zero3"),
        (("trainer.gradient_clip_algorithm=value",), "clips by norm only"),
        (("compile=model",), "compile.scope: was not tried with strategy=deepspeed_zero3: use compile=none"),
        (("resume=run",), "resume: strategy=deepspeed_zero3 reads none but its own checkpoints"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    overrides: tuple[str, ...], message: str, plan: Callable[..., Plan]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan("strategy=deepspeed_zero3", *overrides)
    assert len(refused.value.problems) == 1
    assert message in str(refused.value)


def test_without_the_package_it_is_refused(
    text_corpus: Path, shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "resolve_accelerator", lambda *_: "cuda")
    monkeypatch.setattr(hardware, "device_count", lambda *_: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lines = tiny(text_corpus, shards_dir, "strategy=deepspeed_zero2")
    with pytest.raises(ConfigError) as refused:
        plan_run(config.plain(config.compose(lines)))
    message = "strategy=deepspeed_zero2 needs DeepSpeed: uv pip install -e '.[deepspeed]', or use strategy=fsdp"
    assert [message in problem.message for problem in refused.value.problems] == [True]


def test_parameters_that_are_not_divided_cannot_be_offloaded() -> None:
    with pytest.raises(ValueError, match="ZeRO 2 has copies: use strategy=deepspeed_zero3"):
        zero(2, stage=2, offload_parameters=True)


CONFIGS: list[dict[str, Any]] = [
    config_of(stage, offload, offload and stage == 3, True, 1000) for stage in (1, 2, 3) for offload in (False, True)
]


def test_the_configuration_that_deepspeed_gets() -> None:
    zero = CONFIGS[-1]["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in CONFIGS[0]["zero_optimization"]


@installed
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("settings", CONFIGS)
def test_deepspeed_accepts_the_configuration(settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    more = {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True}}  # Lightning adds it
    accepted = DeepSpeedConfig(settings | more)
    assert accepted.zero_config.stage == settings["zero_optimization"]["stage"]
    assert accepted.zero_config.reduce_bucket_size == 1000


@installed
@pytest.mark.slow
def test_it_trains_as_one_process(
    run: Callable[..., Path], text_corpus: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two CPUs, which DeepSpeed can do, if asked: accumulation, clipping, tied and untied heads."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = ("batch.global_tokens=256", "budget.steps=4", "trainer.gradient_clip_val=0.5")
    choices = {
        "untied": ("activation_checkpointing=block", "optimizer=lion", "model.tie_embeddings=false"),
        "tied": ("callbacks=default",),
    }
    cases = {
        (stage, name): Case(
            tmp_path / f"{stage}-{name}",
            tiny(
                text_corpus, shards_dir, f"strategy=deepspeed_zero{stage}", "trainer.devices=2", *settings, *choice,
                "strategy.overlap_comm=false",
            ),
        )
        for stage in (1, 2, 3)
        for name, choice in choices.items()
    }  # fmt: skip

    def losses(folder: Path) -> list[float]:
        return [float(row["train/loss"]) for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]

    expected = {name: losses(run(*settings, *choice)) for name, choice in choices.items()}
    worker = str(Path(__file__).with_name("deepspeed_worker.py"))
    train_in_processes(2, list(cases.values()), tmp_path / "work", worker)
    for (_, name), case in cases.items():
        assert losses(case.folder) == pytest.approx(expected[name], rel=1e-5)


def test_a_stopped_run_does_not_say_that_it_can_be_gone_on_with(tmp_path: Path) -> None:
    """DeepSpeed's checkpoints are folders, which the run that went on would refuse."""
    trainer: Any = SimpleNamespace(global_step=3)
    assert _stopped(trainer, 9, tmp_path).endswith("no checkpoint was kept")
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    message = "stopped at step 3 of 9; its checkpoints are DeepSpeed's, which resume= does not read"
    assert _stopped(trainer, 9, tmp_path) == message
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"last\.ckpt is DeepSpeed's, which resume= does not read: start a new run"):
        find(str(tmp_path), tmp_path / "new")
