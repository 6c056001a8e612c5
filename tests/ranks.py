"""Runs in several processes (gloo): one group of them trains many cases, as starting one takes seconds."""

import faulthandler
import hashlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import programs
from thunderhead.composing import groups_composed_once

SECONDS = 240  # for all cases together, and 30 for each


class Case(NamedTuple):
    """`python train.py <overrides>`, or resume=…, with its record in `folder`."""

    folder: Path
    overrides: list[str]


def train_in_processes(n: int, cases: Sequence[Case], work: Path, script: str = __file__) -> list[dict[str, Any]]:
    """Train the cases one after the other in n processes; returns of each what rank 0 says, and errors as `error`."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "cases.json").write_text(json.dumps([[str(case.folder), case.overrides] for case in cases]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes.append(programs.fork(script, str(work), log=work / f"{rank}.log", **environment))
    statuses = programs.wait(processes, SECONDS + 30 * len(cases))
    logs = "\n".join((work / f"{rank}.log").read_text()[-3000:] for rank in range(n))
    assert statuses == [0] * n, logs
    results: list[dict[str, Any]] = json.loads((work / "results.json").read_text())
    return results


def _bytes(tensors: Any) -> int:
    """Of what this rank has of some tensors; those of one element, such as the number of steps, are left out."""
    import torch
    from torch.distributed.tensor import DTensor

    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in local if t.numel() > 1)


def _local_bytes(trainer: Any, gradients: int) -> dict[str, int]:
    """The most bytes that a rank stores, by part; this one's gradients after the last step are known."""
    import torch

    states = [s for optimizer in trainer.optimizers for per in optimizer.state.values() for s in per.values()]
    stored = {
        "parameters": _bytes(trainer.model.parameters()),
        "gradients": gradients,
        "optimizer_state": _bytes(states),
    }
    ranks: list[Any] = [stored] * trainer.world_size
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(ranks, stored)
    return {part: max(rank[part] for rank in ranks) for part in stored}


def _hash_of_weights(module: Any) -> str:
    """SHA-256 of all parameters, whole, in the order of their names."""
    import torch
    from torch.distributed.tensor import DTensor

    digest = hashlib.sha256()
    for name, parameter in sorted(module.decoder.named_parameters()):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(name.encode() + whole.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_one(case: Case) -> dict[str, Any]:
    """One case in this process; returns what it stored, and a hash of the weights that it began with."""
    from unittest.mock import patch

    import torch
    from lightning import Callback, Trainer

    import tiny
    from thunderhead import command_line
    from thunderhead.core import config
    from thunderhead.training import memory
    from thunderhead.training.resume import SWITCHABLE

    said: dict[str, Any] = {}
    fit = Trainer.fit

    class Hash(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            said["initial_weights"] = _hash_of_weights(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            said["gradients"] = _bytes(p.grad for p in pl_module.parameters())

    def measured(trainer: Any, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks.append(Hash())
        fit(trainer, *args, **kwargs)
        said.update(_local_bytes(trainer, said.get("gradients", 0)))

    resumed = any(o.startswith("resume=") for o in case.overrides)
    rest = [o for o in case.overrides if not o.startswith("resume=")]
    # What is not recorded cannot be composed here, as the options of the recorded run were: see config.with_overrides.
    composed = [o for o in case.overrides if not resumed or o.startswith(("resume=", *SWITCHABLE))]
    tiny.estimate = memory.estimate if "strategy=zero1" in case.overrides else tiny.one_mebibyte  # a test asks
    case.folder.mkdir(parents=True, exist_ok=True)
    torch.compiler.reset()  # Dynamo gives up on code that it saw in too many variants
    with patch.object(Trainer, "fit", measured), patch.object(command_line, "invocation_overrides", lambda: rest):
        try:
            tiny.train_here(composed, case.folder)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            if torch.distributed.is_initialized() and not isinstance(error, config.ConfigError):
                raise  # other ranks may hang
            return {"error": str(error)}
    return said


def main(work: Path) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.enable()  # where a crash of native code was
    results = []
    with groups_composed_once():
        for folder, overrides in json.loads((work / "cases.json").read_text()):
            print(">>>", overrides, flush=True)
            results.append(train_one(Case(Path(folder), overrides)))
    if os.environ["RANK"] == "0":
        (work / "results.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
