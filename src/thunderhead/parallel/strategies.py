"""The strategy group: how a run is spread over devices."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from thunderhead.core.config import Problem
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.run import Problems
from thunderhead.core.types import PositiveInt
from thunderhead.parallel.tensor_parallel import branches, plan_of
from thunderhead.parallel.tensor_parallel import tensor_parallel as divide
from thunderhead.parallel.zero1 import Zero1Strategy, parameters_of


def whole_weights(run: Any, what: str) -> list[Problem]:
    """Say that `what` is in the way of a strategy that divides the weights, if the run has one."""
    if not hasattr(run.strategy.strategy(), "parallelize"):
        return []
    message = f"{what}, and strategy={run.strategy.name} divides them: use ddp or zero1"
    return [Problem("callbacks", message)]


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """What an option of the group `strategy` makes of a number of devices."""

    name: str  # of the option, for messages
    data_parallel_size: int  # ranks that see different data
    tensor_parallel_size: int = 1  # ranks that compute each block together, on the same data
    parameter_shards: int = 1  # data-parallel ranks among which a parameter is divided; 1: each has a copy
    gradient_shards: int = 1  # the same for gradients while they accumulate
    state_shards: int = 1  # the same for the optimizer's state
    whole_parameters: bool = False  # that state is divided by these, so that ranks have parts of different sizes
    gathers: bool = False  # a block's parameters are gathered when it computes
    gathers_all: bool = False  # they stay gathered until the backward pass
    on_cpu: tuple[str, ...] = ()  # of parameters, gradients, optimizer_state what the host's memory holds; needs CUDA
    strategy: Callable[[], Strategy | str] = lambda: "auto"  # makes Lightning's

    def problems(self, run: Any) -> Problems:
        """Say what the machine or the model cannot do."""
        found = Problems()
        if self.on_cpu and run.accelerator != "cuda":
            found.note(Problem("strategy.cpu_offload", f"needs CUDA, and this run is on {run.accelerator}"))
        for branch in branches(run.decoder_meta) if self.tensor_parallel_size > 1 else ():
            with found.collect():  # each message once: layers are mostly alike
                plan_of(branch, self.tensor_parallel_size)
        return found


def auto(world_size: int) -> Parallelism:
    """One device without ceremony; DDP over several."""
    return ddp(world_size) if world_size > 1 else Parallelism(name="auto", data_parallel_size=1)


def single(world_size: int) -> Parallelism:
    """One device; raises ValueError if more were asked for."""
    if world_size > 1:
        asked = f"strategy=single runs on one device, but trainer.devices × trainer.num_nodes = {world_size}"
        raise ValueError(f"{asked}: use strategy=ddp or strategy=fsdp, or trainer.devices=1")
    return Parallelism(name="single", data_parallel_size=1)


def ddp(
    world_size: int,
    *,
    gradient_as_bucket_view: bool = True,
    bucket_cap_mb: PositiveInt = 25,
    shards_state: bool = False,
) -> Parallelism:
    """A replica of the model on every device; gradients are averaged in the backward pass (Li et al. 2006.15704).

    Settings are torch's DistributedDataParallel's, but for `shards_state`: divide the optimizer's state among the
    devices by whole parameters (`zero1`).
    """
    kind = Zero1Strategy if shards_state else DDPStrategy
    return Parallelism(
        name="zero1" if shards_state else "ddp",
        data_parallel_size=world_size,
        state_shards=world_size if shards_state else 1,
        whole_parameters=shards_state,
        strategy=lambda: kind(gradient_as_bucket_view=gradient_as_bucket_view, bucket_cap_mb=bucket_cap_mb),
    )


def tensor_parallel(world_size: int) -> Parallelism:
    """Every block's heads and hidden dimensions divided among all devices, which see the same data (1909.08053)."""
    layout = Parallelism(name="tensor_parallel", data_parallel_size=1, tensor_parallel_size=world_size)
    return replace(layout, strategy=lambda: MeshStrategy(layout))


def fsdp(
    world_size: int,
    *,
    replicate_size: PositiveInt = 1,
    shard_size: PositiveInt | None = None,
    tensor_parallel_size: PositiveInt = 1,
    reshard_after_forward: bool = True,
    sync_every_micro_batch: bool = False,
    cpu_offload: bool = False,
) -> Parallelism:
    """Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer state in as many shards as ranks.

    Devices are `replicate_size` groups, each of which holds the whole model in shards (`hsdp`: Zhao et al. 2304.11277),
    times `shard_size` ranks that divide it (None: what the others leave), times `tensor_parallel_size` that compute
    each block together (`fsdp_tp`), or ValueError. `reshard_after_forward` frees gathered parameters after the forward
    pass (ZeRO-3); false keeps them for the backward pass and saves one gather (ZeRO-2). `sync_every_micro_batch` sums
    the gradients of an accumulated step over ranks after each micro-batch and keeps a shard of them, instead of once at
    the end: more communication, less memory. With `cpu_offload`, parameters, gradients and optimizer state lie in the
    host's memory, and the optimizer computes there.
    """
    name = "fsdp_tp" if tensor_parallel_size > 1 else "hsdp" if replicate_size > 1 else "fsdp"
    groups = replicate_size * tensor_parallel_size
    shards = max(world_size // groups, 1) if shard_size is None else shard_size
    if groups * shards != world_size:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"strategy={name}: {replicate_size=} × shard_size={shards} × {tensor_parallel_size=} is not trainer.devices"
            f" × trainer.num_nodes = {world_size}: use sizes of {divisors}, and shard_size=null"
        )
    layout = Parallelism(
        name=name,
        data_parallel_size=replicate_size * shards,
        tensor_parallel_size=tensor_parallel_size,
        parameter_shards=shards,
        gradient_shards=shards if sync_every_micro_batch else 1,
        state_shards=shards,
        gathers=True,
        gathers_all=not reshard_after_forward,
        on_cpu=("parameters", "gradients", "optimizer_state") if cpu_offload else (),
    )
    return replace(layout, strategy=lambda: MeshStrategy(layout, sync_every_micro_batch))


