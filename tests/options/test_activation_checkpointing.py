from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from oracles import CONF
from thunderhead.core.model.decoder import Decoder
from thunderhead.options import activation_checkpointing as checkpointing
from thunderhead.options.activation_checkpointing import SelectiveCheckpointing, policy

ATTENTIONS = sorted(file.stem for file in (CONF / "attention").glob("*.yaml"))
OPTIONS = {
    "block": ["activation_checkpointing=block"],
    "every_kth": ["activation_checkpointing=every_kth"],
    "selective": ["activation_checkpointing=selective"],
    "second": ["activation_checkpointing=selective", "activation_checkpointing.keep_every_matmul=2"],
    "attention": ["activation_checkpointing=selective", "activation_checkpointing.keep_every_matmul=0"],
    "matmuls": ["activation_checkpointing=selective", "activation_checkpointing.keep_attention=false"],
}
DROPOUT = ["dropout=gpt2", "attention.dropout=0.1"]
aten = torch.ops.aten
FORWARD, REPETITION = (SelectiveCheckpointContext(is_recompute=again) for again in (False, True))


def loss_and_gradients(decoder: Decoder, autocast: bool = False) -> tuple[float, dict[str, Any], torch.Tensor]:
    """Of random tokens; and the next random number."""
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = decoder.train()(tokens[:, :-1], tokens[:, 1:]).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in decoder.named_parameters()}, torch.rand(1)


def assert_same(a: tuple[float, dict[str, Any], torch.Tensor], b: tuple[float, dict[str, Any], torch.Tensor]) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], gradient) for name, gradient in b[1].items())
    assert torch.equal(a[2], b[2]), "the random numbers that follow are the same, too"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dropout", [[], DROPOUT], ids=["plain", "dropout"])
def test_loss_gradients_and_random_numbers_are_the_same(
    build: Callable[..., Decoder], attention: str, dropout: list[str], option: str
) -> None:
    model = ["model.n_layers=3", f"attention={attention}", *dropout]
    assert_same(loss_and_gradients(build(*model, *OPTIONS[option])), loss_and_gradients(build(*model)))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("masks", [["attention.document_mask=true"], ["position=alibi"], ["block=parallel"]])
def test_it_is_so_under_autocast_and_with_masks(build: Callable[..., Decoder], masks: list[str], option: str) -> None:
    model = [*masks, "dropout=gpt2", "loss.chunk_size=8"]
    checkpointed, plain = build(*model, *OPTIONS[option]), build(*model)
    assert_same(loss_and_gradients(checkpointed, autocast=True), loss_and_gradients(plain, autocast=True))


@pytest.mark.parametrize(
    ("option", "scope"),
    [
        *(("selective", "block"), ("block", "model")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("block", "block"), ("second", "block"), ("selective", "model"), ("second", "model"))
        ),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_it_is_so_when_compiled(build: Callable[..., Decoder], scope: str, option: str) -> None:
    """Without dropout on backend=eager, which does not repeat random numbers; with it on aot_eager, which does."""
    for backend, dropout in (("eager", []), ("aot_eager", DROPOUT)):
        decoders = build(*dropout, *OPTIONS[option]), build(*dropout)
        for decoder in decoders:
            for module in decoder.blocks if scope == "block" else [decoder]:
                module.compile(backend=backend, fullgraph=True, dynamic=False)
        assert_same(*(loss_and_gradients(decoder) for decoder in decoders))


def count(decoder: Decoder, *operations: Any) -> int:
    """How often operations run in a backward pass beyond those of its own derivatives: how often they are repeated."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += operation in operations
            return operation(*args, **(kwargs or {}))

    tokens = torch.randint(61, (2, 16))
    loss = decoder.train()(tokens, tokens).loss
    with Count() as counted:
        loss.backward()
    return counted.n


def test_what_is_computed_again(build: Callable[..., Decoder]) -> None:
    flash, product = aten._scaled_dot_product_flash_attention_for_cpu.default, aten.mm.default
    activation = aten.silu.default

    def repeated(option: str, *operations: Any) -> int:
        decoders = (build("model.n_layers=4", *settings) for settings in (OPTIONS[option], []))
        checkpointed, plain = (count(decoder, *operations) for decoder in decoders)
        return checkpointed - plain

    # of 4 layers, with 7 products each, the last of which nothing needs again
    assert repeated("block", activation) == repeated("block", flash) == 4
    assert repeated("every_kth", activation) == repeated("every_kth", flash) == 2
    assert repeated("selective", activation) == 4
    assert repeated("selective", flash) == repeated("selective", product) == 0
    assert repeated("second", flash) == 0
    assert repeated("second", product) in (3 * 4, 4 * 4)  # those numbered 1, 3, 5 (and 7)
    assert repeated("attention", flash) == 0
    assert repeated("attention", product) == repeated("block", product)
    assert repeated("matmuls", flash) == 4
    assert repeated("matmuls", product) == 0


def test_attention_that_drops_is_not_kept() -> None:
    """Skipping it would shift the random numbers of the dropouts after it."""
    keep = policy(keep_attention=True, keep_every_matmul=1)
    q = torch.empty(0)
    flash, efficient = (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    )
    assert keep(FORWARD, flash, q, q, q, 0.0, True) is CheckpointPolicy.MUST_SAVE
    assert keep(FORWARD, flash, q, q, q, scale=0.1) is CheckpointPolicy.MUST_SAVE
    assert keep(FORWARD, flash, q, q, q, 0.1, True) is CheckpointPolicy.PREFER_RECOMPUTE
    assert keep(FORWARD, flash, q, q, q, dropout_p=0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    assert keep(FORWARD, efficient, q, q, q, None, True, 0.1) is CheckpointPolicy.PREFER_RECOMPUTE
    assert keep(FORWARD, torch.ops.higher_order.flex_attention, q, q, q) is CheckpointPolicy.MUST_SAVE


def test_the_repetition_is_told_the_same_as_the_pass() -> None:
    """Before 2.13 torch asks again in it: of seven products it must find those kept that were."""
    keep, a = policy(keep_attention=True, keep_every_matmul=2), torch.empty(0)
    told = [[keep(context, aten.mm.default, a, a) for _ in range(7)] for context in (FORWARD, REPETITION)]
    assert told[0] == told[1]
    assert [answer is CheckpointPolicy.MUST_SAVE for answer in told[0]] == [False, True] * 3 + [False]


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="keep nothing: use activation_checkpointing=block"):
        SelectiveCheckpointing(keep_attention=False, keep_every_matmul=0)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["activation_checkpointing=none"], []),
        (["activation_checkpointing=block"], [0, 1, 2]),
        (["activation_checkpointing=every_kth"], [0, 2]),
        (["activation_checkpointing=every_kth", "activation_checkpointing.every=3"], [0]),
        (["activation_checkpointing=selective"], [0, 1, 2]),
    ],
)
def test_which_blocks_are_checkpointed(
    build: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, option: list[str], expected: list[int]
) -> None:
    decoder = build("model.n_layers=3", *option)
    assert decoder.state_dict().keys() == build("model.n_layers=3").state_dict().keys()
    blocks, seen = list(decoder.blocks), []
    original = checkpointing.checkpoint

    def spy(inside: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(blocks.index(inside.args[0]))
        return original(inside, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", spy)
    decoder.hidden(torch.randint(61, (2, 16)))
    assert seen == expected
    with torch.no_grad():
        decoder.hidden(torch.randint(61, (2, 16)))
    assert seen == expected, "nothing to recompute without gradients"
