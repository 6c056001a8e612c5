"""Which arms are compared with which, on what, and what is left out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from simulated import write_arms, write_run

from thunderhead.core.config import ConfigError
from thunderhead.lab.analysis import analyse
from thunderhead.lab.runs import Failure, read_runs
from thunderhead.training.record import write_json

LOSSES = {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [3.05, 3.16, 3.25], "attention=gqa": [3.0, 3.11, 3.2]}


def test_all_pairs_without_a_baseline(tmp_path: Path) -> None:
    found = analyse(read_runs([write_arms(tmp_path, LOSSES)]))
    assert [(c.arm, c.against) for c in found.comparisons] == [("mqa", "mha"), ("gqa", "mha"), ("gqa", "mqa")]
    assert found.reference is found.arms[0]
    assert found.comparisons[0].mean == pytest.approx(0.16 / 3)
    assert "matched tokens, FLOPs and parameters): worse." in found.sentences[0]
    assert [arm.name for arm in found.ranking] == ["mha", "gqa", "mqa"]
    assert found.different == {"attention.n_kv_heads": [None, 1, 0.5]}


def test_all_with_the_baseline(tmp_path: Path) -> None:
    found = analyse(read_runs([write_arms(tmp_path, LOSSES)]), baseline="attention=gqa")
    assert [(c.arm, c.against) for c in found.comparisons] == [("mha", "gqa"), ("mqa", "gqa")]


def test_many_arms_are_compared_with_the_first(tmp_path: Path) -> None:
    losses = {f"optimizer.lr=0.00{digit}": [3.0, 3.1 + digit / 100] for digit in range(1, 6)}
    found = analyse(read_runs([write_arms(tmp_path, losses)]))
    assert {c.against for c in found.comparisons} == {"lr=0.001"}


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^baseline: no arm is called 'mla'.*the arms are 'mha', 'mqa', 'gqa'"):
        analyse(read_runs([write_arms(tmp_path, LOSSES)]), baseline="mla")


@pytest.mark.parametrize("left_a_record", [True, False])
def test_a_baseline_that_failed_is_replaced_and_told(tmp_path: Path, left_a_record: bool) -> None:
    write_arms(tmp_path, LOSSES)
    names = {tmp_path / "9": "mla"}  # as a sweep has planned it
    if left_a_record:
        write_run(tmp_path / "9", ["attention=mla"], steps=20)
    found = analyse(read_runs([tmp_path]), baseline="mla", names=names)
    assert found.reference is not None
    assert found.reference.name == "mha"
    assert "The baseline mla has no finished run; mha stands in." in found.warnings


def test_unfinished_and_diverged_runs_are_listed_and_not_compared(tmp_path: Path) -> None:
    write_arms(tmp_path, LOSSES)
    write_run(tmp_path / "10", ["attention=mha"], seed=4, steps=40)
    write_run(tmp_path / "11", ["attention=mqa"], seed=4, summary={"val_loss": float("nan")})
    found = analyse(read_runs([tmp_path]), failures=[Failure("mla seed=1", "exit status 1")])
    assert [failure.reason for failure in found.left_out] == [
        "exit status 1",
        "unfinished: step 40 of 100",
        "diverged: the final validation loss is nan",
    ]
    assert found.comparisons[0].n == 3
    assert (
        "1 of 4 seeds of mqa diverged: that is its result; what is shown of the others flatters it." in found.warnings
    )
    assert found.sentences[0].startswith("mqa − mha: 1 of 4 seeds of mqa diverged, ")
    assert [comparison.verdict for comparison in found.comparisons] == ["open"] * 3


def test_an_arm_with_diverged_seeds_ranks_last(tmp_path: Path) -> None:
    """However good its others are; and one of which all did is told of."""
    write_arms(
        tmp_path, {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [2.0, 2.1], "attention=gqa": [3.1, 3.2, 3.3]}
    )
    nan = {"val_loss": float("nan")}
    write_run(tmp_path / "10", ["attention=mqa"], seed=3, summary=nan)
    write_run(tmp_path / "11", ["attention=mla"], seed=1, summary=nan)
    found = analyse(read_runs([tmp_path]))
    assert [arm.name for arm in found.ranking] == ["mha", "gqa", "mqa"]
    assert "1 of 1 seeds of mla diverged: that is its result." in found.warnings
    verdicts = {(c.arm, c.against): c.verdict for c in found.comparisons}
    assert verdicts["mqa", "mha"] == verdicts["gqa", "mqa"] == "open"


def test_arms_are_ranked_as_the_sentences_say(tmp_path: Path) -> None:
    """By differences within seeds: one that ran on the easier seeds only is not better for that."""
    write_arms(tmp_path, {"attention=mha": [3.0, 3.5, 4.0], "attention=mqa": [3.1, 3.6]})
    found = analyse(read_runs([tmp_path]))
    assert found.mean(found.arms[1]) < found.mean(found.arms[0])
    assert found.comparisons[0].mean == pytest.approx(0.1)
    assert [arm.name for arm in found.ranking] == ["mha", "mqa"]


def test_other_validation_data_is_not_compared(tmp_path: Path) -> None:
    write_arms(tmp_path, LOSSES)
    other = {"validation_data": "other", "validation_text": "other"}
    write_run(tmp_path / "10", ["data=text", "data.path=x"], summary=other)
    found = analyse(read_runs([tmp_path]))
    assert len(found.arms) == 3
    (left,) = found.left_out
    assert "validated on other data than" in left.reason


def test_the_configuration_tells_where_a_record_does_not(tmp_path: Path) -> None:
    write_run(tmp_path / "1", ["attention=mha"])
    write_run(tmp_path / "2", ["attention=mha", "data.max_validation_tokens=100"])
    for folder in tmp_path.iterdir():
        summary = json.loads((folder / "summary.json").read_text())
        write_json(folder / "summary.json", {k: v for k, v in summary.items() if not k.startswith("validation_")})
    found = analyse(read_runs([tmp_path]))
    assert len(found.left_out) == 1


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    write_arms(tmp_path, {"attention=mha": [3.0, 3.1]})
    for seed in (1, 2):
        summary = {"validation_data": "bpe", "bits_per_byte": 1.0 + seed / 10}
        write_run(tmp_path / f"1{seed}", ["tokenizer=bpe", "attention=mha"], seed=seed, loss=9.0, summary=summary)
    found = analyse(read_runs([tmp_path]))
    assert (found.metric, found.unit) == ("bits_per_byte", "bits a byte")
    assert found.comparisons[0].differences == pytest.approx({1: 1.1 - 1.5, 2: 1.2 - 1.55})
    assert any("bits per byte are compared" in warning for warning in found.warnings)
    refused = analyse(read_runs([tmp_path]), metric="val_loss")
    assert refused.comparisons == []
    assert "validated in other tokens or another context" in refused.left_out[0].reason


@pytest.mark.parametrize("sweep", [("tokenizer=byte", "tokenizer=bpe"), ("model.context_length=16",)])
def test_sweeps_over_what_reads_the_text_are_compared_on_the_same_text(
    run: Callable[..., Path], tmp_path: Path, sweep: tuple[str, ...]
) -> None:
    arms = [run(arm, "data.max_validation_bytes=8000") for arm in (*sweep, "model.context_length=32")[:2]]
    assert len({json.loads((arm / "summary.json").read_text())["validation_text"] for arm in arms}) == 1
    found = analyse(read_runs([tmp_path]))
    assert (found.metric, len(found.arms), found.left_out) == ("bits_per_byte", 2, [])
    refused = analyse(read_runs([tmp_path]), metric="val_loss")
    assert "validated in other tokens or another context" in refused.left_out[0].reason
    # of a bound in tokens, other tokenizers read other text, and that is told
    if "tokenizer=bpe" in sweep:
        run("tokenizer=byte", "data.max_validation_bytes=8000", "data.max_validation_tokens=5000")
        assert "validated on other data than" in analyse(read_runs([tmp_path])).left_out[0].reason


def test_arms_without_the_metric_are_not_compared(tmp_path: Path) -> None:
    write_arms(tmp_path, {"attention=mha": [3.0, 3.1], "attention=mqa": [3.1, 3.3]})
    write_run(tmp_path / "9", ["attention=mla"], summary={"bits_per_byte": None})
    found = analyse(read_runs([tmp_path]), metric="bits_per_byte", baseline="mla")
    assert [arm.name for arm in found.arms] == ["mha", "mqa"]
    assert "no bits_per_byte" in found.left_out[0].reason
    assert found.reference is found.arms[0]


def test_averaged_weights_are_compared_by_their_own_loss(tmp_path: Path) -> None:
    for number, (seed, averaged) in enumerate([(1, 2.9), (2, 3.0), (1, 2.8), (2, 2.88)]):
        arm = ["callbacks=ema", f"callbacks.average.decay={0.5 * (number // 2)}"]
        write_run(tmp_path / str(number), arm, seed=seed, summary={"metrics": {"loss_averaged": averaged}})
    found = analyse(read_runs([tmp_path]), metric="loss_averaged")
    assert found.comparisons[0].mean == pytest.approx(-0.11)
    assert "−0.110 nats of averaged weights" in found.sentences[0]


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert analyse([]).sentences == []
    only = analyse(read_runs([write_run(tmp_path / "run")]))
    assert (len(only.arms), only.sentences, only.different) == (1, [], {})
