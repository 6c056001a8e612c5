"""What the machine can do: accelerators, memory, peak speed, allocator."""

import ctypes
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from thunderhead.processes import started_processes

ALL = ("auto", -1, "-1")
"""`trainer.devices` for all that there are; of processes that torchrun or srun started, for all of them."""

RESTARTS_HANG = (
    "processes that torchrun starts again can wait for ever for those that have ended, whose addresses its store keeps "
    "(github.com/pytorch/pytorch/issues/135712): start it as TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun "
    "--rdzv-backend=c10d (or --standalone) --max-restarts=… , or without --max-restarts"
)


def keep_freed_memory() -> bool:
    """Let glibc keep the big blocks of a training step instead of handing them to the system and back.

    Each return costs page faults at the next step: 1.3-1.4 times the time of a step on CPUs (docs/decisions/0003).
    Returns whether the platform's allocator took the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def accelerators() -> dict[str, bool]:
    """What this machine can compute on, best first."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def resolve_accelerator(accelerator: str, must_be_here: bool = True) -> str:
    """`trainer.accelerator` (`auto`, `gpu` and the like) to cpu, cuda or mps; a plan alone may be for another machine.

    Raises ValueError if the machine has no such device.
    """
    available = accelerators()
    if accelerator == "auto":
        return next(name for name, is_here in available.items() if is_here)
    wanted = ("cuda" if available["cuda"] or not available["mps"] else "mps") if accelerator == "gpu" else accelerator
    if wanted not in available:
        raise ValueError(f"trainer.accelerator={accelerator} is unknown: use auto, cpu, gpu, cuda or mps")
    if not available[wanted] and must_be_here:
        here = ", ".join(name for name, is_here in available.items() if is_here)
        raise ValueError(
            f"trainer.accelerator={accelerator}: PyTorch finds no {wanted} device here, only {here}: use trainer=auto"
        )
    return wanted


def device_count(devices: Any, accelerator: str, must_be_here: bool = True) -> int:
    """Devices on this node that `trainer.devices` asks for: a number, `auto` or -1 (all), or a list of indices.

    Raises ValueError for anything else, and for more GPUs than there are.
    """
    present = torch.cuda.device_count() if accelerator == "cuda" else 1
    count = present if devices in ALL else len(devices) if isinstance(devices, list) else devices
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        choices = f"a number of devices, a list of indices, or auto ({present} on this machine)"
        raise ValueError(f"trainer.devices={devices}: write {choices}")
    if accelerator == "cuda" and must_be_here and count > present:
        raise ValueError(f"trainer.devices={devices}: this machine has {present} GPU(s): use at most so many")
    return count


def machine_of(trainer: dict[str, Any], must_be_here: bool) -> dict[str, Any]:
    """What the group `trainer` asks for, as `Run` has it; raises ValueError as the two above."""
    accelerator = resolve_accelerator(trainer.get("accelerator", "auto"), must_be_here)
    devices, nodes, started = trainer.get("devices", 1), trainer.get("num_nodes", 1), started_processes()
    if not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"trainer.num_nodes={nodes}: write how many machines run this, 1 or more")
    if started is not None and devices in ALL:
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", started // nodes))
    n_devices = device_count(devices, accelerator, must_be_here)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if must_be_here and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(f"trainer.devices={devices}: {RESTARTS_HANG}")
    is_here = accelerators()[accelerator] and (accelerator != "cuda" or n_devices <= torch.cuda.device_count())
    world_size = n_devices * nodes
    if must_be_here and started not in (None, world_size):  # each would train by itself
        message = f"trainer.devices={n_devices} on trainer.num_nodes={nodes} are {world_size} process(es)"
        raise ValueError(f"{message}, but {started} were started: set these to what torchrun or srun was told")
    return {"accelerator": accelerator, "is_here": is_here, "n_processes": n_devices, "world_size": world_size}


def device_name(accelerator: str) -> str:
    """The model name of the GPU or CPU."""
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if accelerator == "cpu" and cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]} ({torch.get_num_threads()} threads)"
    return platform.processor() or platform.machine()


def peak_memory(accelerator: str) -> int:
    """Bytes: the most that this process' tensors took on its GPU; elsewhere the most that the process took at all."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # bytes on macOS, KiB on Linux


def peak_flops(accelerator: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device for MFU: the published peak of a GPU (Lightning's table), a measured matmul on a CPU.

    None where nothing is known, so that no MFU is reported. Float8 is told against bfloat16's peak.
    """
    if accelerator == "cuda":
        peak = get_available_flops(torch.device("cuda"), dtype)
        return float(peak) if peak else None
    return measured_matmul_flops(dtype) if accelerator == "cpu" else None


def measured_matmul_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.1) -> float:
    """FLOP/s of the best of several square matmuls on the CPU."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
