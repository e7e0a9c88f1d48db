"""The figure of the prices that models read off pictures."""

import base64
import io

import numpy as np
import pytest
from matplotlib import image

from swe_prune.report import answers


def picture(high, wide):
    file = io.BytesIO()
    image.imsave(file, np.zeros((high, wide)), format="png", cmap="gray")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("high", "wide", "models"), [(32, 96, 1), (32, 96, 5), (40, 30, 5)])
def test_every_answer_is_on_the_page_and_below_its_picture(high, wide, models):
    shown = [{"number": n, "price": 7.0, "picture": picture(high, wide)} for n in range(8)]
    figure = answers._figure(
        shown, {f"model {n}": dict.fromkeys(range(8), " 7") for n in range(models)}
    )
    figure.canvas.draw()
    page = figure.bbox
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == models
        assert all(page.y0 <= box.y0 and box.y1 <= panel.bbox.y0 for box in boxes)
    # The answers of the first row end above the titles of the second.
    lowest = min(text.get_window_extent().y0 for panel in figure.axes[:4] for text in panel.texts)
    titles = [panel.title.get_window_extent().y1 for panel in figure.axes[4:]]
    assert lowest > max(titles)
