"""A callback: from the second step on, a gradient that only rank 1 holds overflows once; each rank says what it did."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch.distributed.tensor import DTensor, Replicate

from thunderhead.training.record import write_json


class OverflowOnRank1(Callback):
    """Writes overflow-<rank>.json: scale, steps that the optimizer took, and a hash of what all ranks have alike."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        gradients = [p.grad for p in pl_module.decoder.parameters() if p.grad is not None]
        for gradient in gradients if trainer.global_step == 1 and trainer.global_rank == 1 else ():
            if not isinstance(gradient, DTensor):  # of a replica: only here
                gradient.view(-1)[0] = torch.inf
            elif any(not isinstance(placement, Replicate) for placement in gradient.placements):
                gradient.to_local().view(-1)[0] = torch.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        alike = hashlib.sha256()
        for parameter in pl_module.decoder.parameters():
            if isinstance(parameter, DTensor) and not all(isinstance(p, Replicate) for p in parameter.placements):
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            alike.update(local.detach().contiguous().view(torch.uint8).numpy().tobytes())
        states = trainer.optimizers[0].state.values()
        steps = sorted({int(state["step"]) for state in states})
        scale = trainer.precision_plugin.scaler.get_scale()
        self.seen.append({"scale": scale, "steps": steps, "alike": alike.hexdigest()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        write_json(Path(trainer.default_root_dir, f"overflow-{trainer.global_rank}.json"), self.seen)
