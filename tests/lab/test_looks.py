"""Legends: in their panels, or below figures of many lines."""

import pytest

from thunderhead.lab import looks


@pytest.mark.parametrize("n_lines", [2, looks.MANY, looks.MANY + 1, 100])
@pytest.mark.parametrize("on_phone", [False, True])
def test_a_legend_covers_no_panel_however_many_lines_it_has(n_lines: int, on_phone: bool) -> None:
    token = looks.stacked.set(on_phone)
    figure, axes_of = looks.panels(2, 4.0)
    looks.stacked.reset(token)
    height = figure.get_figheight()
    for axes in axes_of:
        for index in range(n_lines):
            axes.plot([0, 1], [index, index], label=f"arm {index} with a name of its own")
    looks.legend(*axes_of)
    figure.draw_without_rendering()
    if n_lines <= looks.MANY:
        assert not figure.legends
        assert figure.get_figheight() == height
        return
    (below,) = figure.legends
    assert len(below.get_texts()) == n_lines
    frame = below.get_window_extent()
    assert frame.y0 >= 0
    assert frame.x0 >= 0
    assert frame.x1 <= figure.bbox.width
    for axes in axes_of:
        assert not frame.overlaps(axes.get_window_extent())
        assert axes.get_window_extent().height > 2 * figure.dpi  # inches
