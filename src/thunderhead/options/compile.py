"""The compile group: torch.compile in place, so that the keys of the state dict stay clean."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn

from thunderhead.core.config import Problem
from thunderhead.core.model.block import ResidualDropout
from thunderhead.core.model.decoder import Decoder
from thunderhead.terminal import duration

PAYS_AFTER = 600.0
"""Seconds of training from which `auto` compiles: that costs up to a minute, and saves about a seventh of the rest
(docs/performance.md; more where memory is not kept)."""
CPU_FLOPS_PER_THREAD = 5e10
"""What a CPU thread makes of the default model in bfloat16 (measured: 4.9e10 to 8.6e10), for `auto`'s estimate."""
GPU_UTILIZATION = 0.3
Scope = Literal["auto", "none", "block", "model"]


@dataclass(frozen=True, kw_only=True)
class Compile:
    """What to compile, with torch.compile's backend (`eager` and `aot_eager` help to find what breaks) and mode.

    Scope `block` compiles each block by itself (about 20 s the first time on a CPU); `model` the whole decoder with its
    loss (about twice as long, a little faster afterwards); `auto` compiles runs that are expected to take more than
    PAYS_AFTER seconds: the model, or blocks where a strategy gathers weights.
    """

    scope: Scope
    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def problems(self, run: Any) -> Iterator[Problem]:
        """Yield what torch 2.13 cannot compile, or compiles wrongly."""
        if self.scope == "none":
            return
        checkpointed = {getattr(block, "checkpointed", None) for block in run.decoder_meta.blocks} - {None}
        if self.backend == "eager" and checkpointed and _drops(run.decoder_meta):
            message = "does not repeat dropout's random numbers under activation_checkpointing: use aot_eager"
            yield Problem("compile.backend=eager", message)
        name = f"strategy={run.strategy.name}"
        if self.scope == "model" and run.strategy.gathers:
            message = f"compile=model cannot trace through {name}, which gathers each block's weights"
            yield Problem("compile.scope", f"{message}: use compile=block")
        if self.scope != "auto" and self._fails(run):
            message = f"torch cannot compile whole checkpointed blocks under {name}"
            yield Problem("compile.scope", f"{message}: use compile=none, or activation_checkpointing=selective")

    def _fails(self, run: Any) -> bool:
        """Whether blocks are checkpointed whole, and their weights divided: torch then fails to save the mesh."""
        whole = any(getattr(block, "checkpointed", None) == "whole" for block in run.decoder_meta.blocks)
        return whole and run.strategy.tensor_parallel_size > 1 and self.backend != "eager"

    def resolve(self, run: Any, flops: float, dtype: torch.dtype) -> tuple[Scope, str]:
        """Return the scope to use, and why. `flops` are the whole run's, `dtype` the matrices'.

        The estimate rests on the plan and on published speeds, not on a measurement: a run that is resumed decides
        alike, so that its losses stay the same bit for bit.
        """
        if self.scope != "auto":
            return self.scope, "as configured"
        if self._fails(run):
            return "none", "auto: torch cannot compile whole checkpointed blocks under tensor parallelism"
        if run.accelerator == "mps":
            return "none", "auto: not tried on mps"
        speed: float | None = CPU_FLOPS_PER_THREAD * torch.get_num_threads()
        if run.accelerator == "cuda":
            here = torch.cuda.is_available()
            peak = get_available_flops(torch.device("cuda"), dtype) if here else run.hardware_plan.peak_flops
            speed = GPU_UTILIZATION * peak if peak else None
        elif self.backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
            return "none", "auto: no C++ compiler is here"
        if speed is None:
            return "none", "auto: the speed of this device is not known"
        seconds = flops / (speed * run.world_size)
        why = f"auto: about {duration(seconds)} of training expected, and compiling pays from {duration(PAYS_AFTER)} on"
        if seconds < PAYS_AFTER:
            return "none", why
        return ("block" if run.strategy.gathers else "model"), why

    def of_scope(self, scope: Scope) -> Self:
        """Return what `resolve` found, as a component."""
        return replace(self, scope=scope)

    def apply(self, decoder: Decoder) -> None:
        """Mark the modules for compilation; it happens at their first call."""
        assert self.scope != "auto", "compile.scope=auto is resolved by a plan"
        modules: dict[str, Iterable[nn.Module]] = {"none": (), "block": decoder.blocks, "model": (decoder,)}
        options = {"backend": self.backend} | ({"mode": self.mode} if self.backend == "inductor" else {})
        for module in modules[self.scope]:
            module.compile(fullgraph=True, dynamic=False, **options)


def _drops(decoder: Decoder) -> bool:
    """Whether a block draws random numbers."""
    rates = [getattr(block, "dropout", ResidualDropout()) for block in decoder.blocks]
    of_branches = any(rate.attention_output or rate.feedforward_output for rate in rates)
    return of_branches or any(getattr(m, "dropout", 0.0) for block in decoder.blocks for m in block.children())
