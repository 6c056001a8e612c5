"""The compile group: what `auto` decides, and that nothing is compiled again after a run's first steps."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.utils import counters

from thunderhead.core.model.decoder import Decoder
from thunderhead.options.compile import CPU_FLOPS_PER_THREAD, Compile
from thunderhead.training import hardware
from thunderhead.training.record import read_json

# Dynamo looks at .grad of activations.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
AUTO = Compile(scope="auto")


def resolve(compilation: Compile, flops: float, accelerator: str = "cpu", devices: int = 1, **more: bool):
    settings = {"precision": "bf16-mixed", "by_block": False} | more
    return compilation.resolve(flops, accelerator=accelerator, devices=devices, **settings)


def test_auto_compiles_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # is everywhere
    a_second = CPU_FLOPS_PER_THREAD * torch.get_num_threads()
    scope, why = resolve(AUTO, 110 * a_second)
    assert scope == "none"
    assert "about 110 s of training" in why
    scope, why = resolve(AUTO, 7200 * a_second)
    assert scope == "model"
    assert "about 120 minutes of training" in why
    assert resolve(AUTO, 7200 * a_second, by_block=True)[0] == "block"
    assert resolve(AUTO, 7200 * a_second, devices=100)[0] == "none"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert resolve(AUTO, 7200 * a_second) == ("none", "auto: no C++ compiler is here")


def test_auto_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(AUTO, 1e20, "mps")[0] == "none"
    assert resolve(AUTO, 989e12 * 0.3 * 3600, "cuda", devices=2) == (
        "model",
        "auto: about 30 minutes of training expected, and compiling pays from 10 minutes on",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "peak_flops", lambda accelerator, precision: None)
    assert resolve(AUTO, 1e20, "cuda") == ("none", "auto: the speed of this device is not known")


def test_what_is_configured_is_done() -> None:
    assert resolve(Compile(scope="block"), 1.0) == ("block", "as configured")


def test_auto_is_resolved_by_a_plan() -> None:
    with pytest.raises(ValueError, match=r"^compile\.scope=auto must be resolved by a plan"):
        AUTO.apply(Mock(Decoder))


def test_a_run_records_what_was_compiled(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_json(run("compile=auto") / "plan.json")
    assert plan["compile"] == "none"
    assert "compile none (auto: about 0 s of training expected" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("thunderhead.options.compile.PAYS_AFTER", 0.0)
    folder = run("compile=auto", "compile.backend=eager", "callbacks=default")
    assert read_json(folder / "plan.json")["compile"] == "model"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["config"]["compile"]["scope"] == "model"


@pytest.mark.parametrize("scope", ["block", "model"])
def test_nothing_is_compiled_again(scope: str, run: Callable[..., Path]) -> None:
    """Graphs of a run with one validation, and of one with four and accumulated micro-batches in between.

    Both end with a sample of text, whose every token would be another graph.
    """
    graphs = []
    for steps in (2, 8):
        torch.compiler.reset()
        counters.clear()
        more = ("validation.every=2", "generation.max_new_tokens=20")  # more lengths than Dynamo takes
        run(f"compile={scope}", "compile.backend=eager", f"budget.steps={steps}", *more)
        graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[0] == graphs[1] > 0
