"""The page: whole, partial and small; one file, no network; as headless Chromium shows it."""

import html
import re
import shutil
import subprocess
import sys
import warnings

import pytest
from report_synthetic import PARAMS, make, row, write_rows

from swe_prune import report
from swe_prune.errors import InputError
from swe_prune.report import comparison, read, stats

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    workdir = make(tmp_path_factory.mktemp("built"), seeds=(0, 1), std_seeds=(0, 1))
    return workdir, report.build(workdir)


def text_of(path):
    return html.unescape(path.read_text(encoding="utf-8"))


def headline_of(workdir):
    # The page is set with the printer's apostrophe.
    found = comparison.headline(stats.summarise(read.load(workdir).rows))
    return found.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")


def test_every_file_is_returned_and_nothing_else_is_left(built):
    workdir, written = built
    assert written[0] == workdir / "report" / "report.html"
    assert written[-1] == workdir / "report" / "tables.md"
    assert set(written) == set((workdir / "report").iterdir())
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[1:-1])
    names = {path.stem for path in written}
    assert {"loss_rate_pruned", "loss_tensor_finetuned", "loss_global_against_control"} <= names
    assert {"tensors_rate", "tensors_global", "histogram_swe", "training"} <= names
    assert sum(name.startswith("trajectories_") for name in names) == 3


def test_the_page_says_what_was_found(built):
    workdir, (page, *_) = built
    text = text_of(page)
    assert headline_of(workdir) in text
    assert "60\N{NO-BREAK SPACE}% sparsity magnitude (" in text
    assert f"of {PARAMS:,} parameters" in text
    assert "9f2c41d07be6" in text


def test_the_page_is_one_file_and_asks_the_network_for_nothing(built):
    text = built[1][0].read_text()
    assert not re.findall(r"https?://|<script|@import|<link|url\(", text)
    sources = re.findall(r'src="([^"]{0,30})', text)
    assert len(sources) == len(built[1]) - 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_every_figure_has_its_own_words_and_every_table_its_caption(built):
    text = text_of(built[1][0])
    alts = re.findall(r'alt="([^"]+)"', text)
    assert len(alts) == len(set(alts)) == len(built[1]) - 2
    assert all(len(alt) > 40 for alt in alts)
    tables = re.findall(r"<table>.*?</table>", text, re.DOTALL)
    assert len(tables) == 7
    for table in tables:
        assert "<caption>" in table
        assert 'scope="col"' in table
        assert re.search(r'scope="row(group)?"', table)
        width = table.count('scope="col"')
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)[1:]
        spanned = 0
        for line in rows:
            head = re.search(r'rowspan="(\d+)"', line)
            assert bool(head) == (spanned == 0)
            spanned = (int(head[1]) if head else spanned) - 1
            assert line.count("<td") == width - 1


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(tmp_path):
    workdir = make(tmp_path, seeds=(0,), std_seeds=(), criteria=("swe",), details=False)
    first = {path: path.read_bytes() for path in report.build(workdir)}
    assert {path: path.read_bytes() for path in report.build(workdir)} == first


@pytest.mark.slow
def test_nothing_finetuned_yet(tmp_path):
    workdir = make(
        tmp_path,
        seeds=(0,),
        std_seeds=(0,),
        std_criteria=("swe",),
        criteria=("swe",),
        finetuned=False,
    )
    written = report.build(workdir)
    text = text_of(written[0])
    assert re.search(r"Pruned cells fine-tuned: 0 of \d+", text)
    assert "Not finished yet" in text
    assert not any("finetuned" in path.name or "against" in path.name for path in written)


def test_a_single_row_without_anything_else(tmp_path):
    written = report.build(write_rows(tmp_path, [row()]))
    text = text_of(written[0])
    assert "unknown without a config.json" in text
    assert "no spread can be given" in text
    assert "What happened to the weights" not in text


@pytest.mark.parametrize("lost", ["nan", "inf"])
def test_diverged_cells_are_said_not_drawn(tmp_path, lost):
    rows = [row(rate=1.4), row(rate=3, sparsity_prunable=0.9, pruned_loss=lost,
                                    finetuned_loss=lost)]  # fmt: skip
    text = text_of(report.build(write_rows(tmp_path, rows))[0])
    visible = re.sub(r"base64,[^\"]+|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "diverged" in visible
    assert not re.search(r"\b(nan|inf)\b", visible, re.IGNORECASE)


def test_all_cells_diverged(tmp_path):
    written = report.build(write_rows(tmp_path, [row(pruned_loss="nan", finetuned_loss="nan")]))
    assert "diverged" in text_of(written[0])


def test_names_are_escaped(tmp_path):
    written = report.build(write_rows(tmp_path, [row(criterion="<b>swe</b>")]))
    assert "<b>swe" not in written[0].read_text()


@pytest.mark.slow
def test_long_names_leave_every_figure_its_room(tmp_path):
    names = [f"{part} of ^decoder/block_[0-9]+/.*kernel$,^vision/block_[0-9]+/" for part in "abcde"]
    workdir = make(tmp_path, seeds=(0,), std_seeds=(0,), criteria=names[:1], std_criteria=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report.build(workdir)


def test_nothing_to_report_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="nothing was measured"):
        report.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_with_its_fix(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"{name}.*pip install 'swe-prune\[report\]'"):
        report.build(tmp_path)


def test_matplotlibs_settings_are_left_as_they_were(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.build(write_rows(tmp_path, [row()]))
    assert dict(matplotlib.rcParams) == before


def chromium(page, profile, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync",
               f"--user-data-dir={profile}", *arguments, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout


@needs_chromium
def test_a_browser_shows_the_finding_and_every_figure(built, tmp_path):
    workdir, (page, *written) = built
    dom = html.unescape(chromium(page, tmp_path, "--dump-dom").decode())
    shown = re.search(r'id="finding">([^<]*)<', dom)
    assert shown is not None
    assert shown[1] == headline_of(workdir)
    assert dom.count("<img") == sum(path.suffix == ".png" for path in written)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_paints_the_page_within_its_width(built, tmp_path, width):
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "shot.png"
    size = f"--window-size={width},2600"
    chromium(built[1][0], tmp_path / "profile", f"--screenshot={shot}", size)
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[1] == width
    coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 0.3  # curves, not text
    assert 0.001 < coloured.mean() < 0.5
    margin = pixels[:, -10:]  # what overflows the width would stand here
    assert numpy.all(margin > 0.99)
