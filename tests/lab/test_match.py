"""Matching meets its target as closely as the solved value can; pairs start alike and see the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from thunderhead.core import config
from thunderhead.core.model_spec import build_decoder
from thunderhead.lab.match import EqualFlops, EqualParameters, EqualTime, measuring_run, odd, speed
from thunderhead.lab.runs import Match
from thunderhead.training.run import find_problems
from tiny import plan_of, tiny


@pytest.fixture
def planned(text_corpus: Path, shards_dir: Path):
    def plan(*overrides: str):
        resolved = config.plain(config.compose(tiny(text_corpus, shards_dir, *overrides)))
        return resolved, plan_of(resolved)

    return plan


def no_measure(config: dict[str, Any]) -> float:
    raise AssertionError


@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize(
    "arm", [("attention=mqa",), ("activation=gelu", "activation.hidden_ratio=3.0"), ("norm=layernorm",)]
)
def test_equal_parameters(planned: Any, arm: tuple[str, ...], multiple_of: int) -> None:
    match = EqualParameters(count="total", multiple_of=multiple_of)
    baseline, plan = planned("attention=mha")
    target = match.target(baseline, plan, no_measure)
    assert target == plan.parameters["total"]
    changed, plan = planned(*arm)
    solved, matched = match.apply(changed, plan, target, no_measure)
    assert find_problems(solved) == []
    reached = plan_of(solved).parameters["total"]
    assert matched.reached == reached
    assert solved["model"]["d_ff"] % multiple_of == 0
    # no neighbouring width is nearer: built and counted, not computed
    for d_ff in (solved["model"]["d_ff"] - multiple_of, solved["model"]["d_ff"] + multiple_of):
        other = plan_of(solved | {"model": solved["model"] | {"d_ff": d_ff}}).parameters["total"]
        assert abs(reached - target) <= abs(other - target)


def test_the_baseline_is_left_alone_and_misses_nothing(planned: Any) -> None:
    match = EqualParameters(count="total", multiple_of=8)
    baseline, plan = planned("attention=mha")
    solved, matched = match.apply(baseline, plan, plan.parameters["total"], no_measure)
    assert solved == baseline
    assert (matched.set, matched.missed) == ({}, 0)


@pytest.mark.parametrize(("d_ff", "is_odd"), [(64, False), (1480, True), (513, True), (512, False), (63, True)])
def test_a_width_that_nobody_would_choose_is_told(d_ff: int, is_odd: bool) -> None:
    """As of byte against bpe at d_model 64, where a table of embeddings is made up for by feed-forward layers."""
    told = odd({"model": {"d_model": 64}}, Match("params", 1, 1, {"model.d_ff": d_ff}))
    assert bool(told) == is_odd
    assert not is_odd or f"model.d_ff {d_ff:,}, {d_ff / 64:.2g} × d_model" in told
    assert not odd({"model": {"d_model": 64}}, Match("flops", 1, 1, {"budget.steps": 9}))


def test_parameters_that_no_width_can_meet(planned: Any) -> None:
    large, plan = planned("model.n_layers=12")
    with pytest.raises(ValueError, match=r"without feed-forward layers this arm has [\d,]+ parameters already"):
        EqualParameters(count="total", multiple_of=8).apply(large, plan, 1000, no_measure)


def test_equal_flops(planned: Any) -> None:
    baseline, plan = planned("attention=mha", "budget.steps=1000")
    target = EqualFlops().target(baseline, plan, no_measure)
    changed, plan = planned("model.n_layers=3", "budget.steps=1000")
    solved, matched = EqualFlops().apply(changed, plan, target, no_measure)
    again = plan_of(solved)
    assert again.flops == matched.reached
    assert again.steps < 1000
    assert abs(again.flops - target) <= again.flops / again.steps / 2  # half a step


def test_equal_time(planned: Any) -> None:
    baseline, plan = planned("budget.steps=1000")
    match = EqualTime(steps=10)
    speeds = {1000: 500.0, 600: 300.0}
    measured = []

    def measure(config: dict[str, Any]) -> float:
        measured.append(config["budget"]["steps"])
        return speeds[1000] if len(measured) == 1 else speeds[600]

    target = match.target(baseline, plan, measure)
    assert target == plan.tokens / 500
    solved, matched = match.apply(baseline, plan, target, measure)
    assert measured == [10, 10]
    assert solved["budget"]["steps"] == 600
    assert matched.reached == pytest.approx(target)


def test_the_measuring_run_is_a_valid_run(planned: Any) -> None:
    resolved, _ = planned("budget.steps=1000", "scheduler=wsd", "callbacks=default")
    short = measuring_run(resolved, 10)
    assert find_problems(short) == []
    assert plan_of(short).steps == 10


def test_speed_is_the_median_after_the_start() -> None:
    rows = [{"tokens_per_second": value} for value in (1.0, 2.0)]
    rows += [{"val/loss": 3.0}, *({"tokens_per_second": value} for value in (90.0, 100.0, 5000.0))]
    assert speed(rows) == 100


def test_same_seed_same_weights_where_shapes_agree(planned: Any) -> None:
    states = []
    for overrides in (("attention=mha",), ("attention=mqa", "model.d_ff=72"), ("attention=mha", "norm=layernorm")):
        resolved, plan = planned(*overrides)
        decoder = build_decoder(resolved, plan.vocab_size, None)
        decoder.initialize(seed=3)
        states.append(decoder.state_dict())
    for other in states[1:]:
        shared = [name for name in states[0] if name in other and states[0][name].shape == other[name].shape]
        drawn = [name for name in shared if states[0][name].std() > 0]
        assert any("q_proj" in name for name in drawn)
        assert len(drawn) >= 4
        assert all(torch.equal(states[0][name], other[name]) for name in drawn)


def test_pairs_of_real_runs_see_the_same_tokens_and_begin_alike(run: Callable[..., Path], tmp_path: Path) -> None:
    """Two arms of one seed; the same arm in other micro-batches; another seed."""
    arms = {
        "mha": ["attention=mha", "seed=1"],
        "gqa": ["attention=gqa", "attention.n_kv_heads=2", "seed=1"],
        "micro": ["attention=mha", "seed=1", "batch.global_tokens=128", "batch.micro_size=4"],
        "other": ["attention=mha", "seed=2"],
    }
    seen = {}
    for name, overrides in arms.items():
        file = tmp_path / name
        run(*overrides, "budget.steps=4", "+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.file={file}")
        seen[name] = torch.load(file)
    reference = seen["mha"]
    assert [len(tokens) for tokens in reference["tokens"]] == [4] * 4
    for name in ("gqa", "micro", "other"):
        same = [torch.equal(a, b) for a, b in zip(reference["tokens"], seen[name]["tokens"], strict=True)]
        assert same == [name != "other"] * 4
        shared = {
            key: torch.equal(weight, seen[name]["weights"][key])
            for key, weight in reference["weights"].items()
            if weight.std() > 0 and weight.shape == seen[name]["weights"][key].shape  # not the norms, which are ones
        }
        assert set(shared.values()) == {name != "other"}
        different = {"blocks.0.attention.k_proj.weight", "blocks.0.attention.v_proj.weight"}
        assert "blocks.0.attention.q_proj.weight" in shared
        assert different.isdisjoint(shared) == (name == "gqa")


def test_match_in_a_single_run_is_refused() -> None:
    resolved = config.plain(config.compose(["match=params", "tune=lr"]))
    assert [problem.path for problem in find_problems(resolved)] == ["match", "tune"]
