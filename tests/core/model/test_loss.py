import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thunderhead.core.model import loss as loss_module
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import IGNORED_TARGET, LossTerms, NextTokenLoss

VOCAB, PADDED = 37, 40


def problem() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(3, 7, 8, requires_grad=True), torch.randn(PADDED, 8, requires_grad=True)
    targets = torch.randint(VOCAB, (3, 7))
    targets[1, 2:] = IGNORED_TARGET  # so that the chunks hold different numbers of valid targets, one of them none
    return hidden, weight, targets


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and weighted z-loss token by token, in float64."""
    losses, squares = [], []
    for h, y in zip(hidden.double().flatten(0, 1), targets.flatten().tolist(), strict=True):
        if y != IGNORED_TARGET:
            logits = h @ weight.double()[:VOCAB].T
            log_z = torch.log(torch.exp(logits).sum())
            losses.append(log_z - logits[y])
            squares.append(log_z**2)
    return torch.stack(losses).mean(), z_loss * torch.stack(squares).mean()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [None, "auto", 1, 5, 21, 1000])
def test_loss_and_gradients_equal_float64_for_any_chunk_size(z_loss: float, chunk_size: Any) -> None:
    hidden, weight, targets = problem()
    terms = NextTokenLoss(z_loss=z_loss, chunk_size=chunk_size)(hidden, weight, targets, VOCAB)
    gradients = torch.autograd.grad(terms.loss, (hidden, weight))

    cross_entropy, z = naive(hidden, weight, targets, z_loss)
    expected = torch.autograd.grad(cross_entropy + z, (hidden, weight))
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # float32 sums of some 800 terms against float64
    torch.testing.assert_close(terms.cross_entropy, cross_entropy, **close)
    assert terms.auxiliary.keys() == ({"z_loss"} if z_loss else set())
    torch.testing.assert_close(terms.auxiliary.get("z_loss", z), z, **close)
    torch.testing.assert_close(terms.loss, cross_entropy + z, **close)
    torch.testing.assert_close(gradients, expected, **close)
    assert not gradients[1][VOCAB:].any(), "padding rows must get no gradient"


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_what_is_not_trained_tells_the_loss_of_each_target(chunk_size: Any) -> None:
    hidden, weight, targets = problem()
    loss = NextTokenLoss(z_loss=0.1, chunk_size=chunk_size)
    assert loss(hidden, weight, targets, VOCAB).each is None
    with torch.no_grad():
        each = loss(hidden, weight, targets, VOCAB).plus({"more": torch.tensor(1.0)}).each
    assert each is not None
    assert each.shape == targets.shape
    for place in ((0, 0), (1, 1), (2, 6)):
        one = torch.full_like(targets, IGNORED_TARGET)
        one[place] = targets[place]
        expected = naive(hidden, weight, one, 0.0)[0].float()
        torch.testing.assert_close(each[place], expected, rtol=1e-5, atol=1e-6)
    assert not each[targets == IGNORED_TARGET].any()


def test_the_loss_of_bfloat16_logits_is_not_rounded_to_bfloat16() -> None:
    hidden, weight, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        terms = NextTokenLoss(chunk_size=5)(hidden, weight, targets, VOCAB)
        logits = (hidden @ weight.T).flatten(0, 1)
    assert logits.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(logits.double()[:, :VOCAB], targets.flatten())
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(exact.item(), rel=1e-5)  # bfloat16 would be off by up to 4e-3


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    hidden, weight, targets = problem()
    terms = NextTokenLoss(z_loss=1.0)(hidden * 0, weight, targets, VOCAB)
    assert terms.cross_entropy.item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert terms.auxiliary["z_loss"].item() == pytest.approx(math.log(VOCAB) ** 2, rel=1e-6)


def test_without_valid_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight, targets = problem()
    terms = NextTokenLoss()(hidden, weight, torch.full_like(targets, IGNORED_TARGET), VOCAB)
    assert terms.loss.item() == 0
    assert not torch.autograd.grad(terms.loss, weight)[0].any()


def test_auto_chunks_are_equal_and_fit() -> None:
    loss = NextTokenLoss(chunk_size="auto")
    assert loss.tokens_per_chunk(2048, 8192) == 2048  # 64 MiB: in one piece
    assert loss.tokens_per_chunk(2048, 50304) == 2048  # 393 MiB: still
    chunk = loss.tokens_per_chunk(8 * 1024, 50304)  # 1.5 GiB
    assert chunk * 50304 * 4 <= loss_module.AUTO_CHUNK_BYTES
    assert chunk == math.ceil(8 * 1024 / 4)


def test_chunks_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = torch.nn.functional.cross_entropy

    def spy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, len(logits))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(loss_module.F, "cross_entropy", spy)
    hidden, weight, targets = problem()
    NextTokenLoss(chunk_size=4)(hidden, weight, targets, VOCAB).loss.backward()
    assert largest == 4


def test_the_decoders_loss_is_that_of_its_logits(build: Callable[..., Decoder]) -> None:
    decoder = build("model.vocab_multiple=64", "loss.z_loss=0.01")
    tokens = torch.randint(61, (2, 17))
    terms = decoder(tokens[:, :-1], tokens[:, 1:])
    logits = decoder.logits(tokens[:, :-1])
    assert logits.shape == (2, 16, 61)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(terms.cross_entropy, expected)
    torch.testing.assert_close(terms.auxiliary["z_loss"], 0.01 * logits.logsumexp(-1).square().mean())


def test_no_term_has_the_name_of_the_cross_entropy() -> None:
    terms = LossTerms(torch.tensor(1.0), torch.tensor(1.0), {})
    assert terms.plus({"a.b": torch.tensor(0.5)}).loss == 1.5
    with pytest.raises(ValueError, match="a term of it is called `loss`"):
        terms.plus({"loss": torch.tensor(0.5)})
