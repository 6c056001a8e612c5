"""Decoders composed from conf/, without thunderhead.core.config: the model is used here as a library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from oracles import CONF, values
from thunderhead.core.model.decoder import Decoder

DEFAULTS = {
    "model": "nano",
    "attention": "mha",
    "position": "rope",
    "activation": "swiglu",
    "norm": "rmsnorm",
    "dropout": "none",
    "block": "pre",
    "loss": "next_token",
    "activation_checkpointing": "none",
    "optimizer": "adamw",
}
GROUPS = [group for group in DEFAULTS if group not in ("model", "optimizer")]
TINY = ["model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.context_length=16", "model.vocab_multiple=1"]


@pytest.fixture(scope="session")
def compose_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DictConfig]:
    """compose_model("attention=gqa", "model.d_model=64", …) gives the composed config."""
    primary = tmp_path_factory.mktemp("conf")
    lines = [f"  - {group}: {option}" for group, option in DEFAULTS.items()]
    search = f"hydra:\n  searchpath: [file://{CONF}]\n"
    text = "\n".join(["defaults:", *lines, "  - _self_", "  - experiment: null"]) + "\n" + search
    (primary / "main.yaml").write_text(text)

    def composed(*overrides: str) -> DictConfig:
        if not any(override.startswith("experiment=") for override in overrides):  # Hydra takes 0.2 s, and we have many
            chosen = dict(override.split("=") for override in overrides if override.split("=")[0] in DEFAULTS)
            files = {group: values(group, name) for group, name in (DEFAULTS | chosen).items()}
            changes = [override for override in overrides if override.split("=")[0] not in DEFAULTS]
            return OmegaConf.merge(OmegaConf.create(files), OmegaConf.from_dotlist(changes))
        with initialize_config_dir(str(primary), version_base="1.3"):
            return compose("main", list(overrides))

    return composed


@pytest.fixture(scope="session")
def build(compose_model: Callable[..., DictConfig]) -> Callable[..., Decoder]:
    """build("attention=gqa", …, tiny=True) gives an initialised decoder; device="meta" one without data."""

    def built(
        *overrides: str, tiny: bool = True, device: str = "cpu", vocab: int = 61, eos_id: int | None = 0
    ) -> Decoder:
        config = compose_model(*(TINY if tiny else []), *overrides)
        parts: dict[str, Any] = {name: instantiate(config[name], _partial_=True) for name in GROUPS}
        with torch.device(device):
            decoder: Decoder = instantiate(config.model, _partial_=True)(vocab, eos_id, **parts)
        if device != "meta":
            decoder.initialize(seed=1)
        return decoder.eval()

    return built


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
