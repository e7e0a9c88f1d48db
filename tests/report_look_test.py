"""The legend of a figure leaves room for its curves, however many and long the names are."""

import warnings

import pytest

from swe_prune.report import look


@pytest.mark.parametrize(
    ("count", "length"), [(0, 0), (3, 12), (8, 22), (8, 23), (3, 45), (24, 60), (24, 200)]
)
def test_a_legend_covers_no_curve_and_leaves_no_axes_without_room(count, length):
    with look.look(), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, axes = look.panel()
        for number in range(count):
            axes.plot([0, 1], [number, number], label=f"{number:02}".ljust(length, "x"))
        look.legend(axes)
        figure.draw_without_rendering()
    page, box = figure.bbox, axes.get_window_extent()
    assert box.width > 0.7 * page.width
    assert box.height > 1.9 * figure.dpi
    for below in figure.legends:
        extent = below.get_window_extent()
        assert extent.y1 <= box.y0
        assert extent.y0 >= page.y0
        assert extent.x1 - extent.x0 <= page.width
