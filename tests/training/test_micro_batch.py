"""batch.micro_size=auto: by the estimate, and by trials on a device whose memory is made up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.model.decoder import Decoder
from thunderhead.parallel import launch
from thunderhead.parallel.deepspeed import zero
from thunderhead.parallel.strategies import Parallelism, ddp, fsdp, single, tensor_parallel
from thunderhead.training import hardware, micro_batch
from thunderhead.training.micro_batch import Trial, by_estimate, largest, sizes, trains
from thunderhead.training.record import read_json, read_rows
from tiny import tiny, train_here

MIB = 2**20
TRIAL = Trial(precision="fp32", vocab_size=257, eos_id=256, accelerator="cpu")


def resolved(*overrides: str) -> dict[str, Any]:
    return config.plain(config.compose(tiny("x", "x", *overrides)))


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]


@pytest.mark.parametrize(
    ("sequences", "expected"), [(1, [1]), (8, [1, 2, 4, 8]), (12, [1, 2, 4]), (7, [1]), (96, [1, 2, 4, 8, 16, 32])]
)
def test_sizes_are_the_powers_of_two_that_divide_the_batch(sequences: int, expected: list[int]) -> None:
    assert sizes(sequences) == expected


@pytest.mark.parametrize(("limit", "expected", "tried"), [(0, None, [1]), (5, 4, [1, 2, 4, 8]), (99, 8, [1, 2, 4, 8])])
def test_sizes_are_tried_until_one_does_not_fit(limit: int, expected: int | None, tried: list[int]) -> None:
    seen = []

    def fits(size: int) -> bool:
        seen.append(size)
        return size <= limit

    assert largest([1, 2, 4, 8], fits) == expected
    assert seen == tried


def test_the_estimate_decides_and_says_why() -> None:
    def needs(size: int) -> dict[str, int]:
        return {"parameters": 100 * MIB, "activations": size * 100 * MIB}

    all_fit = by_estimate(8, needs, 900 * MIB, "of a test")
    assert all_fit.size == 8
    assert (
        all_fit.why
        == "by the estimate it needs 0.88 GiB of 0.88 GiB, of a test; more do not divide the 8 sequences of a step"
    )
    some = by_estimate(8, needs, 899 * MIB, "of a test")
    assert some.size == 4
    assert some.why == "by the estimate it needs 0.49 GiB of 0.88 GiB, of a test; 8 would need 0.88 GiB"
    with pytest.raises(ValueError, match=r"^batch.micro_size=auto: even one sequence needs about 0.20 GiB of 0.19 GiB"):
        by_estimate(8, needs, 199 * MIB, "of a test")
    with pytest.raises(ValueError, match=r"activations cannot be estimated.*: write a number$"):
        by_estimate(8, lambda size: {"parameters": 1}, 199 * MIB, "of a test")


def test_only_whole_models_on_cuda_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(accelerator: str, parallelism: Parallelism) -> bool:
        return micro_batch.is_tried(accelerator, parallelism)

    assert tried("cuda", single(1))
    assert tried("cuda", ddp(4))
    assert not tried("cuda", fsdp(4))
    assert not tried("cuda", tensor_parallel(2))
    assert not any(tried("cuda", zero(2, stage=stage)) for stage in (1, 2, 3))  # type: ignore[arg-type]
    assert not tried("cpu", single(1))
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 8 * 2**30)
    assert micro_batch.usable_memory("cpu", 2, 0) == (
        2 * 2**30,
        "50% of this host's free memory for each of 2 processes",
    )
    assert micro_batch.usable_memory("cuda", 1, 10 * 2**30)[0] == 9 * 2**30


# --------------------------------------------------------------------------------------------------------------------
# Trials


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """small_device(n): more than n sequences at once are out of memory; returns the list of sizes that were run."""

    def limit(n: int) -> list[int]:
        seen: list[int] = []
        forward = Decoder.forward

        def limited(self: Decoder, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> Any:
            seen.append(len(tokens_BT))
            terms = forward(self, tokens_BT, targets_BT)
            if len(tokens_BT) > n:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return terms

        monkeypatch.setattr(Decoder, "forward", limited)
        return seen

    return limit


@pytest.mark.parametrize("choice", [(), ("optimizer=muon", "dropout=gpt2", "activation_checkpointing=selective")])
def test_a_trial_trains_real_steps_and_leaves_nothing(
    small_device: Callable[[int], list[int]], choice: tuple[str, ...]
) -> None:
    seen = small_device(4)
    settings = resolved(*choice)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert largest([1, 2, 4, 8, 16], lambda size: trains(settings, size, TRIAL)) == 4
    assert seen == [1, 1, 2, 2, 4, 4, 8]  # the second step has the optimizer's state
    assert torch.equal(torch.get_rng_state(), before)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Decoder, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        trains(resolved(), 1, TRIAL)


def test_trials_run_in_a_process_of_their_own() -> None:
    request = {"config": resolved(), "sizes": [1, 2, 4], "devices": [0, 1], **TRIAL._asdict()}
    request.pop("device")
    done = subprocess.run(
        [sys.executable, "-m", "thunderhead.training.micro_batch"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [4, 4]


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("[4, 2]", 0, "2: 4 was out of memory with 90% of the device"),
        ("[8, 8]", 0, "8: tried on the device; more do not divide the 8 sequences"),
        ("[4, null]", 0, "even one sequence does not fit: use a smaller model"),
        ("", 1, "the trial failed, write a number: last words"),
    ],
)
def test_all_devices_take_what_fits_on_the_smallest(printed: str, status: int, expected: str) -> None:
    done = subprocess.CompletedProcess([], status, stdout=printed, stderr="Traceback\nlast words\n")
    with patch.object(subprocess, "run", return_value=done) as started:
        try:
            choice = micro_batch.by_trial({}, 8, [0, 1], precision="fp32", vocab_size=257, eos_id=256)
            said = f"{choice.size}: {choice.why}"
        except ValueError as error:
            said = str(error)
    assert expected in said
    assert json.loads(started.call_args.kwargs["input"])["sizes"] == [1, 2, 4, 8]


# --------------------------------------------------------------------------------------------------------------------
# Runs


SETTINGS = ("dropout=gpt2", "batch.global_tokens=256", "budget.steps=3")  # 8 sequences a step


@pytest.fixture
def by_hand(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with micro-batches of 4, on a host that has just enough memory for them."""
    folder = run(*SETTINGS, "batch.micro_size=4")
    needed = sum(read_json(folder / "plan.json")["memory"].values())
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2 * needed + 1000)
    return folder