class MeshStrategy(ModelParallelStrategy):
    """FSDP2 (where the layout gathers), tensor parallelism or both, on a mesh of devices: replicate × shard × tensor.

    Its checkpoints are those of a single process: whole tensors, the optimizer's state numbered in the order of its
    groups. So a run may go on under any other strategy, and any other run under this.
    """

    def __init__(self, layout: Parallelism, sync_every_micro_batch: bool = False):
        super().__init__(
            data_parallel_size=layout.data_parallel_size,
            tensor_parallel_size=layout.tensor_parallel_size,
            save_distributed_checkpoint=False,
            process_group_backend="cpu:gloo,cuda:nccl" if layout.on_cpu else None,
        )
        self.layout, self.sync_every_micro_batch = layout, sync_every_micro_batch
        self.tensor_parallel_size, self.shards = layout.tensor_parallel_size, layout.gathers
        self._data_mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        super().setup_environment()
        self._data_mesh = self.device_mesh["data_parallel"]
        shards = self.layout.parameter_shards
        if shards != self.layout.data_parallel_size:
            shape = (self.layout.data_parallel_size // shards, shards)
            self._data_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    @property
    def storage_device(self) -> torch.device:
        """Where parameters lie between uses."""
        return torch.device("cpu") if self.layout.on_cpu else self.root_device

    def parallelize(
        self, decoder: Decoder, compute_dtype: torch.dtype | None, compile_: Callable[[Decoder], None]
    ) -> None:
        """Divide a decoder on the meta device; its weights are then to be drawn, on `storage_device`.

        FSDP2 gathers parameters in `compute_dtype` (None: their own). `compile_` marks modules for compilation, which
        has its place between the two ways of dividing.
        """
        if self.tensor_parallel_size > 1:
            divide(decoder, self.device_mesh["tensor_parallel"])
        compile_(decoder)
        if self.shards:
            self._shard(decoder, compute_dtype)

    def _shard(self, decoder: Decoder, compute_dtype: torch.dtype | None) -> None:
        """Block by block. The rest, embeddings and head, is gathered during the whole forward and backward pass."""
        policies: dict[str, Any] = {
            # Inputs keep their dtype: angles of rotations would suffer from rounding.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy() if self.layout.on_cpu else OffloadPolicy(),
            "reshard_after_forward": not self.layout.gathers_all,
        }
        for block in decoder.blocks:
            fully_shard(block, mesh=self._data_mesh, **policies)
        fully_shard(decoder, mesh=self._data_mesh, **policies)
        # Gathers the parameters, too. Not `hidden`: forward calls it, and would find the head sharded again afterwards.
        register_fsdp_forward_method(decoder, "logits")

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last: gradients are summed over ranks once a step."""
        decoder = getattr(self.lightning_module, "decoder", None)
        if self.sync_every_micro_batch or not isinstance(decoder, FSDPModule):
            yield
            return
        decoder.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            decoder.set_requires_gradient_sync(True)

    def model_to_device(self) -> None:
        """Move the module; under CPU offloading only what is not the decoder's."""
        if not self.layout.on_cpu:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for name, module in self.lightning_module.named_children():
            if name != "decoder":
                module.to(self.root_device)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors on rank 0, as a single process' optimizer.state_dict(); nothing on other ranks."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        by_name = get_optimizer_state_dict(self.model, optimizer, options=options)
        if self.global_rank != 0:
            return {}
        states: dict[str, Any] = by_name["state"]  # type: ignore[assignment]
        names = self._names_of(optimizer)
        state = {number: states[name] for number, name in enumerate(names) if name in states}
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def _names_of(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters in the order of their numbers."""
        assert self.model is not None
        name_of = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [name_of[id(parameter)] for parameter in parameters_of(optimizer)]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any strategy: every rank takes its parts of the whole tensors."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.model is not None
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(checkpoint)  # Lightning calls it after this
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            names = self._names_of(optimizer)
            groups = [{**group, "params": [names[n] for n in group["params"]]} for group in saved["param_groups"]]
            state = {names[n]: values for n, values in saved["state"].items()}
            by_name: dict[str, Any] = {"state": state, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
        return checkpoint
