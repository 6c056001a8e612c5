"""The precision group: the number format that matrices are multiplied in, where it is not that of the weights."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from thunderhead import extras
from thunderhead.core.config import Problem
from thunderhead.core.model.decoder import Decoder

Kind = Literal["auto", "fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp8"]
FORMATS: dict[Kind, tuple[Any, torch.dtype]] = {  # Lightning's name, and what matrices are multiplied in
    "fp32": ("32-true", torch.float32),
    "bf16-mixed": ("bf16-mixed", torch.bfloat16),
    "fp16-mixed": ("16-mixed", torch.float16),
    "bf16-true": ("32-true", torch.bfloat16),  # the decoder computes with views of its float32 weights
    "fp8": ("bf16-mixed", torch.bfloat16),  # around the layers that multiply in float8
}
FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 tensor cores
FP8_MULTIPLE = 16  # float8 matrix multiplication wants both sizes to be multiples of it


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which number format matrices are multiplied and weights are kept.

    `bf16-mixed` and `fp16-mixed` multiply in 16 bits and keep weights, gradients and optimizer state in float32 (fp16
    with loss scaling); `bf16-true` computes everything in bfloat16, norms and residual stream too, from weights that
    are kept and updated in float32; `fp8` is bf16-mixed with the blocks' linear layers multiplied in float8 (torchao);
    `auto` is bf16-mixed where the hardware computes bfloat16 fast, else fp32.
    """

    kind: Kind

    def resolve(self, accelerator: str, is_here: bool = True) -> tuple[Kind, str]:
        """Return the kind to use on `accelerator` (cpu, cuda or mps), and why; `is_here`: this machine has it.

        Raises ValueError for float8 without a GPU that multiplies it, or without torchao.
        """
        if self.kind == "fp8":
            _check_fp8(accelerator, is_here)
        if self.kind != "auto":
            why = "as configured"
            if self.kind == "fp16-mixed" and accelerator == "cpu":
                why += "; CPUs emulate float16 and are very slow in it: bf16-mixed is meant for them"
            if self.kind.startswith("bf16") and accelerator == "cpu" and is_here:
                fast, hardware = fast_bfloat16(accelerator)
                why += "" if fast else f"; {hardware}, and is very slow in bfloat16: fp32 is meant for it"
            return self.kind, why
        fast, why = fast_bfloat16(accelerator) if is_here else (accelerator == "cuda", "GPUs since sm80 have bfloat16")
        return ("bf16-mixed" if fast else "fp32"), f"auto: {why}"

    def of_kind(self, kind: Kind) -> Self:
        """Return what `resolve` found, as a component."""
        return replace(self, kind=kind)

    def problems(self, run: Any) -> Iterator[Problem]:
        """Yield what does not go with fp16's loss scaling."""
        if self.kind != "fp16-mixed":
            return
        optimizer = run.model.optimizer(run.decoder_meta)
        if type(optimizer) is torch.optim.SGD and any(g["fused"] and g["momentum"] for g in optimizer.param_groups):
            message = "takes unset memory for momentum if fp16's loss scaling skips the first step: set it to false"
            yield Problem("optimizer.fused", message)  # torch 2.13

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrices are multiplied in (around float8)."""
        return FORMATS[self.kind][1]

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """What divided parameters are gathered in; None is as they are kept, and autocast does the rest."""
        return torch.bfloat16 if self.kind == "bf16-true" else None

    def autocast(self, accelerator: str) -> torch.autocast:
        """Return autocast's context outside of the Trainer, like Lightning's: without a cache of cast weights."""
        is_mixed = FORMATS[self.kind][0].endswith("mixed")
        return torch.autocast(accelerator, self.compute_dtype, enabled=is_mixed, cache_enabled=False)

    def lightning_arguments(self, accelerator: str) -> dict[str, Any]:
        """Return arguments of the Trainer."""
        if self.kind == "fp16-mixed":
            # Asked for "16-mixed" on a CPU, Lightning silently takes bfloat16; the plugin itself does what it is told.
            return {"plugins": [MixedPrecision("16-mixed", accelerator, AgreeingGradScaler(accelerator))]}
        return {"precision": FORMATS[self.kind][0]}

    def before_sharding(self, decoder: Decoder) -> None:
        """Change a decoder's layers, before it is divided or compiled."""
        if self.kind == "fp8":
            multiply_in_fp8(decoder)

    def after_initialize(self, decoder: Decoder, is_sharded: bool) -> None:
        """Change what the layers see of their weights; where these are gathered for use, `gathered_dtype` does it."""
        if self.gathered_dtype is not None and not is_sharded:
            compute_in(decoder, self.gathered_dtype)


