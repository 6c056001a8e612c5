"""The compile group: torch.compile in place, so that the keys of the state dict stay clean."""

from dataclasses import dataclass
from typing import Literal

from thunderhead.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Compile:
    """What to compile.

    Args:
        scope: `none`; `block` compiles each block by itself (about 20 s the first time on a CPU); `model` compiles the
            whole decoder with its loss (about twice as long, a little faster afterwards).
        backend: torch.compile's backend; `eager` and `aot_eager` help to find what breaks.
        mode: torch.compile's mode.
    """

    scope: Literal["none", "block", "model"]
    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"

    def apply(self, decoder: Decoder) -> None:
        """Mark the modules for compilation; it happens at their first call."""
        if self.scope == "none":
            return
        options = {"backend": self.backend} | ({"mode": self.mode} if self.backend == "inductor" else {})
        for module in decoder.blocks if self.scope == "block" else [decoder]:
            module.compile(fullgraph=True, dynamic=False, **options)
