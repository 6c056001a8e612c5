"""The strategies deepspeed_zero1, 2 and 3: DeepSpeed's sharded data parallelism, an extra, for CUDA only.

FSDP2 (strategy=fsdp) does the same without another package; these are for comparing, and for offloading to the CPU.
"""

import contextlib
from collections.abc import Generator
from typing import Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch.optim import Optimizer

from thunderhead.core.types import PositiveInt
from thunderhead.parallel.strategies import Parallelism


def zero(
    world_size: int,
    *,
    stage: Literal[1, 2, 3],
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    overlap_comm: bool = True,
    bucket_numel: PositiveInt = 200_000_000,
) -> Parallelism:
    """DeepSpeed's ZeRO (Rajbhandari et al. 1910.02054): optimizer state, gradients, parameters in shards.

    DeepSpeed computes in bfloat16 (or float16) weights and keeps float32 master weights beside the optimizer's state,
    all of it as flat pieces of many parameters in a row.

    Args:
        world_size: devices.
        stage: 1 divides the optimizer's state, 2 gradients too, 3 parameters too.
        offload_optimizer: keep the optimizer's state in the host's memory; it computes there.
        offload_parameters: the same for parameters; stage 3 only.
        overlap_comm: communicate while the backward pass computes.
        bucket_numel: elements that are communicated at once.

    Raises:
        ValueError: parameters are to be offloaded that are not divided.
    """
    if offload_parameters and stage < 3:
        raise ValueError(
            f"strategy.offload_parameters=true needs parameters that are divided, and ZeRO {stage} has copies:"
            " use strategy=deepspeed_zero3"
        )
    config = config_of(stage, offload_optimizer, offload_parameters, overlap_comm, bucket_numel)
    return Parallelism(
        name=f"deepspeed_zero{stage}",
        data_parallel_size=world_size,
        parameter_shards=world_size if stage == 3 else 1,
        gradient_shards=world_size if stage >= 2 else 1,
        state_shards=world_size,
        gathers=stage == 3,
        on_cpu=("parameters",) * offload_parameters + ("optimizer_state",) * offload_optimizer,
        needs_cuda=True,
        is_deepspeed=True,
        strategy=lambda: _strategy(config),
    )


def config_of(
    stage: int, offload_optimizer: bool, offload_parameters: bool, overlap_comm: bool, bucket_numel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, without what Lightning adds: precision, accumulation, clipping."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_bucket_size": bucket_numel,
        "reduce_bucket_size": bucket_numel,
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, Lion
        "zero_force_ds_cpu_optimizer": False,  # the configured one, also where it computes on the CPU
        # of DeepSpeed's own log only; Lightning would ask the loader, which does not know
        "train_micro_batch_size_per_gpu": 1,
    }


def _strategy(config: dict[str, Any]) -> Strategy:
    return ZeroStrategy(config=config)


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, mended for stage 3: parameters that are not there when they are asked for."""

    @contextlib.contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Build the decoder whole, on every rank: parameters divided while they are made could not be drawn."""
        yield

    def _setup_model_and_optimizer(
        self, model: Any, optimizer: Optimizer | None, lr_scheduler: Any | None = None
    ) -> Any:
        made = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.zero_stage_3:
            gather_in_logits(model.decoder)
        return made


def gather_in_logits(decoder: Any) -> None:
    """Have DeepSpeed gather the head's weights in a decoder's `forward`, which uses them itself, and in `logits`."""
    import deepspeed

    deepspeed.zero.register_external_parameter(decoder, decoder.head_weight)
    logits = decoder.logits

    def call(*arguments: Any) -> Any:
        before, decoder.forward = decoder.forward, logits  # DeepSpeed's hooks are around forward
        try:
            return decoder(*arguments)
        finally:
            decoder.forward = before

    decoder.logits = call
