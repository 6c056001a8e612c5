"""The compile group: torch.compile in place, so that the keys of the state dict stay clean."""

import os
import shutil
from dataclasses import dataclass, replace
from typing import Literal

import torch

from thunderhead.core.model.decoder import Decoder
from thunderhead.training import hardware

PAYS_AFTER = 600.0
"""Seconds of training from which `auto` compiles: that costs up to a minute, and saves about a seventh of the rest
(docs/performance.md; more where memory is not kept)."""
CPU_FLOPS_PER_THREAD = 5e10
"""What a CPU thread makes of the default model in bfloat16 (measured: 4.9e10 to 8.6e10), for `auto`'s estimate."""
GPU_UTILIZATION = 0.3
H100_FLOPS = 989e12
"""Of GPUs that are only planned for."""

Scope = Literal["none", "block", "model"]


@dataclass(frozen=True, kw_only=True)
class Compile:
    """What to compile.

    Args:
        scope: `none`; `block` compiles each block by itself (about 20 s the first time on a CPU); `model` compiles the
            whole decoder with its loss (about twice as long, a little faster afterwards); `auto` compiles runs that
            are expected to take more than PAYS_AFTER seconds: the model, or blocks where a strategy gathers weights.
        backend: torch.compile's backend; `eager` and `aot_eager` help to find what breaks.
        mode: torch.compile's mode.
    """

    scope: Literal["auto", "none", "block", "model"]
    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def resolve(
        self, flops: float, *, accelerator: str, precision: str, devices: int, by_block: bool
    ) -> tuple[Scope, str]:
        """The scope to use, and why.

        The estimate rests on the plan and on published speeds, not on a measurement: a run that is resumed decides
        alike, so that its losses stay the same bit for bit.

        Args:
            flops: of the whole run, forward and backward.
            accelerator: cpu, cuda or mps.
            precision: a resolved kind.
            devices: that share the work.
            by_block: the model cannot be compiled as a whole.
        """
        if self.scope != "auto":
            return self.scope, "as configured"
        if accelerator == "mps":
            return "none", "auto: not tried on mps"
        if accelerator == "cpu":
            if self.backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
                return "none", "auto: no C++ compiler is here"
            speed: float | None = CPU_FLOPS_PER_THREAD * torch.get_num_threads()
        else:
            peak = hardware.peak_flops(accelerator, precision) if torch.cuda.is_available() else H100_FLOPS
            speed = GPU_UTILIZATION * peak if peak else None
        if speed is None:
            return "none", "auto: the speed of this device is not known"
        seconds = flops / (speed * devices)
        expected = f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
        why = f"auto: about {expected} of training expected, and compiling pays from {PAYS_AFTER / 60:.0f} minutes on"
        if seconds < PAYS_AFTER:
            return "none", why
        return ("block" if by_block else "model"), why

    def of_scope(self, scope: Scope) -> "Compile":
        """The same with another scope."""
        return replace(self, scope=scope)

    def apply(self, decoder: Decoder) -> None:
        """Mark the modules for compilation; it happens at their first call.

        Raises:
            ValueError: `auto` was not resolved.
        """
        if self.scope == "auto":
            raise ValueError("compile.scope=auto must be resolved by a plan: set none, block or model")
        if self.scope == "none":
            return
        options = {"backend": self.backend} | ({"mode": self.mode} if self.backend == "inductor" else {})
        for module in decoder.blocks if self.scope == "block" else [decoder]:
            module.compile(fullgraph=True, dynamic=False, **options)
