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
from swe_prune.report.records import Results, key_of, name_of

COLUMNS = 4
MODELS = 4  # pruned models whose answers are shown, from the least sparse to the sparsest


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
            name = f"{name_of(row)} {percent(row.sparsity_prunable)}"
            read[name] = {one["number"]: one["text"] for one in last}
    return Picture(
        "answers",
        "Pictures with their true prices and the prices that the models read off them",
        _figure(shown, read),
    )


def _figure(shown: list[dict[str, Any]], read: dict[str, dict[int, str]]) -> Figure:
    lines = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(9, lines * (1.0 + 0.17 * len(read))), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, one in zip(panels, shown, strict=False):
        pixels = image.imread(io.BytesIO(base64.b64decode(one["picture"])), format="png")
        panel.imshow(pixels, cmap="gray")
        panel.set_title(f"{one['price']:g}")
        for line, (name, texts) in enumerate(read.items()):
            text = texts.get(one["number"], "")
            right = price_in(text) == one["price"]
            said = " ".join(text.split())[:16] or "no answer"
            panel.text(
                0,
                -0.08 - 0.26 * line,
                f"{name}: {said}{'' if right else '  (wrong)'}",
                transform=panel.transAxes,
                color=INK if right else PRUNED,
                fontsize=6.5,
                va="top",
                parse_math=False,
            )
    return figure