class AgreeingGradScaler(torch.amp.GradScaler):
    """Leaves a step out on every rank if a gradient overflows on one.

    torch 2.13 lets ranks agree by the placements of the first gradient alone (`found_inf_reduce_handler`): where that
    one is replicated and another is not, one rank would leave out a step that another takes.
    """

    def _unscale_grads_(self, *arguments: Any) -> dict[torch.device, torch.Tensor]:
        found: dict[torch.device, torch.Tensor] = super()._unscale_grads_(*arguments)
        if dist.is_available() and dist.is_initialized():
            for found_inf in found.values():
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return found


def _check_fp8(accelerator: str, is_here: bool) -> None:
    if accelerator != "cuda" or (is_here and torch.cuda.get_device_capability() < FP8_CAPABILITY):
        device = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}" if accelerator == "cuda" else accelerator
        needed = f"a GPU with float8 tensor cores (sm89 or newer), and this run is on {device}"
        raise ValueError(f"precision=fp8 needs {needed}: use precision=bf16-mixed")
    if is_here and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"precision=fp8 needs torchao: {extras.install('fp8')}, or use precision=bf16-mixed")


def fast_bfloat16(accelerator: str) -> tuple[bool, str]:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones, and how we know."""
    if accelerator == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return major >= 8, f"CUDA sm{major}{minor} {'has' if major >= 8 else 'lacks'} bfloat16 tensor cores"
    if accelerator != "cpu":
        return False, f"no fast bfloat16 is known for {accelerator}"
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    found = [name for flag, name in known.items() if flag in cpu_flags()]
    return bool(found), f"the CPU has {found[0] if found else 'neither AMX nor AVX512-BF16'}"


def cpu_flags() -> set[str]:
    """Instruction-set flags as Linux reports them; empty elsewhere."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def compute_in(decoder: Decoder, dtype: torch.dtype) -> None:
    """Let every module compute with its weights rounded to dtype; the weights themselves, float32, are what is trained.

    Without such master weights bfloat16 loses updates: its spacing is 1/128 of a weight, and a step changes most
    weights by less (Micikevicius et al. 1710.03740, section 3.1). FSDP2 does the same by its MixedPrecisionPolicy.
    """
    for module in list(decoder.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            view_parameters(module, lambda parameter: parameter.to(dtype))


def view_parameters(module: nn.Module, view: Callable[[Any], Any]) -> None:
    """Let a module see view(parameter) wherever its code says self.<parameter>; the parameters themselves stay.

    So the names in a state dict do not change, and torch.compile sees through it (torchtitan's simple FSDP does this).
    """
    cls = type(module)

    def property_of(name: str) -> property:
        before = getattr(cls, name, None)  # a view of the same parameter
        inner = before.fget if isinstance(before, property) else None
        return property(lambda self: view(self._parameters[name] if inner is None else inner(self)))

    own = [name for name, _ in module.named_parameters(recurse=False)]
    module.__class__ = type(cls.__name__, (cls,), {name: property_of(name) for name in own})


def multiply_in_fp8(decoder: Decoder, emulate: bool = False) -> None:
    """Let the blocks' linear layers multiply in float8, with one scale a tensor (torchao); names and weights stay.

    `emulate` computes in the usual formats what float8 would give, for tests on machines without it.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_fitting(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(size % FP8_MULTIPLE for size in module.weight.shape)

    for block in decoder.blocks:
        before = [name for name, module in block.named_modules() if getattr(module, "adds_to_residual", False)]
        convert_to_float8_training(block, module_filter_fn=is_fitting, config=Float8LinearConfig(emulate=emulate))
        for name in before:
            block.get_submodule(name).adds_to_residual = True  # type: ignore[assignment]
