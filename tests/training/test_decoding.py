"""The speed of generation is measured, in bounded time, and left out where it would be another model's."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from thunderhead.core import config
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import build_decoder
from thunderhead.parallel.strategies import fsdp
from thunderhead.training import decoding_speed, fit
from thunderhead.training.decoding_speed import decode_tokens_per_second

CPU = torch.device("cpu")
TINY = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.context_length=16")


def decoder_of(*overrides: str) -> Decoder:
    decoder = build_decoder(config.plain(config.compose([*TINY, *overrides])), 61, 0)
    decoder.initialize(seed=1)
    return decoder


def test_it_is_in_the_summary(run: Callable[..., Path]) -> None:
    summary = json.loads((run() / "summary.json").read_text())
    assert summary["decode_tokens_per_second"] > 1


def test_it_is_measured_where_the_model_trained(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning moves whole models to the host when it is done: they go back, and what is spread over ranks stays."""
    model, run = torch.nn.Linear(2, 2), SimpleNamespace(data=None)  # nothing to sample with: it says so and goes on
    for strategy, device in ((fsdp(1).strategy(), "cpu"), (SingleDeviceStrategy(torch.device("meta")), "meta")):
        fit._ornaments(run, None, SimpleNamespace(strategy=strategy), model, {})  # type: ignore[arg-type]
        assert model.weight.device.type == device
        assert "no sample of text" in "".join(capsys.readouterr())


def test_the_median_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(decoding_speed, "_now", lambda device: (n := next(clock)) // 2 + (n % 2) * 0.25)
    decoder = decoder_of("compile=none").train()
    assert decode_tokens_per_second(decoder, CPU) == 4.0
    assert decoder.training


def test_a_slow_model_takes_no_longer_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, logits, calls = decoder_of(), Decoder.logits, []

    def slow(self: Decoder, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        time.sleep(0.02)
        return logits(self, *arguments)

    monkeypatch.setattr(Decoder, "logits", slow)
    speed = decode_tokens_per_second(decoder, CPU, max_seconds=0.05)
    assert speed is not None
    assert speed < 50
    assert len(calls) <= 1 + decoding_speed.WARM_UP + 2


def test_where_it_would_not_be_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_tokens_per_second(decoder_of("model.context_length=1"), CPU) is None
    decoder = decoder_of()
    monkeypatch.setattr(decoder.mixers[1], "new_cache", lambda *_: None)
    assert decode_tokens_per_second(decoder, CPU) is None
