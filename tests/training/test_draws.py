"""What a run draws from its sources, before it begins: epochs, shares, notes and refusals; and afterwards."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.training.plan import Plan
from tiny import plan_of, tiny

SEQUENCES = 4  # a step of a tiny run


@pytest.fixture
def plan(run: Callable[..., Path], text_corpus: Path, shards_dir: Path) -> Callable[..., Plan]:
    """Plan a run on the mixture, whose data is prepared."""
    run("data=mixture", "data.sources.prose.max_epochs=null")

    def plan(*overrides: str) -> Plan:
        lines = tiny(text_corpus, shards_dir, "data=mixture", "data.sources.prose.max_epochs=null", *overrides)
        return plan_of(config.plain(config.compose(lines)))

    return plan


def data_notes(plan: Plan) -> list[str]:
    return plan.notes


def test_epochs_and_shares_follow_from_the_weights(plan: Callable[..., Plan]) -> None:
    short = plan("budget.steps=1000")
    assert short.shares == {"code": 0.8, "prose": 0.2}
    assert short.epochs is not None
    assert short.epochs["code"] / short.epochs["prose"] == pytest.approx(4)  # the tiny mixture has one text twice
    blocks = 800 / short.epochs["prose"]
    assert blocks == pytest.approx(round(blocks))
    assert data_notes(short) == []
    staged = plan("budget.steps=1000", "data.sources.prose.weight={0: 0.2, 0.5: 3.2}")
    assert staged.shares == pytest.approx({"code": 0.5, "prose": 0.5})
    warm = plan("budget.steps=1000", "data.temperature=2.0")
    assert warm.shares == pytest.approx({"code": 2 / 3, "prose": 1 / 3}, abs=1e-3)


def test_a_plan_alone_tells_what_a_run_would_be_refused_for(plan: Callable[..., Plan]) -> None:
    """It may be of a run that will have other data."""
    told = [note for note in data_notes(plan("budget.steps=1000000", "dry_run=true")) if "refused" in note]
    assert told
    assert all(note.startswith("a run would be refused: data.sources.") for note in told)


def test_a_step_below_one_sequence_is_refused(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"^batch\.global_tokens=16 is not a multiple of the 64 tokens"):
        plan("batch.global_tokens=16")


def test_repetition_is_noted_and_refused(plan: Callable[..., Plan]) -> None:
    one = plan("budget.steps=1000").epochs
    assert one is not None
    for_epochs = round(1000 / one["code"])  # steps for an epoch of code, and a quarter of prose
    assert data_notes(plan(f"budget.steps={3 * for_epochs}")) == []
    (note,) = data_notes(plan(f"budget.steps={5 * for_epochs}"))
    assert note.startswith("code is seen 5.0 times: up to 4 epochs are about as good as new data")
    with pytest.raises(ConfigError, match=r"data\.sources\.code would be seen 17\.0 times") as caught:
        plan(f"budget.steps={17 * for_epochs}")
    told = str(caught.value)
    assert "or lower data.sources.code.weight" in told
    assert "max_training_tokens" not in told
    allowed, most = (
        re.search(r"max_epochs=(\d+) if it is meant", told),
        re.search(r"budget.steps=(\d+) is within", told),
    )
    assert allowed is not None
    assert most is not None
    within = plan(f"budget.steps={most[1]}")  # what is told to do works, and one more does not
    assert within.epochs is not None
    assert 15.9 < within.epochs["code"] <= 16
    with pytest.raises(ConfigError):
        plan(f"budget.steps={int(most[1]) + 1}")
    plan(f"budget.steps={17 * for_epochs}", f"data.sources.code.max_epochs={allowed[1]}")
    meant = plan(f"budget.steps={17 * for_epochs}", "data.sources.code.max_epochs=17.1")
    assert meant.epochs is not None
    assert meant.epochs["code"] == pytest.approx(17, rel=0.01)


def test_filters_make_other_validation_text(run: Callable[..., Path]) -> None:
    """They decide about held-out documents, too: bits per byte of what one left do not compare with all of it."""
    length = "+curation.filters.length={_target_: thunderhead.corpus.curation.Length, min_bytes: 1045}"
    summaries = [json.loads((run(*more) / "summary.json").read_text()) for more in ((), (length,))]
    assert summaries[0]["validation_data"] != summaries[1]["validation_data"]
    assert summaries[0]["validation_text"] != summaries[1]["validation_text"]


def test_settings_of_the_data_module_may_be_left_at_their_defaults(text_corpus: Path, shards_dir: Path) -> None:
    """As in a data option of the user's own that names its sources only."""
    resolved = config.plain(config.compose(tiny(text_corpus, shards_dir)))
    for setting in ("validation_fraction", "verify", "at_max_epochs", "shuffle_window"):
        del resolved["data"][setting]
    assert plan_of(resolved).steps == 2


def test_the_same_steps_are_more_epochs_of_fewer_tokens(
    run: Callable[..., Path], text_corpus: Path, shards_dir: Path
) -> None:
    """25 steps of 4 blocks: 1 and 4 epochs of the first of many; the validation is the same, and so are the tokens."""
    summaries, plans = [], []
    for blocks in (100, 25):
        folder = run("budget.steps=25", f"data.max_training_tokens={32 * blocks}")
        summaries.append(json.loads((folder / "summary.json").read_text()))
        plans.append(json.loads((folder / "plan.json").read_text()))
    assert [summary["ledger"]["text"]["epochs"] for summary in summaries] == [1.0, 4.0]
    assert [planned["epochs"] for planned in plans] == [{"text": 1.0}, {"text": 4.0}]
    assert "an epoch is 800 tokens" in " ".join(plans[1]["notes"])
    for same in ("validation_data", "validation_text", "tokens", "steps"):
        assert summaries[0][same] == summaries[1][same]
    assert summaries[0]["val_loss"] != summaries[1]["val_loss"]

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            plan_of(config.plain(config.compose(tiny(text_corpus, shards_dir, *overrides))))
        return str(error.value)

    assert "leaves no block of model.context_length=32 tokens of text: use at least 32" in refused(
        "data.max_training_tokens=31"
    )
    assert "leaves nothing out" in refused("data.max_training_tokens=10000000")
    assert "would be seen 16.7 times" in refused("budget.steps=25", "data.max_training_tokens=192")


