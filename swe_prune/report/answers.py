"""Figure of the prices that models of the first seed read off the same pictures."""

import base64
import io
import math
from typing import Any

from matplotlib import image
from matplotlib.figure import Figure

from swe_prune.data.price_rows import price_in
from swe_prune.report.formats import percent
from swe_prune.report.look import INK, PRUNED, Picture
from swe_prune.report.records import Results, key_of, name_and_part_of

COLUMNS = 4
MODELS = 4  # pruned models whose answers are shown, from the least sparse to the sparsest
WIDTH = 9.0  # inches
LINE = 10.0  # points from one answer to the next
GAP, TITLE = 0.1, 0.3  # inches between pictures, and for the price above one


def answers(results: Results) -> Picture | None:
    """Returns the pictures with the true price and what the models read; None without any."""
    seed = next(iter(results.seeds), None)
    shown = results.dense.get(seed, {}).get("dense_answers") if seed is not None else None
    if not shown:
        return None
    read = {"dense": {one["number"]: one["text"] for one in shown}}
    rows = sorted((r for r in results.rows if r.seed == seed), key=lambda r: r.sparsity_prunable)
    for row in rows[:: math.ceil(len(rows) / MODELS)]:
        detail = results.details.get(key_of(row))
        last = detail and (detail.answers.get("finetuned") or detail.answers.get("pruned"))
        if last:
            name = f"{name_and_part_of(row)} {percent(row.sparsity_prunable)}"
            read[name] = {one["number"]: one["text"] for one in last}
    return Picture(
        "answers",
        "Pictures with their true prices and the prices that the models read off them",
        _figure(shown, read),
    )


def _figure(shown: list[dict[str, Any]], read: dict[str, dict[int, str]]) -> Figure:
    pictures = [
        image.imread(io.BytesIO(base64.b64decode(one["picture"])), format="png") for one in shown
    ]
    # All in inches: the highest picture fits its column, with its price above and answers below.
    width = WIDTH / COLUMNS - GAP
    high = width * min(1.0, max(len(pixels) / len(pixels[0]) for pixels in pictures))
    row = GAP + TITLE + high + (len(read) + 1) * LINE / 72
    height = row * math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(WIDTH, height))
    for number, (one, pixels) in enumerate(zip(shown, pictures, strict=True)):
        above, column = divmod(number, COLUMNS)
        left, bottom = (column + 0.5) * GAP + column * width, height - above * row - TITLE - high
        panel = figure.add_axes(
            (left / WIDTH, bottom / height, width / WIDTH, high / height), anchor="NW"
        )
        panel.axis("off")
        panel.imshow(pixels, cmap="gray")
        panel.set_title(f"{one['price']:g}")
        for line, (name, texts) in enumerate(read.items()):
            text = texts.get(one["number"], "")
            right = price_in(text) == one["price"]
            said = " ".join(text.split())[:16] or "no answer"
            panel.annotate(
                f"{name}: {said}{'' if right else '  (wrong)'}",
                (0, 0),
                (0, -4 - LINE * line),
                xycoords="axes fraction",
                textcoords="offset points",
                color=INK if right else PRUNED,
                fontsize=6.5,
                va="top",
                parse_math=False,
            )
    return figure
