"""How much memory a run will need on each device: counted on fake tensors, before anything is allocated."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thunderhead.model.decoder import Decoder
from thunderhead.model.tensor_parallel import share_of_parameters
from thunderhead.training.hardware import COMPUTE_DTYPE, is_mixed
from thunderhead.training.low_precision import compute_in
from thunderhead.training.parallel import Parallelism

_log = logging.getLogger(__name__)


def estimate(
    build: Callable[[], Decoder],
    optimizer: Callable[[Decoder], torch.optim.Optimizer],
    *,
    micro_batch_size: int,
    precision: str,
    parallelism: Parallelism,
    accumulation: int = 1,
) -> dict[str, int]:
    """Bytes on one device of parameters, gradients, optimizer state, and activations that wait for the backward pass.

    Where parameters are sharded, also of those gathered for computing: two blocks (one computes, the next is fetched),
    embeddings and head; or all. Under tensor parallelism activations are counted undivided, which is too many.

    One forward pass and one optimizer step run on fake tensors, which have shapes and types but no storage; what
    autograd saves and what the optimizer keeps is added up. Left out: temporary buffers, the allocator's losses, and
    what libraries and the process itself take.

    Args:
        build: makes the decoder.
        optimizer: makes the optimizer of a decoder.
        micro_batch_size: sequences of a forward pass.
        precision: a resolved kind, see `hardware.Precision`.
        parallelism: what is divided among how many devices.
        accumulation: micro-batches of a step; with several, gradients may wait unsharded for the last.

    Returns:
        Bytes by part; a part that could not be counted is left out.
    """
    with FakeTensorMode():
        decoder = build()
        parameters = list(decoder.parameters())
        bytes_of = {"parameters": _bytes(parameters), "gradients": _bytes(parameters)}
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        state = _optimizer_state(optimizer(decoder))
        if state is not None:
            bytes_of["optimizer_state"] = state
        share = share_of_parameters(decoder, parallelism.tensor_parallel_size)
        shards = {
            "parameters": parallelism.parameter_shards,
            "gradients": parallelism.gradient_shards if accumulation > 1 else parallelism.state_shards,
            "optimizer_state": parallelism.state_shards,
        }
        whole = bytes_of["parameters"]
        bytes_of = {part: int(n * share / shards[part]) for part, n in bytes_of.items()}
        if parallelism.on_cpu:
            bytes_of = {}
        if parallelism.gathers:
            blocks = [_bytes(block.parameters()) for block in decoder.blocks]
            at_once = whole if parallelism.gathers_all else whole - sum(blocks) + sum(sorted(blocks)[-2:])
            bytes_of["gathered"] = int(at_once * share)
        activations = _saved_for_backward(decoder, micro_batch_size, precision)
        if activations is not None:
            bytes_of["activations"] = activations
    return bytes_of


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> int | None:
    try:
        optimizer.step()
    except Exception as error:  # an optimizer that looks at values cannot run on fake tensors; its state may be there
        _log.debug("%s does not run on fake tensors: %s", type(optimizer).__name__, error)
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    complete = len(optimizer.state) == len(parameters) or not optimizer.state
    return _bytes(tensors) if complete else None


def _saved_for_backward(decoder: Decoder, micro_batch_size: int, precision: str) -> int | None:
    parameters = {id(p.untyped_storage()) for p in decoder.parameters()}
    saved: dict[int, int] = {}
    keep = []  # storages must live while their ids are compared

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in parameters and not isinstance(tensor, nn.Parameter):
            keep.append(tensor)
            saved[storage._cdata] = storage.nbytes()
        return tensor

    tokens_BT = torch.empty(micro_batch_size, decoder.context_length, dtype=torch.int64)
    dtype = COMPUTE_DTYPE[precision]
    if precision == "bf16-true":
        compute_in(decoder, dtype)
    decoder.train()
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=is_mixed(precision)),
        ):
            decoder(tokens_BT, tokens_BT)
    except Exception as error:  # a user's module may look at values; the plan then goes without this figure
        _log.debug("activations cannot be counted: %s", error)
        return None
    return sum(saved.values())
