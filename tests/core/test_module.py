"""LanguageModel under Lightning: what is float32, what accumulates, what a checkpoint gives back."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from small_models import batches, fit, language_model
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.core.model_spec import build_decoder, build_optimizer
from thunderhead.core.module import LanguageModel

# These runs validate nothing.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Dtypes(Callback):
    """Notes what forward passes compute in, and gradients at the step."""

    def __init__(self) -> None:
        self.computed: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(_: Any, __: Any, output: Tensor) -> None:
            self.computed.add(output.dtype)

        linear = next(m for m in pl_module.decoder.blocks.modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(note)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients |= {p.grad.dtype for p in pl_module.parameters() if p.grad is not None}


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)])
def test_mixed_precision_keeps_weights_gradients_and_state_in_float32(
    precision: str, dtype: torch.dtype, optimizer: str
) -> None:
    model, dtypes = language_model(f"optimizer={optimizer}"), Dtypes()
    trainer = fit(model, batches(4, 2), precision=precision, callbacks=(dtypes,), gradient_clip_val=1.0)
    assert dtypes.computed == {dtype}
    assert dtypes.gradients == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state = [t for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, Tensor)]
    assert state
    assert {t.dtype for t in state} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adafactor"])
def test_bf16_true_computes_in_bfloat16_and_trains_float32_weights(optimizer: str) -> None:
    model, dtypes = language_model(f"optimizer={optimizer}", precision="bf16-true"), Dtypes()
    residual: set[torch.dtype] = set()
    model.configure_model()
    model.decoder.blocks[1].register_forward_hook(lambda _, __, output: residual.add(output.dtype))
    trainer = fit(model, batches(4, 2), precision="bf16-true", callbacks=(dtypes,), max_steps=4)
    assert dtypes.computed == residual == {torch.bfloat16}
    assert dtypes.gradients == {p.dtype for p in model.parameters()} == {torch.float32}
    state = [t for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, Tensor)]
    assert {t.dtype for t in state} == {torch.float32}
    plain = language_model(f"optimizer={optimizer}")
    plain.configure_model()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_steps_below_bfloat16s_spacing_are_not_lost() -> None:
    """A learning rate under which a bfloat16 weight would never move: 1e-5 of weights of about 0.02."""
    model = language_model("optimizer=lion", "optimizer.lr=1.0e-6", "scheduler=constant", precision="bf16-true")
    model.configure_model()
    before = {name: p.detach().clone() for name, p in model.decoder.named_parameters()}
    fit(model, batches(4, 2), precision="bf16-true", max_steps=4)
    after = dict(model.decoder.named_parameters())
    name = "blocks.0.attention.q_proj.weight"
    assert (after[name] != before[name]).float().mean() > 0.99
    assert (after[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.9


def test_accumulation_equals_one_big_batch() -> None:
    data = batches(8, 4)
    at_once, in_parts = language_model("optimizer=sgd"), language_model("optimizer=sgd")
    fit(at_once, data, max_steps=8, gradient_clip_val=1.0)
    parts = [part for batch in data for part in batch.split(1)]
    fit(in_parts, parts, max_steps=8, accumulate_grad_batches=4, gradient_clip_val=1.0)
    moved = 0.0
    start = language_model("optimizer=sgd")
    start.configure_model()
    for a, b, c in zip(at_once.parameters(), in_parts.parameters(), start.parameters(), strict=True):
        # only the order of float32 sums differs
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        moved = max(moved, (a - c).abs().max().item())
    assert moved > 1e-2  # the tolerance would see a difference


def test_gradients_are_clipped_by_their_global_norm() -> None:
    norms: list[tuple[float, float]] = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                after = torch.cat([g.flatten() for g in gradients]).norm().item()
                norms.append((pl_module.grad_norm.item(), after))

    fit(language_model(), batches(4, 2), callbacks=(Norms(),), gradient_clip_val=0.01)
    assert norms
    for before, after in norms:
        assert before > 0.02
        assert after == pytest.approx(0.01, rel=1e-3)


def test_the_norm_is_known_also_when_nothing_is_clipped() -> None:
    model = language_model()
    fit(model, batches(1, 2), max_steps=1)
    assert model.grad_norm is not None
    assert model.grad_norm.item() > 0


def test_weights_depend_on_the_seed_alone() -> None:
    models = [language_model(seed=seed) for seed in (7, 7, 8)]
    for index, model in enumerate(models):
        torch.manual_seed(index)
        model.configure_model()
    first, again, other = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.embedding.weight"], other["decoder.embedding.weight"])


def test_configure_model_does_not_draw_twice() -> None:
    model = language_model()
    model.configure_model()
    decoder = model.decoder
    model.configure_model()
    assert model.decoder is decoder


def test_a_checkpoint_loads_with_nothing_else(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default", "callbacks.checkpoint.every_n_train_steps=2")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    model = LanguageModel.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    saved = torch.load(checkpoint, weights_only=True)  # plain containers only
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.zero_()
    expected.load_state_dict(saved["state_dict"], strict=False)
    tokens_BT = batches(1, 2)[0][:, :-1]
    assert torch.equal(model.decoder.logits(tokens_BT), expected.decoder.logits(tokens_BT))
    assert all(name.startswith(("decoder.", "val_", "step_")) for name in saved["state_dict"])
    assert not any("_orig_mod" in name for name in saved["state_dict"])


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_a_checkpoint_of_other_weights_is_refused(change: str, run: Callable[..., Path]) -> None:
    checkpoint = run("callbacks=default", "callbacks.checkpoint.every_n_train_steps=2") / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    weights = content["state_dict"]
    if change == "has":
        weights["decoder.extra"] = weights["decoder.embedding.weight"]
    else:
        del weights["decoder.embedding.weight"]
    torch.save(content, checkpoint)
    with pytest.raises(ConfigError, match=rf"is of another model: it {change}"):
        LanguageModel.load_from_checkpoint(checkpoint)


def test_a_checkpoint_has_the_loss_of_the_summary(run: Callable[..., Path]) -> None:
    """The weights in last.ckpt are those that the final validation saw."""
    folder = run("callbacks=default", "callbacks.checkpoint.every_n_train_steps=2")
    summary = json.loads((folder / "summary.json").read_text())
    model = LanguageModel.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", map_location="cpu")
    assert sum(p.numel() for p in model.decoder.parameters()) == summary["parameters"]
    assert model.hparams["total_steps"] == summary["steps"] == 2


def test_a_batch_that_is_not_finite_makes_the_validation_loss_not_finite() -> None:
    """One of four: torchmetrics' mean would leave it out."""
    model = language_model()
    model.configure_model()
    forward = model.decoder.forward
    published: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: published.update(values)  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        for number, batch in enumerate(batches(4, 2)):
            if number == 2:
                model.decoder.forward = lambda *tokens: forward(*tokens)._replace(cross_entropy=torch.tensor(torch.nan))
            model.validation_step(batch, number)
            model.decoder.forward = forward
    model.on_validation_epoch_end()
    assert published["val/loss"].isnan()
    assert published["val/perplexity"].isnan()


