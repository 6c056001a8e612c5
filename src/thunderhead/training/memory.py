"""How much memory a run will need on each device: counted on fake tensors, before anything is allocated."""

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import LossTermError
from thunderhead.options.precision import Precision
from thunderhead.parallel.strategies import Parallelism
from thunderhead.parallel.tensor_parallel import share_of_parameters
from thunderhead.parallel.zero1 import parameters_of, parts_of

_log = logging.getLogger(__name__)

QUIET_STEPS = 2
"""Steps in a row that leave an optimizer's state as large as it was, after which it is taken for complete."""


@functools.lru_cache(maxsize=8)  # a run is planned again when its data is prepared
def estimate(
    decoder: Decoder,
    make_optimizer: Callable[[Decoder], torch.optim.Optimizer],
    *,
    micro_batch_size: int,
    precision: Precision,
    parallelism: Parallelism,
    accumulation: int = 1,
    accelerator: str = "cpu",
) -> dict[str, int]:
    """Bytes on one device of parameters, gradients, optimizer state, and activations at the moment when most are held.

    Where parameters are sharded, also of those gathered for computing: two blocks (one computes, the next is fetched),
    embeddings and head; or all. Under tensor parallelism activations are counted undivided, which is too many. With
    several micro-batches a step (`accumulation`), gradients may wait unsharded for the last. What attention keeps
    depends on the accelerator. A part that could not be counted is left out.

    One step runs on fake tensors, which have shapes and types but no storage. Activations are all that the forward and
    backward pass of a micro-batch hold beside parameters and gradients, at their peak: what is kept for the backward
    pass, what a checkpointed block computes again, logits, temporary results. Without compilation, which needs less.
    Left out: the optimizer's temporary results, the allocator's losses, and what libraries and the process itself take.
    """
    fakes, copies = FakeTensorMode(), dict[int, Tensor]()
    with fakes:
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    decoder = copy.deepcopy(decoder, copies)  # with these in the places of its own
    with fakes:
        parameters = list(decoder.parameters())
        parts: list[list[Tensor]] = [[*parameters]]
        if parallelism.whole_parameters:
            parts = parts_of(parameters_of(make_optimizer(decoder)), parallelism.state_shards)
        states = [_optimizer_state(lambda: make_optimizer(decoder), decoder, own) for own in parts]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        share, whole = share_of_parameters(decoder, parallelism.tensor_parallel_size), _bytes(parameters)
        waits = accumulation > 1 or not parallelism.gathers
        divided = {
            "parameters": (whole, parallelism.parameter_shards),
            "gradients": (whole, parallelism.gradient_shards if waits else parallelism.state_shards),
        }
        if None not in states:
            shards = 1 if parallelism.whole_parameters else parallelism.state_shards
            divided["optimizer_state"] = (max(state for state in states if state is not None), shards)
        bytes_of = {part: int(n * share / k) for part, (n, k) in divided.items() if part not in parallelism.on_cpu}
        if parallelism.gathers:
            blocks = [_bytes(block.parameters()) for block in decoder.blocks]
            at_once = whole if parallelism.gathers_all else whole - sum(blocks) + sum(sorted(blocks)[-2:])
            bytes_of["gathered"] = int(at_once * share)
        if accelerator != "cpu":
            for block in decoder.blocks:
                if getattr(block.attention, "backend", None) == "auto":
                    block.attention.backend = "sdpa"  # type: ignore[union-attr]  # not the way of CPUs
        activations = _activations_at_peak(decoder, micro_batch_size, precision)
        if activations is not None:
            bytes_of["activations"] = activations
    return bytes_of


def remarks(bytes_of: dict[str, int], parallelism: Parallelism) -> list[str]:
    """What `estimate` could not count."""
    reasons = {
        "optimizer_state": "the optimizer's state is not counted: it cannot step without values",
        "activations": "activations are not counted: a module's code looks at values",
    }
    return [reason for part, reason in reasons.items() if part not in {*bytes_of, *parallelism.on_cpu}]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _optimizer_state(make: Callable[[], torch.optim.Optimizer], decoder: Decoder, own: Iterable[Tensor]) -> int | None:
    """Bytes that an optimizer and its steps leave behind, wherever it keeps them, where `own` have gradients.

    The first step of some only begins a state that the second completes, so steps follow until QUIET_STEPS in a row
    add nothing. What an optimizer makes later than that is not seen.
    """
    decoder.zero_grad()
    for parameter in own:
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in own if parameter.grad is not None]
    with LiveBytes([*decoder.parameters(), *decoder.buffers(), *gradients], invent_values=True) as live:
        optimizer, quiet = make(), 0
        while quiet < QUIET_STEPS:
            before = live.now
            try:
                optimizer.step()
            except Exception as error:  # sizes that depend on values, or no PyTorch at all
                _log.debug("the state of %s cannot be counted: %s", type(optimizer).__name__, error)
                return None
            quiet = 0 if live.now > before else quiet + 1
    return int(live.now)


def _activations_at_peak(decoder: Decoder, micro_batch_size: int, precision: Precision) -> int | None:
    """Run a forward and a backward pass on fake tensors; parameters and their gradients exist already."""
    tokens_BT = torch.empty(micro_batch_size, decoder.context_length, dtype=torch.int64)
    parameters = list(decoder.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    precision.after_initialize(decoder, is_sharded=False)
    decoder.train()
    try:
        with LiveBytes([*parameters, *gradients, *decoder.buffers(), tokens_BT]) as live:
            with precision.autocast("cpu"):
                loss = decoder(tokens_BT, tokens_BT).loss
            loss.backward()
    except LossTermError:
        raise
    except Exception as error:  # a user's module may look at values; the plan then goes without this figure
        _log.debug("activations cannot be counted: %s", error)
        return None
    return int(live.peak)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations within it make, until they are freed; works on fake tensors too.

    What checkpointing by operation keeps is seen by no hook on saved tensors, but it is a storage. Those of `others`
    are there already and do not count. Code that asks a fake tensor for its value is an error, or with `invent_values`
    gets 0.5, or 1 from integers.
    """

    def __init__(self, others: Iterable[Tensor] = (), invent_values: bool = False):
        super().__init__()  # type: ignore[no-untyped-call]
        self.invent_values = invent_values
        self.now, self.peak = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note what it made."""
        if self.invent_values and operation is torch.ops.aten._local_scalar_dense.default:
            return 0.5 if arguments[0].is_floating_point() else 1
        output = operation(*arguments, **(settings or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return output

    def _freed(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.now -= n_bytes