def test_a_source_that_a_run_never_reads_is_told(plan: Callable[..., Plan]) -> None:
    for weight, steps, when in (
        ("4e-10", 1000, "of 4,000"),
        ("0.01", 5, "of 20"),
        ("{0: 0.2, 0.8: 4e-10}", 1000, "from 0.8 to 1 of it"),
    ):
        (note,) = data_notes(plan(f"budget.steps={steps}", f"data.sources.prose.weight={weight}"))
        assert note.startswith(f"prose gets no sequence in this run {when}: raise data.sources.prose.weight or")
    assert data_notes(plan("budget.steps=5", "data.sources.prose.weight=0")) == []


def test_the_others_take_the_place_of_a_source_that_is_used_up(plan: Callable[..., Plan]) -> None:
    found = plan("budget.steps=1000", "data.sources.prose.max_epochs=0.01")
    assert found.steps == 1000
    assert found.epochs is not None
    assert 0.0099 < found.epochs["prose"] <= 0.01
    n = found.shares["prose"] * 4000
    (note,) = data_notes(found)
    assert note.startswith(f"prose reaches max_epochs=0.01 in step {round(n / 0.2 / SEQUENCES)}") or note.startswith(
        f"prose reaches max_epochs=0.01 in step {round(n / 0.2 / SEQUENCES) + 1}"
    )
    message = r"data\.sources: only lasts for ([\d,]+) of 1,000 steps: all with a weight are used up"
    limits = ("data.sources.prose.max_epochs=0.01", "data.sources.code.max_epochs=0.01")
    with pytest.raises(ConfigError, match=message) as refused:
        plan("budget.steps=1000", *limits)
    steps = str(refused.value).rpartition("budget.steps=")[2]
    assert plan(f"budget.steps={steps}", *limits).steps == int(steps)  # the advice works, and is the most
    with pytest.raises(ConfigError, match=f"only lasts for {steps} of"):
        plan(f"budget.steps={int(steps) + 1}", *limits)


def test_a_source_that_is_used_up_can_end_the_run(plan: Callable[..., Plan]) -> None:
    stop = ("data.sources.prose.max_epochs=0.01", "data.at_max_epochs=stop")
    found = plan("budget.steps=1000", *stop)
    assert found.steps < 1000
    assert found.tokens == found.steps * 128
    (note,) = data_notes(found)
    assert note.startswith(
        f"stops after {found.steps:,} of 1,000 steps, when prose (data.sources.prose.max_epochs=0.01)"
    )
    assert found.epochs is not None
    assert 0.0095 < found.epochs["prose"] <= 0.01
    assert plan(f"budget.steps={found.steps}", *stop).steps == found.steps
    staged = plan("budget.steps=1000", *stop, "data.sources.prose.weight={0: 0, 0.5: 0.2}")
    # prose begins in the middle of the run that is left, and ends it
    assert staged.steps == pytest.approx(2 * found.steps, abs=2)


def test_weights_are_refused_with_the_other_problems(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError) as refused:
        plan("data.sources.prose.weight={0.5: 1}", "attention.n_kv_heads=3")
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigError, match="max_epochs leaves 1 sequences, fewer than the 4 of one step"):
        plan("data.sources.prose.max_epochs=0.0001", "data.at_max_epochs=stop", "data.sources.code.weight=0")


def test_the_ledger_of_a_run(run: Callable[..., Path]) -> None:
    folder = run(
        "data=mixture", "budget.steps=10", "data.sources.prose.weight={0: 0.2, 0.5: 3.2}", "validation.every=5",
        "data.sources.prose.max_epochs=null",
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    ledger = summary["ledger"]
    # 20 samples with .8 and .2, 20 with .2 and .8; of 32 tokens
    assert {source: entry["tokens"] for source, entry in ledger.items()} == {"code": 20 * 32, "prose": 20 * 32}
    assert {source: entry["share"] for source, entry in ledger.items()} == {"code": 0.5, "prose": 0.5}
    plan = json.loads((folder / "plan.json").read_text())
    assert {source: entry["epochs"] for source, entry in ledger.items()} == plan["epochs"]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        step = int(row["step"])
        prose = min(step, 5) * 4 * 0.2 + max(step - 5, 0) * 4 * 0.8
        assert abs(int(row["tokens/prose"]) / 32 - prose) <= 2  # a sample in each stage
        assert int(row["tokens/prose"]) + int(row["tokens/code"]) == int(row["tokens"]) == step * 128
        assert float(row["share/prose"]) == pytest.approx(int(row["tokens/prose"]) / int(row["tokens"]))
    validated = [row for row in rows if row["val/loss"]]
    assert [row["step"] for row in validated] == ["5", "10"]
    for row in validated:
        for metric in ("val/loss", "val/bits_per_byte"):
            by_source = [float(row[f"{metric}/{source}"]) for source in ("code", "prose")]
            assert float(row[metric]) == pytest.approx(sum(by_source) / 2, rel=1e-6)
    assert ledger["prose"]["val_loss"] == pytest.approx(float(validated[-1]["val/loss/prose"]))
