"""Intervals of differences over seeds and documents."""

import math
from pathlib import Path

import numpy as np
import pytest
from simulated import write_arms

from thunderhead.lab import documents
from thunderhead.lab.analysis import analyse
from thunderhead.lab.report import write_report
from thunderhead.lab.runs import read_runs
from thunderhead.lab.statistics import Interval, crossed_interval
from thunderhead.training.record import keep_documents

DRAW = np.random.default_rng(0)
TARGETS = {"a": DRAW.integers(5, 100, 40), "b": DRAW.integers(5, 100, 20)}  # of two sources
NATS = {s: (3.0 + DRAW.normal(0, 0.5, (2, 3, len(t)))) * t for s, t in TARGETS.items()}  # arms, seeds, documents


def keep(folder: Path, arm: int, seed: int, steps: int = 100, documents: int | None = None) -> None:
    kept = {
        source: {
            "nats": NATS[source][arm, seed, :documents].tolist(),
            "targets": targets[:documents].tolist(),
            "bytes": 5 * int(targets.sum()),
        }
        for source, targets in TARGETS.items()
    }
    keep_documents(folder / str(3 * arm + seed), kept, steps)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = write_arms(tmp_path / "runs", {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [3.1, 3.2, 3.25]})
    for arm in (0, 1):
        for seed in range(3):
            keep(folder, arm, seed)
    return folder


def intervals(folder: Path, metric: str = "val_loss") -> dict[tuple[str, str], Interval]:
    return documents.intervals(analyse(read_runs([folder]), metric=metric))  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["val_loss", "bits_per_byte"])
def test_the_mean_over_documents_is_the_difference_of_the_results(metric: str, runs: Path) -> None:
    """Which is of the sources' means, whatever their sizes; each is over all of its targets, or bytes."""
    over = {s: t.sum() if metric == "val_loss" else 5 * t.sum() * math.log(2) for s, t in TARGETS.items()}
    results = np.mean([NATS[s].sum(axis=2) / over[s] for s in TARGETS], axis=0)  # arms, seeds
    (found,) = intervals(runs, metric).values()
    assert (found.low + found.high) / 2 == pytest.approx((results[1] - results[0]).mean(), rel=1e-9)
    each = np.concatenate([(NATS[s][1] - NATS[s][0]) * 60 / over[s] / 2 for s in TARGETS], axis=1)
    assert found == pytest.approx(crossed_interval(each), rel=1e-9)


def test_a_report_shows_it(runs: Path, tmp_path: Path) -> None:
    (found,) = intervals(runs).values()
    html = write_report(tmp_path / "out", read_runs([runs])).read_text()
    assert "over other text" in html
    assert f"{found.high:+.4f}".replace("-", "−") in html
    (runs / "0" / "document_losses.json").unlink()
    assert "over other text" not in write_report(tmp_path / "other", read_runs([runs])).read_text()


def test_documents_of_another_end_or_other_ones_say_nothing(runs: Path) -> None:
    keep(runs, 1, 2, documents=10)
    assert intervals(runs) == {}
    keep(runs, 1, 2, steps=50)
    assert intervals(runs) == {}
    keep(runs, 1, 2)
    assert intervals(runs)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"steps": 100, "sources": {}}', '{"steps": 100, "sources": {"a": 1}}']
)
def test_a_damaged_file_is_named_and_costs_only_the_interval(content: str, runs: Path) -> None:
    (runs / "0" / "document_losses.json").write_text(content)
    analysis = analyse(read_runs([runs]))
    assert documents.intervals(analysis) == {}
    assert "document_losses.json" in analysis.warnings[-1]
