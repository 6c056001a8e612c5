"""Branches hand out named terms of the loss, through every kind of block, checkpointing, compilation and wrapper."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from oracles import options, values
from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.block import Block, ResidualDropout
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.feedforward import GatedFeedForward
from thunderhead.core.model.loss import Auxiliary, LossTerms, NextTokenLoss
from thunderhead.core.model.position import RotaryPosition
from thunderhead.options.activation_checkpointing import ActivationCheckpointing, SelectiveCheckpointing

TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
CHECKPOINTING = {
    "none": ActivationCheckpointing,
    "block": partial(ActivationCheckpointing, every=1),
    "every_kth": partial(ActivationCheckpointing, every=2),
    "selective": SelectiveCheckpointing,
    "second": partial(SelectiveCheckpointing, keep_every_matmul=2),
}


class Activity(GatedFeedForward):
    """A feed-forward branch that is punished for large outputs, in every layer but the first."""

    def __init__(self, d_model: int, d_ff: int | None, bias: bool, layer_index: int) -> None:
        super().__init__(d_model, d_ff, bias, gate="silu")
        self.is_punished = layer_index > 0

    def forward(self, x_BTD: Tensor) -> Tensor | tuple[Tensor, Auxiliary]:
        y_BTD = super().forward(x_BTD)
        return (y_BTD, {"activity": 0.1 * y_BTD.square().mean()}) if self.is_punished else y_BTD


class Sharp(GroupedQueryAttention):
    """An attention with two terms, one of which has the name of the feed-forward's."""

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        y_BTD = super().forward(x_BTD, context)
        return y_BTD, {"activity": 0.3 * y_BTD.abs().mean(), "bias": 0.2 * y_BTD.mean().square()}


def build(block: Any = Block, checkpointing: str = "none", **settings: Any) -> Decoder:
    decoder = Decoder(
        61, None, Sharp, RotaryPosition, Activity, nn.RMSNorm, ResidualDropout, block,
        partial(NextTokenLoss, z_loss=0.01), CHECKPOINTING[checkpointing],
        n_layers=3, d_model=32, n_heads=4, context_length=16, **settings,
    )  # fmt: skip
    decoder.initialize(seed=1)
    return decoder


def gradients(decoder: Any) -> tuple[LossTerms, dict[str, Tensor]]:
    terms = decoder(TOKENS[:, :-1], TOKENS[:, 1:])
    terms.loss.backward()
    return terms, {name: parameter.grad for name, parameter in decoder.named_parameters()}


def assert_same(found: tuple[LossTerms, dict[str, Tensor]], expected: tuple[LossTerms, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_terms_of_all_layers_are_summed_by_name_and_enter_the_loss() -> None:
    decoder, outputs = build(), []
    for block in decoder.blocks:
        for branch in (block.attention, block.feedforward):
            branch.register_forward_hook(lambda _, __, output: outputs.append(output))
    terms, _ = gradients(decoder)
    own = [output[1] for output in outputs if isinstance(output, tuple)]
    assert len(own) == 5  # three attentions, two feed-forward branches
    assert terms.auxiliary.keys() == {"z_loss", "activity", "bias"}
    torch.testing.assert_close(terms.auxiliary["activity"], sum(each["activity"] for each in own))
    torch.testing.assert_close(terms.auxiliary["bias"], sum(each.get("bias", 0.0) for each in own))
    torch.testing.assert_close(terms.loss, terms.cross_entropy + sum(terms.auxiliary.values()))


@pytest.mark.parametrize("option", options("block"))
def test_every_block_hands_them_on(option: str) -> None:
    decoder = build(instantiate(values("block", option), _partial_=True))
    assert gradients(decoder)[0].auxiliary.keys() == {"z_loss", "activity", "bias"}
    assert decoder.logits(TOKENS[:, :-1]).shape == (2, 16, 61)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_changes_nothing(checkpointing: str) -> None:
    assert_same(gradients(build(checkpointing=checkpointing)), gradients(build()))


@pytest.mark.parametrize(("checkpointing", "scope"), [("none", "model"), ("every_kth", "block"), ("second", "model")])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compiling_changes_nothing(checkpointing: str, scope: str) -> None:
    decoder = build(checkpointing=checkpointing)
    for module in decoder.blocks if scope == "block" else [decoder]:
        module.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(gradients(decoder), gradients(build()))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_changes_nothing() -> None:
    terms, found = gradients(DistributedDataParallel(build()))
    assert_same((terms, {name.removeprefix("module."): g for name, g in found.items()}), gradients(build()))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_fsdp_changes_nothing(checkpointing: str) -> None:
    decoder = build(checkpointing=checkpointing)
    for block in decoder.blocks:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    fully_shard(decoder, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    terms, found = gradients(decoder)
    assert_same((terms, {name: g.full_tensor() for name, g in found.items()}), gradients(build()))


def test_there_are_none_without_a_cause() -> None:
    decoder = Decoder(
        61, None, GroupedQueryAttention, RotaryPosition, partial(GatedFeedForward, gate="silu"), nn.RMSNorm,
        ResidualDropout, Block, NextTokenLoss, ActivationCheckpointing,
        n_layers=1, d_model=32, n_heads=4, context_length=16,
    )  # fmt: skip
    decoder.initialize(seed=1)
    terms = decoder(TOKENS[:, :-1], TOKENS[:, 1:])
    assert terms.auxiliary == {}
    assert terms.loss is terms.cross_entropy
