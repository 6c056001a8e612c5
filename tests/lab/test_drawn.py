import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from thunderhead.lab.drawn import write_csv


def rows(folder: Path, high: list[float]) -> list[list[str]]:
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlabel("tokens")
    axes.plot([1, 2], [3.0, 4.0], label="mha")
    axes.fill_between([1, 2], [2.0, 2.5], high, label="_mha: band")
    write_csv(folder / "drawn.csv", figure)
    with (folder / "drawn.csv").open() as file:
        return list(csv.reader(file))


def test_lines_and_bands_are_told_by_their_points(tmp_path: Path) -> None:
    _, *found = rows(tmp_path, [3.5, 5.0])
    assert found[:2] == [["tokens", "mha", "1.0", "3.0"], ["tokens", "mha", "2.0", "4.0"]]
    assert {tuple(map(float, row[2:])) for row in found[2:]} == {(1, 2), (2, 2.5), (1, 3.5), (2, 5)}
    assert {row[1] for row in found[2:]} == {"mha: band"}


@pytest.mark.parametrize("high", [[np.nan, np.nan], [np.inf, np.nan]])
def test_a_band_of_nothing_finite_has_no_rows(high: list[float], tmp_path: Path) -> None:
    """As that of runs whose losses were all measured once."""
    assert len(rows(tmp_path, high)) == 3
