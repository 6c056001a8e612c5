"""What a record may have called: its kind decides, not its spelling."""

from typing import Any

import pytest

from thunderhead.core import config, trust
from thunderhead.core.config import ConfigError


@pytest.fixture(autouse=True)
def _nothing_more_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_trusted", set())


HOSTILE = [
    *("os.system", "builtins.exec", "builtins.eval", "subprocess.Popen", "shutil.rmtree", "pathlib.Path.write_text"),
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.utils.cpp_extension.load", "torch.save"),
    *("torch.nn.modules.module.torch.load", "torch.optim.optimizer.torch.load", "torch.nn.utils.clip_grad_norm_"),
    *("lightning.fabric.utilities.cloud_io._load", "lightning.pytorch.core.saving._load_state"),
    *("thunderhead.disk.write_text", "thunderhead.training.record.shutil.copy"),
    *("thunderhead.core.components.hydra.utils.instantiate", "thunderhead.core.components.build"),
    "hydra.utils.instantiate",
    *("pickle.loads", "importlib.import_module", "runpy.run_path", "logging.config.dictConfig", "", "no_such.thing"),
]


@pytest.mark.parametrize("target", [*HOSTILE, 5, None, ["os.system"]])
def test_what_is_no_component_is_refused(target: Any) -> None:
    assert not trust.is_trusted(target)
    nested = {"model": {"_target_": "torch.nn.Linear", "parts": [{"more": {"_target_": target}}]}}
    with pytest.raises(ConfigError) as caught:
        trust.refuse_untrusted(nested)
    assert caught.value.problems[0].path == "model.parts[0].more._target_"


@pytest.mark.parametrize(
    "target",
    [
        *("torch.nn.GELU", "torch.nn.RMSNorm", "torch.optim.SGD", "lightning.pytorch.callbacks.LearningRateMonitor"),
        *("lightning.pytorch.loggers.CSVLogger", "thunderhead.options.muon.Muon", "thunderhead.core.model.block.Block"),
    ],
)
def test_components_of_this_installation_are_trusted(target: str) -> None:
    assert trust.is_trusted(target)


def test_all_that_a_run_can_choose_is_trusted() -> None:
    trust.refuse_untrusted(config.plain(config.compose()))


def test_the_user_trusts_a_package_a_module_or_a_target() -> None:
    for name in ("my_variants", "my_variants.attention", "my_variants.attention.Sparse"):
        trust._trusted.clear()
        assert not trust.is_trusted("my_variants.attention.Sparse")
        trust.trust(name)
        assert trust.is_trusted("my_variants.attention.Sparse")
        assert not trust.is_trusted("my_variants_of_another.attention.Sparse")


def test_nothing_is_imported_to_find_out(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not trust.is_trusted("payload.anything")


def test_modules_of_ones_own_are_named_for_hints() -> None:
    own = [{"_target_": "mine.optimizers.SignSGD"}, {"_target_": "alone"}, {"_target_": "mine.optimizers.Other"}]
    assert trust.foreign({"optimizer": own[0], "callbacks": own[1:], "model": {"_target_": "torch.nn.GELU"}}) == [
        "alone",
        "mine.optimizers",
    ]
