"""The memory estimate on fake tensors against the bytes of real ones."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from oracles import storages
from thunderhead.core import config
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import ModelSpec
from thunderhead.options.precision import Precision
from thunderhead.parallel.strategies import Parallelism, fsdp, single, tensor_parallel
from thunderhead.training import memory
from tiny import tiny

VOCAB = 257
SEQUENCES = 12  # of a micro-batch: activations that outweigh the workspaces of kernels, of which the plan knows nothing
SMALL = ("model.n_layers=6", "model.d_model=64")  # blocks that outweigh the logits
FLASH = "attention.backend=sdpa"  # what a CPU does instead in 16 bits keeps more than flash kernels


def resolved(*overrides: str) -> dict[str, Any]:
    return config.plain(config.compose(tiny("x", "x", *overrides)))


def build_decoder(settings: dict[str, Any]) -> Decoder:
    return ModelSpec.of(settings).decoder(VOCAB, 0)


def estimate(
    settings: dict[str, Any], precision: str = "fp32", parallelism: Parallelism | None = None, accumulation: int = 1
) -> dict[str, int]:
    return memory.estimate(
        build_decoder(settings),
        ModelSpec.of(settings).optimizer,
        micro_batch_size=SEQUENCES,
        precision=Precision(kind=precision),
        parallelism=parallelism or single(1),
        accumulation=accumulation,
    )


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def real_step(settings: dict[str, Any]) -> tuple[Decoder, Any]:
    """A decoder and optimizer after one step."""
    decoder = build_decoder(settings)
    decoder.initialize(0)
    tokens_BT = torch.randint(0, VOCAB, (SEQUENCES, decoder.context_length))
    decoder(tokens_BT, tokens_BT).loss.backward()
    optimizer = ModelSpec.of(settings).optimizer(decoder)
    optimizer.step()
    return decoder, optimizer


def allocated_at_peak(settings: dict[str, Any], precision: str) -> int:
    """Bytes that torch's CPU allocator hands out in a forward and backward pass, at their peak, as the profiler saw."""
    decoder = build_decoder(settings).train()
    decoder.initialize(0)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens_BT = torch.randint(0, VOCAB, (SEQUENCES, decoder.context_length))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with Precision(kind=precision).autocast("cpu"):
            loss = decoder(tokens_BT, tokens_BT).loss
        loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_parameters_gradients_and_optimizer_state_are_exact(optimizer: str) -> None:
    settings = resolved(f"optimizer={optimizer}")
    estimated = estimate(settings)
    decoder, real = real_step(settings)
    assert estimated["parameters"] == bytes_of(decoder.parameters())
    assert estimated["gradients"] == bytes_of(p.grad for p in decoder.parameters())
    states = [t for state in real.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert estimated["optimizer_state"] == bytes_of(states)


class Hoarder(torch.optim.Optimizer):
    """Keeps tensors wherever a tensor can be kept: what the plan knows of containers must not matter."""

    def __init__(self, params: Any, *, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.count = torch.zeros(1000)
        self.late: dict[Any, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["nested"] = {"pair": (p.clone(), [p.double(), {"deep": p.half()}]), "number": 3}
                    state["view"] = state["nested"]["pair"][0][:1]  # of a storage that is there
                elif len(self.late) < len(self.state):
                    self.late[p] = torch.zeros(p.numel(), 2)


class Observer(Hoarder):
    """Looks at values, as those do that adapt their own learning rate."""

    def step(self, closure: Any = None) -> None:
        super().step()
        if self.count[0].item() > 0 and float(sum(p.grad.norm() for p in self.param_groups[0]["params"])) >= 0:
            self.state.setdefault("distance", {"d": torch.zeros(5000)})


class Chooser(Hoarder):
    """Keeps as many numbers as there are of some kind, which nobody can foresee."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.chosen = self.param_groups[0]["params"][0].grad.nonzero()


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": f"{__name__}.Hoarder", "lr": 0.1},
        {"_target_": f"{__name__}.Observer", "lr": 0.1},
        {"_target_": "torch.optim.SGD", "lr": 0.1},
        {"_target_": "torch.optim.AdamW", "lr": 0.1, "foreach": False, "amsgrad": True},
        pytest.param({"_target_": "torch.optim.RAdam", "lr": 0.1}, marks=pytest.mark.slow),
        pytest.param({"_target_": "torch.optim.Adam", "lr": 0.1}, marks=pytest.mark.slow),
        pytest.param({"_target_": "torch.optim.Adagrad", "lr": 0.1}, marks=pytest.mark.slow),
        pytest.param({"_target_": "torch.optim.Rprop", "lr": 0.1}, marks=pytest.mark.slow),
        pytest.param({"_target_": "torch.optim.NAdam", "lr": 0.1}, marks=pytest.mark.slow),
        {"_target_": "torch.optim.Adafactor", "lr": 0.1},
        {"_target_": "torch.optim.Muon", "lr": 0.1},
    ],
    ids=lambda node: node["_target_"].rpartition(".")[2],
)
def test_the_state_of_any_optimizer_is_what_it_really_holds(node: dict[str, Any]) -> None:
    settings = resolved() | {"optimizer": node}
    if node["_target_"].endswith("Muon"):  # torch's own takes matrices only
        settings["parameter_groups"] = {"_target_": f"{__name__}.only_matrices"}
    estimated = estimate(settings)
    decoder = build_decoder(settings)
    decoder.initialize(0)
    for parameter in decoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = storages()
    optimizer = ModelSpec.of(settings).optimizer(decoder)
    for _ in range(5):
        optimizer.step()
    real = sum(n_bytes for address, n_bytes in storages().items() if address not in before)
    assert estimated["optimizer_state"] == pytest.approx(real, rel=0.05, abs=1024)


def only_matrices(model: nn.Module) -> list[dict[str, Any]]:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)  # others would be refused, as never trained
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def test_a_state_that_nobody_can_foresee_is_left_out() -> None:
    estimated = estimate(resolved() | {"optimizer": {"_target_": f"{__name__}.Chooser", "lr": 0.1}})
    assert "optimizer_state" not in estimated
    (remark,) = memory.remarks(estimated, single(1))
    assert remark == "the optimizer's state is not counted: it cannot step without values"
    assert memory.remarks(estimate(resolved()), single(1)) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize(
    "choice",
    [
        (),
        ("attention=mha", "norm=layernorm", "dropout=gpt2"),
        ("loss.chunk_size=16",),
        ("activation_checkpointing=selective",),
        ("activation_checkpointing=selective", "activation_checkpointing.keep_every_matmul=2"),
        ("activation_checkpointing=every_kth",),
        ("activation_checkpointing=block", "attention=mla"),
    ],
    ids=" ".join,
)
def test_activations_are_what_the_allocator_hands_out(choice: tuple[str, ...], precision: str) -> None:
    settings = resolved(*SMALL, *choice)
    measured = allocated_at_peak(settings, precision)
    assert estimate(settings, precision)["activations"] == pytest.approx(measured, rel=0.05)


class Experts(nn.Module):
    """A mixture of experts that computes all of them and weighs them, with a loss term of its own."""

    def __init__(self, d_model: int, d_ff: int | None, bias: bool) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, 4, bias=False)
        self.up_proj, self.down_proj = nn.Linear(d_model, 8 * d_model), nn.Linear(8 * d_model, d_model)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights_BTE = self.router(x_BTD).softmax(-1)
        hidden_BTEF = self.up_proj(x_BTD).relu().unflatten(-1, (4, -1)) * weights_BTE.unsqueeze(-1)
        return self.down_proj(hidden_BTEF.flatten(2)), {"balance": weights_BTE.mean((0, 1)).square().sum()}


@pytest.mark.parametrize("choice", [(), ("activation_checkpointing=block",)], ids=" ".join)
def test_activations_of_modules_with_loss_terms_of_their_own(choice: tuple[str, ...]) -> None:
    settings = resolved(*SMALL, *choice) | {"activation": {"_target_": f"{__name__}.Experts"}}
    measured = allocated_at_peak(settings, "fp32")
    assert estimate(settings)["activations"] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("precision", "order"),
    [
        ("fp32", ["none", "selective", "every_kth", "block"]),
        ("bf16-mixed", ["none", "every_kth", "selective", "block"]),  # norms stay in float32, matmuls take half
    ],
)
def test_what_checkpointing_keeps_is_ordered(precision: str, order: list[str]) -> None:
    def activations(*choice: str) -> int:
        return estimate(resolved(*SMALL, FLASH, *choice), precision)["activations"]

    options = {option: activations(f"activation_checkpointing={option}") for option in order}
    assert sorted(options, key=lambda option: -options[option]) == order
    less, rare = (
        activations("activation_checkpointing=selective", f"activation_checkpointing.keep_every_matmul={n}")
        for n in (2, 0)
    )
    assert options["selective"] > less > rare > options["block"]
    fewer = activations("activation_checkpointing=every_kth", "activation_checkpointing.every=3")
    assert options["none"] > fewer > options["every_kth"]


def test_checkpointing_and_half_precision_need_less() -> None:
    plain, checkpointed = estimate(resolved()), estimate(resolved("activation_checkpointing=block"))
    assert checkpointed["activations"] < plain["activations"] / 2
    assert checkpointed["parameters"] == plain["parameters"]
    mixed, true = (estimate(resolved(FLASH), precision) for precision in ("bf16-mixed", "bf16-true"))
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


def test_weights_are_not_kept_as_16_bit_copies() -> None:
    """Autocast's cache would, until the end of the forward pass: two bytes a parameter, however weights are divided."""
    lightnings = MixedPrecision("bf16-mixed", "cpu").forward_context()
    for context in (lightnings, Precision(kind="bf16-mixed").autocast("cpu")):
        with context:
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()


def test_gradients_wait_unsharded_for_the_last_micro_batch() -> None:
    whole, at_end = estimate(resolved()), estimate(resolved(), parallelism=fsdp(4), accumulation=2)
    each = estimate(resolved(), parallelism=fsdp(4, sync_every_micro_batch=True), accumulation=2)
    assert at_end["gradients"] == whole["gradients"]
    assert each["gradients"] == whole["gradients"] // 4


def test_gathered_are_two_blocks_and_the_rest() -> None:
    deep = resolved("model.n_layers=8")
    decoder = build_decoder(deep)
    blocks = bytes_of(decoder.blocks.parameters())
    rest = bytes_of(decoder.parameters()) - blocks
    assert estimate(deep, parallelism=fsdp(4))["gathered"] == rest + blocks // 4
    assert estimate(deep, parallelism=fsdp(4, reshard_after_forward=False))["gathered"] == rest + blocks


def test_tensor_parallelism_divides_what_its_plan_divides() -> None:
    whole, half = estimate(resolved()), estimate(resolved(), parallelism=tensor_parallel(2))
    decoder = build_decoder(resolved())
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
    assert memory.remarks(estimated, single(1)) == ["activations are not counted: a module's code looks at values"]
