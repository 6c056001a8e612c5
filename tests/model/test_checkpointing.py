from collections.abc import Callable
from typing import Any

import pytest
import torch

from thunderhead.model import checkpointing
from thunderhead.model.decoder import Decoder


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gradients_are_the_same_and_dropout_is_repeated(build: Callable[..., Decoder], every: int) -> None:
    tokens = torch.randint(61, (2, 17))

    def gradients(*overrides: str) -> dict[str, Any]:
        decoder = build("model.n_layers=3", "dropout=gpt2", *overrides).train()
        torch.manual_seed(5)
        decoder(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        return {name: parameter.grad for name, parameter in decoder.named_parameters()}

    plain = gradients()
    checkpointed = gradients("activation_checkpointing=block", f"activation_checkpointing.every={every}")
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [0, 1, 2]), (2, [0, 2])])
def test_which_blocks_are_checkpointed(
    build: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch, every: int, expected: list[int]
) -> None:
    decoder = build("model.n_layers=3", "activation_checkpointing=block", f"activation_checkpointing.every={every}")
    blocks, seen = list(decoder.blocks), []
    original = checkpointing.checkpoint

    def spy(block: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(blocks.index(block))
        return original(block, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", spy)
    decoder.hidden(torch.randint(61, (2, 16)))
    assert seen == expected
    with torch.no_grad():
        decoder.hidden(torch.randint(61, (2, 16)))
    assert seen == expected, "nothing to recompute without gradients"
