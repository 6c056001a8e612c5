"""Decoders with options from outside of the package, chosen by their YAML files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thunderhead.core import components, config
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import build_decoder

SIZES = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.context_length=16")


@pytest.fixture
def outside() -> Callable[..., Decoder]:
    """outside("attention=gated_delta_rule", …) gives a decoder with drawn weights, in eval mode."""

    def build(*overrides: str) -> Decoder:
        search = f"hydra.searchpath=[file://{Path(__file__).parent / 'conf'}]"
        composed = config.plain(config.compose([search, *SIZES, *overrides]))
        assert components.check(composed) == []
        decoder = build_decoder(composed, 61, 0)
        decoder.initialize(seed=1)
        return decoder.eval()

    return build


@pytest.fixture
def with_nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Let compositions have other nodes, as a file of the user's would put there."""
    compose = config.compose

    def put(nodes: dict[str, Any]) -> None:
        def composed(*args: Any, **kwargs: Any) -> Any:
            found = compose(*args, **kwargs)
            for group, node in nodes.items():
                found[group] = node
            return found

        monkeypatch.setattr(config, "compose", composed)

    return put
