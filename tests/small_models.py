"""A tiny LanguageModel and a Trainer for it, without a run around them."""

from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from thunderhead.core import config
from thunderhead.core.components import build
from thunderhead.core.model_spec import ModelSpec
from thunderhead.core.module import LanguageModel
from thunderhead.options.precision import Precision
from tiny import tiny

VOCAB, CONTEXT = 257, 32


def language_model(*overrides: str, seed: int = 1, total_steps: int = 4, precision: str = "fp32") -> LanguageModel:
    resolved = config.plain(config.compose(tiny("x", "x", "compile=none", *overrides)))
    return LanguageModel(
        ModelSpec.of(resolved),
        seed=seed,
        vocab_size=VOCAB,
        eos_id=256,
        total_steps=total_steps,
        precision=Precision(kind=precision),
        compile_decoder=build(resolved["compile"]).apply,
    )


def batches(n: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(0, VOCAB, (n * size, CONTEXT + 1), generator=generator).split(size))


def fit(
    model: LanguageModel,
    data: list[Tensor],
    *,
    precision: str = "fp32",
    callbacks: tuple[Callback, ...] = (),
    **others: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=others.pop("max_steps", 4),
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **Precision(kind=precision).lightning_arguments("cpu"),
        **others,
    )
    trainer.fit(model, DataLoader(data, batch_size=None))
    return trainer
