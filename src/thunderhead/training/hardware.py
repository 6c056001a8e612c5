"""What the machine can do: accelerator, precision, peak speed, allocator."""

import ctypes
import importlib.util
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.plugins import MixedPrecision

from thunderhead.parallel.scaler import AgreeingGradScaler

LIGHTNING_PRECISION = {
    "fp32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "fp16-mixed": "16-mixed",
    "bf16-true": "32-true",  # the decoder computes with bfloat16 views of its float32 weights
    "fp8": "bf16-mixed",  # around the layers that multiply in float8
}
COMPUTE_DTYPE = {
    "fp32": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "fp16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "fp8": torch.bfloat16,
}
FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 tensor cores


def autocast(accelerator: str, precision: str) -> torch.autocast:
    """The autocast context of a precision outside of the Trainer, like Lightning's: without a cache of cast weights."""
    return torch.autocast(accelerator, COMPUTE_DTYPE[precision], enabled=is_mixed(precision), cache_enabled=False)


def is_mixed(precision: str) -> bool:
    """Whether a precision computes under autocast."""
    return precision.endswith("mixed") or precision == "fp8"


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which number format matrices are multiplied and weights are kept.

    Args:
        kind: `fp32`; `bf16-mixed` and `fp16-mixed` multiply in 16 bits and keep weights, gradients and optimizer
            state in float32 (fp16 with loss scaling); `bf16-true` computes everything in bfloat16, norms and residual
            stream too, from weights that are kept and updated in float32; `fp8` is bf16-mixed with the blocks' linear
            layers multiplied in float8 (torchao); `auto` is bf16-mixed where the hardware computes bfloat16 fast, else
            fp32.
    """

    kind: Literal["auto", "fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp8"]

    def resolve(self, accelerator: str, is_here: bool = True) -> tuple[str, str]:
        """The kind to use on `accelerator` (cpu, cuda or mps), and why; `is_here` tells that this machine has it.

        Raises:
            ValueError: float8 without a GPU that multiplies it, or without torchao.
        """
        if self.kind == "fp8":
            _check_fp8(accelerator, is_here)
        if self.kind != "auto":
            why = "as configured"
            if self.kind == "fp16-mixed" and accelerator == "cpu":
                why += "; CPUs emulate float16 and are very slow in it: bf16-mixed is meant for them"
            return self.kind, why
        fast, why = fast_bfloat16(accelerator) if is_here else (accelerator == "cuda", "GPUs since sm80 have bfloat16")
        return ("bf16-mixed" if fast else "fp32"), f"auto: {why}"


def _check_fp8(accelerator: str, is_here: bool) -> None:
    if accelerator != "cuda" or (is_here and torch.cuda.get_device_capability() < FP8_CAPABILITY):
        device = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}" if accelerator == "cuda" else accelerator
        raise ValueError(
            f"precision=fp8 needs a GPU with float8 tensor cores (CUDA sm89 or newer), and this run is on {device}:"
            " use precision=bf16-mixed"
        )
    if is_here and importlib.util.find_spec("torchao") is None:
        raise ValueError("precision=fp8 needs torchao: uv pip install -e '.[fp8]', or use precision=bf16-mixed")


def fast_bfloat16(accelerator: str) -> tuple[bool, str]:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones, and how we know."""
    if accelerator == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"CUDA sm{major}{minor} {'has' if major >= 8 else 'lacks'} bfloat16 tensor cores"
    if accelerator == "cpu":
        flags = cpu_flags()
        for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")):
            if flag in flags:
                return True, f"the CPU has {name}"
        return False, "the CPU has neither AMX nor AVX512-BF16"
    return False, f"no fast bfloat16 is known for {accelerator}"