def test_a_batch_without_targets_changes_no_result() -> None:
    """Whatever the loss, a mean over nothing, says of it; and torchmetrics' metrics, which may take no empty batch."""
    found = []
    for is_filled_up in (False, True):
        model = language_model()
        model._new_metrics = lambda source: {"accuracy": MulticlassAccuracy(257)}
        model._measure(["all"])
        model.configure_model()
        forward = model.decoder.forward
        published: dict[str, Tensor] = {}
        model.log_dict = lambda values, published=published, **_: published.update(values)  # type: ignore[method-assign,assignment]
        with torch.no_grad():
            (batch,) = batches(1, 2)
            model.validation_step(batch, 0)
            if is_filled_up:
                nothing = torch.tensor(torch.nan)
                model.decoder.forward = lambda *tokens: forward(*tokens)._replace(cross_entropy=nothing)  # noqa: B023
                model.validation_step(~batch, 1)
        model.on_validation_epoch_end()
        found.append({name: value.item() for name, value in published.items()})
    assert found[0] == found[1]
    assert set(found[0]) == {"val/loss", "val/perplexity", "val/accuracy"}


def test_the_validation_loss_does_not_depend_on_the_micro_batch() -> None:
    """Sums in float64: what is left is the rounding of the batch's own float32 losses."""
    model = language_model()
    model.configure_model()
    data, found = batches(4, 8), []
    for size in (1, 4, 8):
        published: dict[str, Tensor] = {}
        model.log_dict = lambda values, published=published, **_: published.update(values)  # type: ignore[method-assign,assignment]
        with torch.no_grad():
            for batch in data:
                for part in batch.split(size):
                    model.validation_step(part, 0)
        model.on_validation_epoch_end()
        found.append(published["val/loss"].item())
    # matrix products of other shapes may round otherwise in the last bit of float32
    assert found == pytest.approx([found[0]] * 3, rel=2e-8)


def forgetful(decoder: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups that lack one."""
    return [{"params": list(decoder.parameters())[:-1]}]


def test_a_parameter_in_no_group_is_refused() -> None:
    resolved = config.plain(config.compose(tiny_model()))
    resolved["parameter_groups"] = {"_target_": f"{__name__}.forgetful"}
    decoder = build_decoder(resolved, 61, 0)
    with pytest.raises(ValueError, match=r"parameter_groups: final_norm\.weight would never be trained"):
        build_optimizer(resolved, decoder)
    decoder.final_norm.weight.requires_grad_(False)
    assert build_optimizer(resolved, decoder)


def tiny_model() -> list[str]:
    return ["model.n_layers=1", "model.d_model=32", "model.n_heads=4", "model.context_length=16"]
