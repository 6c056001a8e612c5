"""What tells arms apart: their names, their differences, and what makes them incomparable."""

from pathlib import Path

import pytest
import yaml
from simulated import write_arms, write_run

from thunderhead.core.config import ConfigError, set_value, to_yaml
from thunderhead.lab import arms as grouping
from thunderhead.lab.analysis import analyse
from thunderhead.lab.arms import Arm, make_arms
from thunderhead.lab.runs import read_runs


def names(folder: Path, *overrides: str) -> list[str]:
    return [arm.name for arm in make_arms(read_runs([write_arms(folder, {o: [3.0, 3.1] for o in overrides})]))]


def test_names_are_the_options_that_differ(tmp_path: Path) -> None:
    assert names(tmp_path, "attention=mha", "attention=mqa", "attention=gqa") == ["mha", "mqa", "gqa"]


def test_names_are_the_values_where_the_option_is_the_same(tmp_path: Path) -> None:
    assert names(tmp_path, "optimizer.lr=0.001", "optimizer.lr=0.002") == ["lr=0.001", "lr=0.002"]


def test_names_of_several_groups(tmp_path: Path) -> None:
    found = names(
        tmp_path, "attention=mha optimizer=lion", "attention=mqa optimizer=lion optimizer.lr=0.1", "model.d_ff=96"
    )
    assert found == ["d_ff=null mha lion", "d_ff=null mqa lion lr=0.1", "d_ff=96 gqa adamw"]


def test_an_experiment_is_named_as_typed(tmp_path: Path) -> None:
    assert names(tmp_path, "experiment=gpt2", "experiment=palm") == ["gpt2", "palm"]


def test_what_a_sweep_solved_for_is_no_part_of_the_name(tmp_path: Path) -> None:
    match = {"by": "params", "target": 100, "reached": 99, "set": {"model.d_ff": 90}}
    write_run(tmp_path / "1", ["attention=mha"])
    write_run(tmp_path / "2", ["attention=mqa", "model.d_ff=90"], match=match)
    arms = make_arms(read_runs([tmp_path]))
    assert [arm.name for arm in arms] == ["mha", "mqa"]
    assert list(grouping.differences([arm.first.config for arm in arms])) == ["model.d_ff", "attention.n_kv_heads"]


def test_names_may_be_given(tmp_path: Path) -> None:
    runs = read_runs([write_arms(tmp_path, {"attention=mha": [3.0], "attention=mqa": [3.0]})])
    told = {tmp_path / "0": "first", tmp_path / "1": "second"}
    assert [arm.name for arm in make_arms(runs, told)] == ["first", "second"]
    told.popitem()
    assert [arm.name for arm in make_arms(runs, told)] == ["mha", "mqa"]  # not all are known


def test_a_seed_or_a_logger_makes_no_arm(tmp_path: Path) -> None:
    write_run(tmp_path / "1", ["logger=csv"], seed=1)
    write_run(tmp_path / "2", ["logger=default", "name=other", "generation.max_new_tokens=3"], seed=2)
    (arm,) = make_arms(read_runs([tmp_path]))
    assert list(arm.runs) == [1, 2]


def test_what_holds_the_seed_makes_no_arm(tmp_path: Path) -> None:
    """As `callbacks.checkpoint.filename='seed-${seed}'` has it; a value that was chosen with the seed does."""
    for seed in (1, 2):
        for lr in ("0.001", "0.002"):
            lines = [f"optimizer.lr={lr}", "data.path=text-${seed}"]
            folder = write_run(tmp_path / "refers" / f"{lr}-{seed}", [*lines, f"seed={seed}"], seed=seed)
            assert f"text-{seed}" in (folder / "config.yaml").read_text()
        write_run(tmp_path / "chosen" / str(seed), [f"model.n_layers={seed}"], seed=seed)
    assert [[*arm.runs] for arm in make_arms(read_runs([tmp_path / "refers"]))] == [[1, 2], [1, 2]]
    assert [[*arm.runs] for arm in make_arms(read_runs([tmp_path / "chosen"]))] == [[1], [2]]


def test_of_equal_runs_the_last_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "1", loss=3.0)
    write_run(tmp_path / "2", loss=3.5)
    (arm,) = make_arms(read_runs([tmp_path]))
    assert arm.values("val_loss") == [3.5]
    assert [run.folder.name for run in arm.repeated] == ["1"]
    assert any("left out" in warning and str(tmp_path / "1") in warning for warning in grouping.warnings([arm]))


def test_finding_an_arm(tmp_path: Path) -> None:
    arms = make_arms(read_runs([write_arms(tmp_path, {"attention=mha": [3.0], "attention=mqa": [3.0]})]))
    assert grouping.find(arms, "mqa") is grouping.find(arms, "attention=mqa") is arms[1]
    with pytest.raises(ConfigError, match=r"no arm is called 'mhaa'; did you mean 'mha'\?; the arms are 'mha', 'mqa'"):
        grouping.find(arms, "mhaa")


# --- what else the runs differ in -----------------------------------------------------------------------------------