def cpu_flags() -> set[str]:
    """Instruction-set flags as Linux reports them; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].partition(":")[2].split()) if lines else set()


def keep_freed_memory() -> bool:
    """Let glibc keep the big blocks of a training step instead of handing them to the system and back.

    Each return costs page faults at the next step: 1.3-1.4 times the time of a step on CPUs (docs/decisions/0003).

    Returns:
        Whether the platform's allocator took the setting.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def resolve_accelerator(accelerator: str, must_be_here: bool = True) -> str:
    """`auto`, `gpu` and the like to cpu, cuda or mps.

    Args:
        accelerator: as in `trainer.accelerator`.
        must_be_here: of this machine; a plan alone may be for another.

    Raises:
        ValueError: the machine has no such device.
    """
    available = accelerators()
    if accelerator == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    wanted = ("cuda" if available["cuda"] or not available["mps"] else "mps") if accelerator == "gpu" else accelerator
    if wanted not in available:
        raise ValueError(f"trainer.accelerator={accelerator} is unknown: use auto, cpu, gpu, cuda or mps")
    if not available[wanted] and must_be_here:
        here = ", ".join(name for name, present in available.items() if present)
        raise ValueError(
            f"trainer.accelerator={accelerator}: PyTorch finds no {wanted} device here, only {here}: use trainer=auto"
        )
    return wanted


def accelerators() -> dict[str, bool]:
    """What this machine can compute on."""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


def device_count(devices: Any, accelerator: str, must_be_here: bool = True) -> int:
    """Devices on this node that `trainer.devices` asks for: a number, `auto` or -1 (all), or a list of indices.

    Raises:
        ValueError: nothing of the kind, or more GPUs than there are.
    """
    present = torch.cuda.device_count() if accelerator == "cuda" else 1
    if devices in ("auto", -1, "-1"):
        if present == 0:
            raise ValueError(
                f"trainer.devices={devices} counts the devices of this machine, which has none: write how many"
            )
        return present
    if isinstance(devices, list):
        devices = len(devices)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices}: write a number of devices, a list of indices, or auto")
    if accelerator == "cuda" and must_be_here and devices > present:
        raise ValueError(f"trainer.devices={devices}: this machine has {present} GPU(s): use at most so many")
    return devices


def precision_plugin(kind: str, accelerator: str) -> dict[str, Any]:
    """Trainer arguments for a resolved precision."""
    if kind == "fp16-mixed":
        # Asked for "16-mixed" on a CPU, Lightning silently takes bfloat16; the plugin itself does what it is told.
        return {"plugins": [MixedPrecision("16-mixed", accelerator, AgreeingGradScaler(accelerator))]}
    return {"precision": LIGHTNING_PRECISION[kind]}


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


def free_host_memory() -> int:
    """Bytes that processes of this machine can still take; on systems other than Linux half of all that there is.

    Linux's MemAvailable, or what the control groups of this process allow if that is less.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (free,) = (int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return min([free, *_control_group_memory()])


def _control_group_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group (version 2) that this process is in and that has a limit."""
    lines = own.read_text().splitlines() if own.exists() else []
    left = []
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for folder in ((root / path), *(root / path).parents):
            limit, used, stat = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
            if not limit.exists() or not limit.read_text().strip().isdigit():
                continue
            # files that were read and can be forgotten count as used
            cached = dict(line.split() for line in stat.read_text().splitlines()).get("inactive_file", "0")
            left.append(max(0, int(limit.read_text()) - int(used.read_text()) + int(cached)))
    return left


def peak_flops(accelerator: str, kind: str) -> float | None:
    """FLOP/s of one device for MFU: the published peak of a GPU (Lightning's table), a measured matmul on a CPU.

    Returns:
        None where nothing is known, so that no MFU is reported.
    """
    dtype = COMPUTE_DTYPE[kind]  # of float8 too, whose MFU is told against bfloat16's peak
    if accelerator == "cuda":
        peak = get_available_flops(torch.device("cuda"), dtype)
        return float(peak) if peak else None
    return measured_matmul_flops(dtype) if accelerator == "cpu" else None


def measured_matmul_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of the best of several square matmuls on the CPU."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return 2 * size**3 / best
