"""The strategy group: how a run is spread over devices."""

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from thunderhead.model.decoder import Decoder


def auto(world_size: int) -> Strategy | str:
    """One device without ceremony; DDP over several."""
    return ddp(world_size) if world_size > 1 else "auto"


def single(world_size: int) -> str:
    """One device.

    Raises:
        ValueError: more devices were asked for.
    """
    if world_size > 1:
        raise ValueError(
            f"strategy=single runs on one device, but trainer.devices × trainer.num_nodes = {world_size}: "
            "use strategy=ddp or strategy=fsdp, or trainer.devices=1"
        )
    return "auto"


def ddp(world_size: int, *, gradient_as_bucket_view: bool = True, bucket_cap_mb: int = 25) -> Strategy:
    """A replica of the model on every device; gradients are averaged in the backward pass (Li et al. 2006.15704)."""
    return DDPStrategy(
        gradient_as_bucket_view=gradient_as_bucket_view,
        bucket_cap_mb=bucket_cap_mb,
        find_unused_parameters=False,
    )


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer state in as many shards as there are devices (ZeRO, 1910.02054)."""

    def __init__(self, world_size: int, reshard_after_forward: bool):
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.reshard_after_forward = reshard_after_forward


def fsdp(world_size: int, *, reshard_after_forward: bool = True) -> Strategy:
    """Fully sharded data parallelism.

    Args:
        world_size: data-parallel ranks.
        reshard_after_forward: free the gathered parameters after the forward pass (ZeRO-3); false keeps them for the
            backward pass and saves one gather (ZeRO-2).
    """
    return FullyShardedStrategy(world_size, reshard_after_forward)


def shard(decoder: Decoder, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """Shard a decoder on the meta device, block by block, over the mesh's data-parallel dimension."""
    for block in decoder.blocks:
        fully_shard(block, mesh=mesh["data_parallel"], reshard_after_forward=reshard_after_forward)
    fully_shard(decoder, mesh=mesh["data_parallel"], reshard_after_forward=reshard_after_forward)
    # Gathers the parameters, too. Not `hidden`: forward calls it, and would find the head sharded again afterwards.
    register_fsdp_forward_method(decoder, "logits")
