"""The compile group: what `auto` decides, and that nothing is compiled again after a run's first steps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.utils import counters

from thunderhead.core import config
from thunderhead.core.config import read_mapping
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import ModelSpec
from thunderhead.options.compile import CPU_FLOPS_PER_THREAD, Compile
from thunderhead.parallel.strategies import fsdp, single
from tiny import tiny

# Dynamo looks at .grad of activations.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
AUTO = Compile(scope="auto")


def planned(accelerator: str = "cpu", devices: int = 1, *, strategy: Any = None, choices: Sequence[str] = ()) -> Any:
    """What of a run `Compile` asks."""
    with torch.device("meta"):
        decoder = ModelSpec.of(config.plain(config.compose(tiny("x", "x", *choices)))).decoder(257, 0)
    return SimpleNamespace(
        accelerator=accelerator,
        world_size=devices,
        strategy=strategy or single(1),
        decoder_meta=decoder,
        hardware_plan=SimpleNamespace(peak_flops=989e12),
    )


def resolve(compilation: Compile, flops: float, accelerator: str = "cpu", devices: int = 1, **more: Any):
    return compilation.resolve(planned(accelerator, devices, **more), flops, torch.bfloat16)


def test_auto_compiles_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # is everywhere
    a_second = CPU_FLOPS_PER_THREAD * torch.get_num_threads()
    scope, why = resolve(AUTO, 80 * a_second)
    assert scope == "none"
    assert "about 80 s of training" in why
    scope, why = resolve(AUTO, 7200 * a_second)
    assert scope == "model"
    assert "about 120 min of training" in why
    assert resolve(AUTO, 7200 * a_second, strategy=fsdp(2))[0] == "block"
    assert resolve(AUTO, 7200 * a_second, devices=100)[0] == "none"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert resolve(AUTO, 7200 * a_second) == ("none", "auto: no C++ compiler is here")


def test_auto_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(AUTO, 1e20, "mps")[0] == "none"
    assert resolve(AUTO, 989e12 * 0.3 * 3600, "cuda", devices=2) == (
        "model",
        "auto: about 30 min of training expected, and compiling pays from 10 min on",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("thunderhead.options.compile.get_available_flops", lambda device, dtype: None)
    assert resolve(AUTO, 1e20, "cuda") == ("none", "auto: the speed of this device is not known")


def test_what_is_configured_is_done() -> None:
    assert resolve(Compile(scope="block"), 1.0) == ("block", "as configured")


def test_auto_is_resolved_by_a_plan() -> None:
    with pytest.raises(AssertionError, match=r"^compile\.scope=auto is resolved by a plan"):
        AUTO.apply(Mock(Decoder))


DROPS, REPEATS = "dropout=gpt2", "activation_checkpointing=block"


@pytest.mark.parametrize(
    ("compilation", "strategy", "choices", "refusal"),
    [
        (Compile(scope="block", backend="eager"), None, (DROPS, REPEATS), "compile.backend=eager"),
        (Compile(scope="auto", backend="eager"), None, ("attention.dropout=0.1", REPEATS), "compile.backend=eager"),
        (Compile(scope="block", backend="aot_eager"), None, (DROPS, REPEATS), None),
        (Compile(scope="block", backend="eager"), None, (DROPS,), None),
        (Compile(scope="block", backend="eager"), None, (REPEATS,), None),
        (Compile(scope="none", backend="eager"), None, (DROPS, REPEATS), None),
        (Compile(scope="model"), fsdp(2), (), "compile.scope"),
        (Compile(scope="block"), fsdp(2), (), None),
        (Compile(scope="block"), fsdp(4, tensor_parallel_size=2), (REPEATS,), "compile.scope"),
        (Compile(scope="auto"), fsdp(4, tensor_parallel_size=2), (REPEATS,), None),
        (Compile(scope="block"), fsdp(4, tensor_parallel_size=2), ("activation_checkpointing=selective",), None),
    ],
)
def test_what_does_not_go_together(
    compilation: Compile, strategy: Any, choices: tuple[str, ...], refusal: str | None
) -> None:
    found = [problem.path for problem in compilation.problems(planned(strategy=strategy, choices=choices))]
    assert found == ([] if refusal is None else [refusal])


def test_auto_leaves_alone_what_cannot_be_compiled() -> None:
    scope, why = resolve(AUTO, 1e30, strategy=fsdp(4, tensor_parallel_size=2), choices=(REPEATS,))
    assert (scope, why) == ("none", "auto: torch cannot compile whole checkpointed blocks under tensor parallelism")


def test_a_run_records_what_was_compiled(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_mapping(run("compile=auto") / "plan.json")
    assert plan["compile"] == "none"
    assert "compile none (auto: about 0 s of training expected" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("thunderhead.options.compile.PAYS_AFTER", 0.0)
    folder = run("compile=auto", "compile.backend=eager")
    assert read_mapping(folder / "plan.json")["compile"] == "model"


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