def two(tmp_path: Path, **second: object) -> list[Arm]:
    write_run(tmp_path / "1", ["attention=mha"])
    write_run(tmp_path / "2", ["attention=mqa"], **second)  # type: ignore[arg-type]
    return make_arms(read_runs([tmp_path]))


def test_nothing_to_warn_of(tmp_path: Path) -> None:
    arms = two(tmp_path)
    assert grouping.warnings(arms) == []
    assert grouping.matched(*arms) == ["tokens", "FLOPs", "parameters"]


def test_other_commits_devices_seeds_and_budgets_are_told(tmp_path: Path) -> None:
    other = {"device": "a GPU", "precision": "bf16-mixed", "tokens": 150_000, "flops": 9e9}
    arms = two(tmp_path, commit="fedcba98", seed=2, summary=other)
    found = " ".join(grouping.warnings(arms))
    for part in (
        "different commits (01234567, fedcba98)",
        "different devices (a CPU, a GPU)",
        "precision=auto came out differently: bf16-mixed, fp32",
        "mha: 1; mqa: 2",
        "mqa had 1.5 × the tokens and 1.8 × the FLOPs of mha: the budgets are not matched",
    ):
        assert part in found
    assert grouping.matched(*arms) == ["parameters"]


def test_what_is_not_equal_is_told_beside_what_is(tmp_path: Path) -> None:
    """Another tokenizer, as bytes against bpe: more of the text in as many tokens."""
    other = {"flops": 5e9 * 1.7, "parameters": 57_000, "bits_per_byte": 3.0 / 2 / 3.8}
    mha, mqa = two(tmp_path, summary=other)
    told = ["1.7 × the FLOPs", "1.9 × the parameters", "3.8 × the text"]
    assert grouping.unequal(mqa, mha) == told
    (warning,) = grouping.warnings([mha, mqa])
    assert (
        warning
        == "mqa had 1.7 × the FLOPs, 1.9 × the parameters and 3.8 × the text of mha: that may be what is measured."
    )
    (sentence,) = analyse(read_runs([tmp_path]), metric="bits_per_byte").sentences
    assert "(1 seed, matched tokens; 1.7 × the FLOPs, 1.9 × the parameters and 3.8 × the text)" in sentence


def test_uncommitted_changes_are_told_where_they_may_change_a_run(tmp_path: Path) -> None:
    changed = (
        " M src/thunderhead/config.py",
        "?? conf/attention/mine.yaml",
        "?? tests/test_mine.py",
        " M README.md",
    )
    write_run(tmp_path / "1", changed_files=changed)
    (warning,) = grouping.warnings(make_arms(read_runs([tmp_path])))
    assert (
        warning == "Runs were made with uncommitted changes (?? conf/attention/mine.yaml, M src/thunderhead/config.py)."
    )
    write_run(tmp_path / "2", changed_files=changed[2:])
    assert grouping.warnings(make_arms(read_runs([tmp_path / "2"]))) == []


def test_a_match_of_time_is_told_with_its_miss(tmp_path: Path) -> None:
    match = {"by": "time", "target": 20.0, "reached": 20.0, "set": {"budget.steps": 100}}
    write_run(tmp_path / "1", ["attention=mha"], match=match, summary={"seconds": 20.0})
    slower = {"seconds": 26.0, "tokens": 50_000, "flops": 1e9, "parameters": 1}
    write_run(tmp_path / "2", ["attention=mqa"], match=match, summary=slower)
    mha, mqa = make_arms(read_runs([tmp_path]))
    assert grouping.matched(mqa, mha) == ["time (missed by +30.0 %)"]
    (warning,) = grouping.warnings([mha, mqa])
    assert warning.startswith(
        "mqa had 0.5 × the tokens, 0.2 × the FLOPs and 3.33e-05 × the parameters of mha, in 1.3 × its time"
    )


def named(tmp_path: Path, *changes: dict[str, object]) -> list[str]:
    """Arms of a run whose recorded configuration is changed so, by config path."""
    for number, change in enumerate(changes):
        file = write_run(tmp_path / str(number)) / "config.yaml"
        content = yaml.safe_load(file.read_text())
        for path, value in change.items():
            content = set_value(content, path, value)
        file.write_text(to_yaml(content))
    return [arm.name for arm in make_arms(read_runs([tmp_path]))]


def test_components_of_ones_own_are_named_by_their_class(tmp_path: Path) -> None:
    assert named(tmp_path / "a", {"norm._target_": "mine.A"}, {"norm._target_": "mine.B"}) == ["A", "B"]
    found = named(tmp_path / "b", {"norm._target_": "mine.A"}, {"norm._target_": "other.A"})
    assert found == ["mine.A", "other.A"]
    assert named(tmp_path / "c", {}, {"norm._target_": "mine.A"})[1] == "A"


@pytest.mark.parametrize(("first", "second"), [(0, 0.0), (1, 1.0), (True, 1), (None, "null"), ("1", 1)])
def test_two_arms_never_have_one_name(first: object, second: object, tmp_path: Path) -> None:
    names = named(tmp_path, {"optimizer.weight_decay": first}, {"optimizer.weight_decay": second})
    assert len({*names}) == len(names) == 2
    assert all(names)
