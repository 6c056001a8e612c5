"""Activation checkpointing: spend computation to save memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from thunderhead.core.model.context import SequenceContext
from thunderhead.core.types import NonNegativeInt

_aten = torch.ops.aten
MATMULS = {_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default}
"""What linear layers do. Not bmm: attention's scores, where no fused kernel computes them, are what costs memory."""
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


class ActivationCheckpointing:
    """Keep only the input of some blocks and compute their insides again in the backward pass (Chen et al. 1604.06174).

    - every: 0 = no block, 1 = each block, n = the first of every n blocks.
    """

    recomputes: Literal["whole", "part"] = "whole"  # of a block

    def __init__(self, *, every: NonNegativeInt = 0) -> None:
        self.every = every

    def apply(self, index: int, block: nn.Module) -> None:
        """Let block number `index` be checkpointed, or leave it as it is.

        It happens inside of the block's forward: compiling the block compiles it, too, and names of parameters stay.
        """
        if not self.every or index % self.every:
            return
        cls, run = type(block), self.run

        def forward(self: nn.Module, x_BTD: Tensor, context: SequenceContext) -> Tensor:
            inside = partial(cls.forward, self)
            y_BTD: Tensor = run(inside, x_BTD, context) if torch.is_grad_enabled() else inside(x_BTD, context)
            return y_BTD

        block.__class__ = type(cls.__name__, (cls,), {"forward": forward, "checkpointed": self.recomputes})

    def run(self, inside: Callable[..., Tensor], x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """Compute inside(x_BTD, context) now, and again in the backward pass."""
        y_BTD: Tensor = checkpoint(inside, x_BTD, context, use_reentrant=False)
        return y_BTD


class SelectiveCheckpointing(ActivationCheckpointing):
    """In each block, keep what is costly to compute and compute the rest again, as torchtitan does by operation.

    Attention with dropout is always computed again: those after it would draw other random numbers if it were left out.

    - keep_attention: keep attention's output and the statistics of its softmax.
    - keep_every_matmul: of the outputs of a block's linear layers keep each (1), every n-th (n), or none (0). More than
      1 computes the others again, for less memory; torchtitan takes 2.

    Raises ValueError if nothing is to be kept.
    """

    recomputes = "part"

    def __init__(self, *, keep_attention: bool = True, keep_every_matmul: NonNegativeInt = 1) -> None:
        super().__init__(every=1)
        if not keep_attention and not keep_every_matmul:
            nothing = "activation_checkpointing.keep_attention=false and keep_every_matmul=0 keep nothing"
            raise ValueError(f"{nothing}: use activation_checkpointing=block")
        self.keep_attention = keep_attention
        self.keep_every_matmul = keep_every_matmul

    def run(self, inside: Callable[..., Tensor], x_BTD: Tensor, context: SequenceContext) -> Tensor:
        """Compute inside(x_BTD, context) now, and what is not kept of it again in the backward pass."""
        # made here, of constants: all that torch.compile can take
        contexts = partial(_contexts, self.keep_attention, self.keep_every_matmul)
        y_BTD: Tensor = checkpoint(inside, x_BTD, context, use_reentrant=False, context_fn=contexts)
        return y_BTD


def _contexts(keep_attention: bool, keep_every_matmul: int) -> Any:
    """What surrounds one forward pass of one block, and its repetition."""
    return create_selective_checkpoint_contexts(policy(keep_attention, keep_every_matmul))  # type: ignore[no-untyped-call]


def policy(keep_attention: bool, keep_every_matmul: int) -> Callable[..., CheckpointPolicy]:
    """Says of each operation of one forward pass whether its output is kept; see `SelectiveCheckpointing`."""
    n_matmuls = {False: 0, True: 0}  # in the pass, and in its repetition, where older torch asks again

    def decide(context: Any, operation: Any, *arguments: Any, **settings: Any) -> CheckpointPolicy:
        is_repetition, is_kept = getattr(context, "is_recompute", False), False
        if operation in ATTENTION:
            is_kept = keep_attention and not _drops(operation, arguments, settings)
        elif operation in MATMULS and keep_every_matmul:
            n_matmuls[is_repetition] += 1
            is_kept = n_matmuls[is_repetition] % keep_every_matmul == 0
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return decide


def _drops(operation: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> bool:
    """Whether an attention kernel is asked to drop probabilities."""
    if not isinstance(operation, torch._ops.OpOverload):
        return False  # flex_attention has no dropout
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, arguments, strict=False)) | settings).get("dropout_p", 0.0))