def test_a_run_finds_it_and_its_losses_are_those_of_the_number(
    by_hand: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    found = run(*SETTINGS, "batch.micro_size=auto")
    assert capsys.readouterr().out.count("batch.micro_size=auto: 4: by the estimate it needs") == 1
    assert losses(found) == losses(by_hand)
    plan = read_json(found / "plan.json")
    assert (plan["micro_batch_size"], plan["accumulation"]) == (4, 2)
    assert len([note for note in plan["notes"] if note.startswith("batch.micro_size=auto: 4")]) == 1
    assert "micro_size: auto" in (found / "config.yaml").read_text()  # so that arms of a sweep stay alike


def test_a_resumed_run_keeps_it(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2**40)
    with patch.object(config, "invocation_overrides", lambda: ["budget.steps=4"]):
        train_here([f"resume={found}"], tmp_path / "new")
    plan = read_json(found / "plan.json")
    assert (plan["micro_batch_size"], plan["steps"]) == (4, 4)
    assert "micro_size: auto" in (found / "config.yaml").read_text()
    assert len(losses(found)) == 4


def test_a_run_resumed_on_more_ranks_finds_it_anew(
    by_hand: Path, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks have two sequences each, not four."""
    found = run(*SETTINGS, "batch.micro_size=auto", "callbacks=default", "callbacks.checkpoint.every_n_train_steps=1")
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 2**40)
    launched: list[int] = []

    def launch_(settings: dict[str, Any], run_dir: Path, n: int) -> dict[str, Any]:
        launched.append(settings["batch"]["micro_size"])
        return {"val_loss": 1.0}

    monkeypatch.setattr(launch, "launch", launch_)
    for devices in (2, 4):
        overrides = ["budget.steps=4", f"trainer.devices={devices}"]
        with patch.object(config, "invocation_overrides", lambda overrides=overrides: overrides):
            train_here([f"resume={found}"], tmp_path / "new")
    assert launched == [4, 2]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        patch.object(config, "invocation_overrides", lambda: overrides),
        pytest.raises(ConfigError, match=r"^batch\.micro_size: auto cannot be agreed on by processes that torchrun"),
    ):
        train_here([f"resume={found}"], tmp_path / "new")


def test_a_dry_run_says_what_would_be_taken(
    by_hand: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run(*SETTINGS, "batch.micro_size=auto", "dry_run=true")
    assert "batch.micro_size=auto: 4" in capsys.readouterr().out
    run(*SETTINGS, "batch.micro_size=auto", "dry_run=true", "trainer=gpu")
    said = " ".join(capsys.readouterr().out.split())
    assert "batch.micro_size=auto: 8: by the estimate" in said
    assert "the run tries 1, 2, 4, 8 on the device until memory runs out" in said


def test_what_was_tried_is_what_is_trained_and_launched(
    by_hand: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Any] = []

    def by_trial(settings: dict[str, Any], sequences: int, devices: Any, **model: Any) -> micro_batch.Choice:
        tried.append((sequences, list(devices), model))
        return micro_batch.Choice(2, "as a test has it")

    monkeypatch.setattr(micro_batch, "is_tried", lambda *_: True)
    monkeypatch.setattr(micro_batch, "by_trial", by_trial)
    folder = run(*SETTINGS, "batch.micro_size=auto")
    assert read_json(folder / "plan.json")["micro_batch_size"] == 2
    assert "batch.micro_size=auto: 2: as a test has it" in capsys.readouterr().out
    launched: list[dict[str, Any]] = []

    def launch_(settings: dict[str, Any], run_dir: Path, n: int) -> dict[str, Any]:
        launched.append(settings)
        return {"val_loss": 1.0}

    monkeypatch.setattr(launch, "launch", launch_)
    run(*SETTINGS, "batch.micro_size=auto", "trainer.devices=2", "strategy=ddp")
    assert launched[0]["batch"]["micro_size"] == 2
    model = {"precision": "fp32", "vocab_size": 257, "eos_id": 256}
    assert tried == [(8, [0], model), (4, [0, 1], model)]


def test_what_cannot_be_found_is_refused(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^batch\.micro_size=auto: even one sequence needs about"):
        run(*SETTINGS, "batch.micro_size=auto")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: 'automatic' is not accepted"):
        run("batch.micro_size=automatic")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"^batch\.micro_size: auto cannot be agreed on by processes that torchrun"):
        run("batch.micro_size=auto")
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^batch\.global_tokens=100 is not a multiple of the 32 tokens"):
        run("batch.micro_size=auto", "batch.global_tokens=100")
