"""batch.micro_size=auto: the largest micro-batch that fits into a device's memory.

On CUDA it is found by trial, in a process of its own, so that neither memory nor random numbers of the run are touched.
Elsewhere too much memory ends the process instead of raising an error, and under strategies that divide the model a
device that runs out leaves the others waiting: there the plan's estimate decides.
"""

import contextlib
import gc
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from thunderhead.core.config import build
from thunderhead.core.module import GROUPS, LanguageModel
from thunderhead.parallel.strategies import Parallelism
from thunderhead.training import hardware
from thunderhead.training.plan import USABLE_MEMORY

USABLE_HOST_MEMORY = 0.5
"""Of the host's free memory, for what the plan counts: libraries, data and other processes need theirs as well, and the
system kills a process that takes too much."""
STEPS = 2  # of a trial: the first makes the optimizer's state


class Choice(NamedTuple):
    """A micro-batch, and why."""

    size: int
    why: str


def sizes(sequences: int) -> list[int]:
    """The powers of two that divide what a rank takes in a step, ascending."""
    return [2**n for n in range(sequences.bit_length()) if sequences % 2**n == 0]


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Try one size after the other until one does not fit; the last that did."""
    found = None
    for size in sizes:
        if not fits(size):
            break
        found = size
    return found


def is_tried(accelerator: str, parallelism: Parallelism) -> bool:
    """Whether a run finds its micro-batch by trial."""
    is_divided = parallelism.is_sharded or parallelism.is_deepspeed or parallelism.tensor_parallel_size > 1
    return accelerator == "cuda" and not is_divided


def by_estimate(sequences: int, estimate: Callable[[int], dict[str, int]], memory: int, of_what: str) -> Choice:
    """The largest size whose estimate is not above `memory`.

    Args:
        sequences: that a rank takes in a step.
        estimate: bytes of a device by part, of a size; see `memory.estimate`.
        memory: bytes that may be used on a device.
        of_what: what these are, for the sentence.

    Raises:
        ValueError: not even one sequence fits, or activations cannot be estimated.
    """
    needed: dict[int, int] = {}

    def fits(size: int) -> bool:
        parts = estimate(size)
        if "activations" not in parts:
            raise ValueError(
                "batch.micro_size=auto: this model's activations cannot be estimated, as its code looks at values:"
                " write a number"
            )
        needed[size] = sum(parts.values())
        return needed[size] <= memory

    possible = sizes(sequences)
    size = possible[-1] if fits(possible[-1]) else largest(possible[:-1], fits)
    available = f"{memory / 2**30:.2f} GiB, {of_what}"
    if size is None:
        raise ValueError(
            f"batch.micro_size=auto: even one sequence needs about {needed[1] / 2**30:.2f} GiB of {available}: use a"
            " smaller model or model.context_length, or activation_checkpointing=block; a number is taken unasked"
        )
    why = f"by the estimate it needs {needed[size] / 2**30:.2f} GiB of {available}"
    if size == possible[-1]:
        return Choice(size, f"{why}; more do not divide the {sequences} sequences of a step")
    return Choice(size, f"{why}; {size * 2} would need {needed[size * 2] / 2**30:.2f} GiB")


def usable_memory(accelerator: str, n_processes: int, assumed: int) -> tuple[int, str]:
    """Bytes that a run may plan with on each device, and what they are.

    Args:
        accelerator: cpu, cuda or mps.
        n_processes: that share this host.
        assumed: bytes of a GPU, if there is none here.
    """
    if accelerator == "cuda":
        here = torch.cuda.is_available()
        total = torch.cuda.get_device_properties(0).total_memory if here else assumed
        return int(total * USABLE_MEMORY), f"{USABLE_MEMORY:.0%} of {'the GPU' if here else 'plan.memory_gib'}"
    share = f" for each of {n_processes} processes" if n_processes > 1 else ""
    free = hardware.free_host_memory()
    return int(free * USABLE_HOST_MEMORY) // n_processes, f"{USABLE_HOST_MEMORY:.0%} of this host's free memory{share}"


# --------------------------------------------------------------------------------------------------------------------
# By trial


def by_trial(config: dict[str, Any], sequences: int, devices: Sequence[int], **model: Any) -> Choice:
    """Train real steps of a growing size on each device in turn; what fits on all of them.

    Args:
        config: resolved and checked.
        sequences: that a rank takes in a step.
        devices: CUDA devices of this machine that the run will use.
        model: see `Trial`.

    Raises:
        ValueError: not even one sequence fits, or the trial failed in another way.
    """
    possible = sizes(sequences)
    request = {"config": config, "sizes": possible, "devices": list(devices), "accelerator": "cuda", **model}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"batch.micro_size=auto: the trial failed, write a number: {last}")
    found: list[int | None] = json.loads(done.stdout.splitlines()[-1])
    fitting = [size for size in found if size is not None]
    if len(fitting) < len(found):
        raise ValueError(
            "batch.micro_size=auto: even one sequence does not fit: use a smaller model or model.context_length,"
            " activation_checkpointing=block, or strategy=fsdp"
        )
    size = min(fitting)
    if size == possible[-1]:
        return Choice(size, f"tried on the device; more do not divide the {sequences} sequences of a step")
    why = f"{size * 2} was out of memory with {USABLE_MEMORY:.0%} of the device (tried, uncompiled)"
    return Choice(size, why)


class Trial(NamedTuple):
    """What a trial needs to know beside the configuration.

    Args:
        precision: a resolved kind, see `hardware.Precision`.
        vocab_size: tokens of the tokenizer.
        eos_id: its end-of-document token.
        accelerator: cpu or cuda.
        device: its number.
    """

    precision: str
    vocab_size: int
    eos_id: int | None
    accelerator: str
    device: int = 0


def trains(config: dict[str, Any], size: int, trial: Trial) -> bool:
    """Whether micro-batches of `size` sequences train, forward, backward and step, without running out of memory.

    Uncompiled, which needs more. Random numbers of the process are as before, and so is its memory.
    """
    devices = [trial.device] if trial.accelerator == "cuda" else []
    with torch.random.fork_rng(devices), _quiet():
        try:
            _train(config, size, trial)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            fits = False
        else:
            fits = True
    gc.collect()  # what a failed step leaves is held in circles
    if trial.accelerator == "cuda":
        torch.cuda.empty_cache()
    return fits


def _train(config: dict[str, Any], size: int, trial: Trial) -> None:
    compile_ = config["compile"] | {"scope": "none"}
    model = LanguageModel(
        {group: config[group] for group in GROUPS} | {"compile": compile_},
        seed=config["seed"],
        vocab_size=trial.vocab_size,
        eos_id=trial.eos_id,
        total_steps=STEPS + 1,
        precision=trial.precision,
    )
    tokens = torch.randint(trial.vocab_size, (size, config["model"]["context_length"] + 1))
    trainer: Trainer = build(
        config["trainer"],
        **hardware.precision_plugin(trial.precision, trial.accelerator),
        accelerator=trial.accelerator,
        devices=[trial.device] if trial.accelerator == "cuda" else 1,
        num_nodes=1,
        max_steps=STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader([tokens] * STEPS, batch_size=None))  # type: ignore[arg-type]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def main() -> None:
    """Read a request from stdin, and print the largest size that fits on each of its devices (null: none)."""
    request = json.load(sys.stdin)
    config, possible, devices = (request.pop(name) for name in ("config", "sizes", "devices"))
    found = []
    for device in devices:
        if request["accelerator"] == "cuda":
            torch.cuda.set_per_process_memory_fraction(USABLE_MEMORY, device)
        trial = Trial(**request, device=device)
        found.append(largest(possible, lambda size, trial=trial: trains(config, size, trial)))  # type: ignore[misc]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
