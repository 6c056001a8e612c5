"""The memory estimate on fake tensors against the bytes of real ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thunderhead import config
from thunderhead.model.decoder import Decoder
from thunderhead.training import memory
from thunderhead.training.module import build_decoder, build_optimizer
from thunderhead.training.parallel import Parallelism, fsdp, single, tensor_parallel
from tiny import tiny

VOCAB = 257


def resolved(*overrides: str) -> dict[str, Any]:
    return config.plain(config.compose(tiny("x", "x", *overrides)))


def estimate(
    settings: dict[str, Any], precision: str = "fp32", parallelism: Parallelism | None = None, accumulation: int = 1
) -> dict[str, int]:
    return memory.estimate(
        lambda: build_decoder(settings, VOCAB, 0),
        lambda decoder: build_optimizer(settings, decoder),
        micro_batch_size=3,
        precision=precision,
        parallelism=parallelism or single(1),
        accumulation=accumulation,
    )


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def real_step(settings: dict[str, Any], precision: torch.dtype = torch.float32) -> tuple[Decoder, Any, int]:
    """A decoder and optimizer after one step, and the bytes that autograd saved beside the parameters."""
    decoder = build_decoder(settings, VOCAB, 0)
    decoder.initialize(0)
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BT = torch.randint(0, VOCAB, (3, decoder.context_length))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32),
    ):
        loss = decoder(tokens_BT, tokens_BT).loss
    n_saved = sum(t.untyped_storage().nbytes() for t in saved.values())
    loss.backward()
    optimizer = build_optimizer(settings, decoder)
    optimizer.step()
    return decoder, optimizer, n_saved


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_parameters_gradients_and_optimizer_state_are_exact(optimizer: str) -> None:
    settings = resolved(f"optimizer={optimizer}")
    estimated = estimate(settings)
    decoder, real, _ = real_step(settings)
    assert estimated["parameters"] == bytes_of(decoder.parameters())
    assert estimated["gradients"] == bytes_of(p.grad for p in decoder.parameters())
    states = [t for state in real.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert estimated["optimizer_state"] == bytes_of(states)


@pytest.mark.parametrize("choice", [(), ("activation_checkpointing=block",), ("attention=mha", "norm=layernorm")])
def test_activations_are_what_autograd_saves(choice: tuple[str, ...]) -> None:
    settings = resolved(*choice)
    saved = real_step(settings)[2]
    # fake tensors may take another attention kernel, which keeps slightly different statistics
    assert estimate(settings)["activations"] == pytest.approx(saved, rel=0.1)


def test_checkpointing_and_half_precision_need_less() -> None:
    plain, checkpointed = estimate(resolved()), estimate(resolved("activation_checkpointing=block"))
    assert checkpointed["activations"] < plain["activations"] / 2
    assert checkpointed["parameters"] == plain["parameters"]
    mixed, true = estimate(resolved(), "bf16-mixed"), estimate(resolved(), "bf16-true")
    assert mixed["activations"] < plain["activations"]
    assert mixed["optimizer_state"] == plain["optimizer_state"]
    assert true["parameters"] == plain["parameters"]  # master weights
    assert true["activations"] < mixed["activations"]


def test_shards_divide_all_but_activations() -> None:
    whole, quarter = estimate(resolved()), estimate(resolved(), parallelism=fsdp(4))
    assert quarter["activations"] == whole["activations"]
    for part in ("parameters", "gradients", "optimizer_state"):
        assert quarter[part] == whole[part] // 4
    assert quarter["gathered"] == whole["parameters"]  # of two blocks, both


def test_gradients_wait_unsharded_for_the_last_micro_batch() -> None:
    whole, at_end = estimate(resolved()), estimate(resolved(), parallelism=fsdp(4), accumulation=2)
    each = estimate(resolved(), parallelism=fsdp(4, sync_every_micro_batch=True), accumulation=2)
    assert at_end["gradients"] == whole["gradients"]
    assert each["gradients"] == whole["gradients"] // 4


def test_gathered_are_two_blocks_and_the_rest() -> None:
    deep = resolved("model.n_layers=8")
    decoder = build_decoder(deep, VOCAB, 0)
    blocks = bytes_of(decoder.blocks.parameters())
    rest = bytes_of(decoder.parameters()) - blocks
    assert estimate(deep, parallelism=fsdp(4))["gathered"] == rest + blocks // 4
    assert estimate(deep, parallelism=fsdp(4, reshard_after_forward=False))["gathered"] == rest + blocks


def test_tensor_parallelism_divides_what_its_plan_divides() -> None:
    whole, half = estimate(resolved()), estimate(resolved(), parallelism=tensor_parallel(2))
    decoder = build_decoder(resolved(), VOCAB, 0)
    norms = 4 * decoder.parameter_counts()["norm"]
    for part in ("parameters", "gradients"):
        assert half[part] == (whole[part] - norms) // 2 + norms
    assert half["optimizer_state"] == pytest.approx((whole["optimizer_state"] - 2 * norms) / 2 + 2 * norms, rel=1e-3)


class Stubborn(nn.Module):
    """A norm that looks at values, which fake tensors do not have."""

    def __init__(self, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum().item() < 1e9 else x


def test_what_cannot_be_counted_is_left_out() -> None:
    settings = resolved() | {"norm": {"_target_": f"{__name__}.Stubborn"}}
    estimated = estimate(settings)
    assert "activations" not in estimated
    assert estimated["parameters"] > 0
