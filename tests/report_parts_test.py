"""Parts of a model that are pruned alone are compared with themselves only."""

import html

from report_synthetic import cell, rows_of, write_rows

from swe_prune import report
from swe_prune.report import claims, comparison, curves, records, sections, stats, tables

DECODER, VISION = "^decoder/", "^vision/"


def rows():
    """The tower costs less than the decoder, and another criterion is best in each."""
    found = []
    for part, costs in {
        DECODER: {"swe": 0.5, "magnitude": 0.4},
        VISION: {"swe": 0.1, "magnitude": 0.2},
        "": {"swe": 0.9, "magnitude": 0.8},
    }.items():
        for criterion, cost in costs.items():
            found += rows_of({0.6: cost}, criterion, include=part)
    return found


def test_the_best_of_a_part_is_of_that_part():
    cells = stats.summarise(rows())
    groups = list(dict.fromkeys(one.group for one in cells))
    assert groups == [records.CellGroup("tensor", part) for part in (DECODER, VISION, "")]
    best = {}
    for group in groups:
        found = comparison.compare(cells, group, recovered=True)
        assert found.names == ["swe", "magnitude"]
        best[group.part] = found.best[0.6]
    assert best == {DECODER: "magnitude", VISION: "swe", "": "magnitude"}


def test_the_headline_has_a_sentence_for_each_part():
    said = comparison.headline(stats.summarise(rows())).replace("\xa0", " ")
    starts = [f"At 60 % sparsity of {part} " for part in (DECODER, VISION, "all prunable weights")]
    assert [said.count(start) for start in starts] == [1, 1, 1]
    first, second, third = (said.index(start) for start in starts)
    assert first < second < third
    assert said[second:].startswith(starts[1] + "swe (equal sparsity per tensor) has the lowest")


def test_the_claims_are_one_sentence_each_with_every_part():
    told = [
        cell(
            seed=seed, include=part, sparsity=at, rate=None, sparsity_prunable=at, control_mae=10.0,
            finetuned_mae=10.0 + more + 0.1 * seed,
        )
        for part, more in ((DECODER, 5.0), ("", 9.0))
        for at in (0.5, 0.8)
        for seed in range(3)
    ]  # fmt: skip
    sentences = claims.of_prices(stats.summarise(told), None)
    assert len(sentences) == 2
    for sentence, share in zip(sentences, ("50", "80"), strict=True):
        assert f"without {share}\xa0% of {DECODER} by swe" in sentence
        assert f"without {share}\xa0% of the weights by swe" in sentence


def test_tables_figures_and_files_are_of_a_part_each(tmp_path):
    cells = stats.summarise(rows())
    pictures = []
    for group in dict.fromkeys(one.group for one in cells):
        table = tables.cells(cells, group)
        assert len(table.rows) == 2
        assert (f"{group.part} alone" in table.caption) == bool(group.part)
        pictures += curves.comparison(cells, group, ["swe", "magnitude"])
    assert len({one.name for one in pictures}) == len(pictures) == 9
    page, *files = report.build(write_rows(tmp_path, [vars(one) for one in rows()]))
    text = html.unescape(page.read_text())
    for part in (DECODER, VISION):
        assert f"Equal sparsity per tensor, {part} alone" in text
    assert "loss_tensor_vision_finetuned.png" in {file.name for file in files}
    assert text.count(sections.QUESTIONS["tensor"]) == 3
