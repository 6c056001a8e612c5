"""bf16-true with float32 master weights, float16 with loss scaling, and float8, which torchao emulates here."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from small_models import VOCAB, batches, fit, language_model
from thunderhead.core import config
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import ModelSpec
from thunderhead.options import precision as precision_module
from thunderhead.options.precision import Precision, compute_in, multiply_in_fp8
from tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is optional")


def decoder_of(*overrides: str) -> Decoder:
    decoder = ModelSpec.of(config.plain(config.compose(tiny("x", "x", *overrides)))).decoder(VOCAB, 256)
    decoder.initialize(1)
    return decoder


def gradients(decoder: Decoder, precision: str = "fp32") -> tuple[Tensor, dict[str, Tensor]]:
    (batch_BT1,) = batches(1, 2)
    with Precision(kind=precision).autocast("cpu"):
        loss = decoder(batch_BT1[:, :-1], batch_BT1[:, 1:]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------------------------
# bf16-true


@pytest.mark.parametrize("options", [(), ("attention=mla", "norm=layernorm"), ("activation_checkpointing=selective",)])
def test_bf16_true_is_a_bfloat16_model_whose_weights_are_float32(options: tuple[str, ...]) -> None:
    """The oracle is the same decoder cast to bfloat16; untied, as its sums of two gradients would be rounded."""
    ours, oracle = (decoder_of("model.tie_embeddings=false", *options) for _ in range(2))
    names = list(ours.state_dict())
    compute_in(ours, torch.bfloat16)
    oracle.to(torch.bfloat16)
    loss, found = gradients(ours)
    expected_loss, expected = gradients(oracle)
    assert torch.equal(loss, expected_loss)
    assert list(ours.state_dict()) == names
    assert {p.dtype for p in ours.parameters()} == {g.dtype for g in found.values()} == {torch.float32}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient.float()) for name, gradient in expected.items())


# --------------------------------------------------------------------------------------------------------------------
# fp16-mixed


class Watch(Callback):
    """Notes the scale, the weights and the norm of the gradients at each step; step 1 overflows on request."""

    def __init__(self, overflow: bool = False) -> None:
        self.overflow, self.scales, self.weights, self.norms = overflow, [], [], []

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.overflow and trainer.global_step == 0:
            next(pl_module.parameters()).grad[0, 0] = float("inf")
            self.overflow = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.norms.append(pl_module.grad_norm.item())


def test_a_float16_step_that_overflows_is_left_out_and_the_scale_halved() -> None:
    model, watch = language_model("scheduler=constant"), Watch(overflow=True)
    model.configure_model()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, batches(3, 2), precision="fp16-mixed", callbacks=(watch,), max_steps=3, gradient_clip_val=1.0)
    assert watch.scales == [2.0**15, 2.0**15, 2.0**15]  # from 2**16
    assert all(torch.equal(a, b) for a, b in zip(before, watch.weights[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, watch.weights[1], strict=True))


def test_float16s_gradients_are_clipped_unscaled_and_near_those_of_float32() -> None:
    norms = {}
    for precision in ("fp32", "fp16-mixed"):
        model = language_model()
        fit(model, batches(1, 2), precision=precision, max_steps=1, gradient_clip_val=0.5)
        assert model.grad_norm is not None
        norms[precision] = model.grad_norm.item()
    assert norms["fp16-mixed"] == pytest.approx(norms["fp32"], rel=0.01)  # and not 2**16 times that


# --------------------------------------------------------------------------------------------------------------------
# fp8


@needs_torchao
def test_the_layers_of_blocks_multiply_in_float8_where_their_sizes_allow() -> None:
    decoder = decoder_of("model.d_ff=72")  # no multiple of 16
    names, residual = (
        list(decoder.state_dict()),
        [n for n, m in decoder.named_modules() if hasattr(m, "adds_to_residual")],
    )
    multiply_in_fp8(decoder, emulate=True)
    kinds = {n: type(m).__name__ for n, m in decoder.blocks[0].named_modules() if isinstance(m, nn.Linear)}
    attention = ("q_proj", "k_proj", "v_proj", "out_proj")
    assert {n for n, kind in kinds.items() if kind == "Float8Linear"} == {f"attention.{name}" for name in attention}
    assert list(decoder.state_dict()) == names
    assert [n for n, m in decoder.named_modules() if hasattr(m, "adds_to_residual")] == residual  # initialised smaller
    fresh = decoder_of("model.d_ff=72")
    decoder.initialize(1)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), fresh.parameters(), strict=True))


@needs_torchao
def test_a_float8_layer_rounds_both_factors_with_a_scale_a_tensor() -> None:
    decoder = decoder_of()
    layer = decoder.blocks[0].attention.q_proj
    weight, x = layer.weight.detach().clone(), torch.randn(7, 32)
    exact = x @ weight.T
    multiply_in_fp8(decoder, emulate=True)

    def rounded(tensor: Tensor) -> Tensor:
        scale = torch.finfo(torch.float8_e4m3fn).max / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    found = decoder.blocks[0].attention.q_proj(x).detach()
    expected = rounded(x) @ rounded(weight).T
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert (found - exact).norm() / exact.norm() > 1e-2  # it does round


@needs_torchao
@pytest.mark.parametrize("checkpointing", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_float8_trains_near_bfloat16(checkpointing: str) -> None:
    plain, ours = decoder_of("model.d_ff=96"), decoder_of("model.d_ff=96", f"activation_checkpointing={checkpointing}")
    multiply_in_fp8(ours, emulate=True)
    expected_loss, expected = gradients(plain, "bf16-mixed")
    loss, found = gradients(ours, "fp8")
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-2)
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 0.25, name  # three bits of mantissa, two in gradients
    model = language_model("model.d_ff=96", "optimizer=sgd", "scheduler=constant")
    model.configure_model()
    multiply_in_fp8(model.decoder, emulate=True)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    fit(model, batches(1, 4) * 20, precision="fp8", callbacks=(Losses(),), max_steps=20, gradient_clip_val=1.0)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("accelerator", "capability", "torchao", "refusal"),
    [
        ("cpu", (0, 0), True, "needs a GPU with float8 tensor cores .* on cpu: use precision=bf16-mixed"),
        ("mps", (0, 0), True, "needs a GPU with float8 tensor cores .* on mps: use precision=bf16-mixed"),
        ("cuda", (8, 0), True, "needs a GPU with float8 tensor cores .* on sm80: use precision=bf16-mixed"),
        ("cuda", (9, 0), False, r"needs torchao: pip install 'torchao>=\S+', or use precision=bf16-mixed"),
        ("cuda", (8, 9), True, None),
        ("cuda", (9, 0), True, None),
    ],
)
def test_where_float8_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    capability: tuple[int, int],
    torchao: bool,
    refusal: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if torchao else None)
    if refusal is None:
        assert Precision(kind="fp8").resolve(accelerator) == ("fp8", "as configured")
        return
    with pytest.raises(ValueError, match=refusal):
        Precision(kind="fp8").resolve(accelerator)


@pytest.mark.parametrize(
    ("accelerator", "facts", "kind", "why"),
    [
        ("cuda", {"capability": (8, 0)}, "bf16-mixed", "sm80 has"),
        ("cuda", {"capability": (9, 0)}, "bf16-mixed", "sm90 has"),
        ("cuda", {"capability": (7, 5)}, "fp32", "sm75 lacks"),
        ("cpu", {"flags": "sse amx_bf16"}, "bf16-mixed", "AMX"),
        ("cpu", {"flags": "avx512_bf16"}, "bf16-mixed", "AVX512-BF16"),
        ("cpu", {"flags": "sse avx2"}, "fp32", "neither"),
        ("mps", {}, "fp32", "mps"),
    ],
)
def test_automatic_precision(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, facts: dict, kind: str, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: facts.get("capability"))
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: set(facts.get("flags", "").split()))
    chosen, reason = Precision(kind="auto").resolve(accelerator)
    assert chosen == kind
    assert reason.startswith("auto: ")
    assert why in reason


def test_a_configured_precision_is_kept_and_fp16_on_a_cpu_warned_of() -> None:
    assert Precision(kind="fp32").resolve("cuda") == ("fp32", "as configured")
    kind, why = Precision(kind="fp16-mixed").resolve("cpu")
    assert kind == "fp16-mixed"
    assert "very slow" in why


def test_fp16_on_a_cpu_is_not_exchanged_for_bf16() -> None:
    (plugin,) = Precision(kind="fp16-mixed").lightning_arguments("cpu")["plugins"]
    assert plugin.precision == "16-mixed"
    assert plugin.scaler is not None
    assert Precision(kind="bf16-mixed").lightning_arguments("cpu") == {"precision": "bf16-mixed"}


@pytest.mark.parametrize(
    ("kind", "optimizer", "is_refused"),
    [
        ("fp16-mixed", {"lr": 0.1, "momentum": 0.9, "fused": True}, True),
        ("fp16-mixed", {"lr": 0.1, "fused": True}, False),
        ("fp16-mixed", {"lr": 0.1}, False),
        ("bf16-mixed", {"lr": 0.1, "momentum": 0.9, "fused": True}, False),
    ],
)
def test_fused_sgd_under_loss_scaling(kind: str, optimizer: dict[str, Any], is_refused: bool) -> None:
    settings = config.plain(config.compose(tiny("x", "x")))
    spec = ModelSpec.of(settings | {"optimizer": {"_target_": "torch.optim.SGD", **optimizer}})
    with torch.device("meta"):
        run = SimpleNamespace(model=spec, decoder_meta=spec.decoder(VOCAB, None))
    found = [problem.path for problem in Precision(kind=kind).problems(run)]
    assert found == (["optimizer.fused"] if is_refused else [])


@pytest.mark.parametrize("flags", ["avx2", "avx2 avx512_bf16"])
def test_a_cpu_that_is_slow_in_bfloat16_is_told(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of two matrices took 400 times as long as in float32 on an AMD EPYC with AVX2 only."""
    monkeypatch.setattr(precision_module, "cpu_flags", lambda: set(flags.split()))
    for kind in ("bf16-mixed", "bf16-true"):
        why = Precision(kind=kind).resolve("cpu")[1]
        assert ("fp32 is meant for it" in why) == ("avx512_bf16" not in flags)
    assert "slow" not in Precision(kind="bf16-mixed").resolve("cpu", is_here=False)[1]
