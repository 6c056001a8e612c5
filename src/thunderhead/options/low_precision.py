"""Computing in fewer bits than the weights are kept in, where autocast does not do it."""

import torch
from torch import Tensor, nn

from thunderhead.core.model.decoder import Decoder
from thunderhead.parallel.styles import view_parameters

FP8_MULTIPLE = 16  # float8 matrix multiplication wants both sizes to be multiples of it


def compute_in(decoder: Decoder, dtype: torch.dtype) -> None:
    """Let every module compute with its weights rounded to dtype; the weights themselves, float32, are what is trained.

    Gradients arrive in float32. Without such master weights bfloat16 loses updates: its spacing is 1/128 of a weight,
    and a step changes most weights by less (Micikevicius et al. 1710.03740, section 3.1). FSDP2 does the same by its
    MixedPrecisionPolicy.
    """

    def rounded(parameter: Tensor) -> Tensor:
        return parameter.to(dtype)

    for module in list(decoder.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            view_parameters(module, rounded)


def multiply_in_fp8(decoder: Decoder, emulate: bool = False) -> None:
    """Let the blocks' linear layers multiply in float8, with one scale a tensor (torchao); names and weights stay.

    Args:
        decoder: before it is sharded or compiled.
        emulate: compute in the usual formats what float8 would give, for tests on machines without it.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_fitting(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not (
            module.in_features % FP8_MULTIPLE or module.out_features % FP8_MULTIPLE
        )

    for block in decoder.blocks:
        before = {name: module for name, module in block.named_modules() if getattr(module, "adds_to_residual", False)}
        convert_to_float8_training(block, module_filter_fn=is_fitting, config=Float8LinearConfig(emulate=emulate))
        for name in before:
            block.get_submodule(name).adds_to_residual = True  # type: ignore[assignment]
