"""The notebooks run, what they print is so, and what is committed was printed by them."""

import ast
from pathlib import Path

import nbformat
import numpy as np
import pretrained_tiny
import pytest
from nbclient import NotebookClient

from swe_prune import interop, tree

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
ROWS = ("swe", "magnitude", "random")
PRUNED = 3789  # 80 % of the 10 x 64 + 64 x 64 weights of the two hidden kernels, 3788.8, rounded
MOST_LINES = {"quickstart": 25, "prune_llm": 35, "smaller": 65}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    """Returns (the install cell, the others)."""
    first, *others = (cell for cell in notebook.cells if cell.cell_type == "code")
    return first, others


def printed(cells):
    return "".join(output.text for cell in cells for output in cell.outputs)


def executed(notebook, folder):
    for cell in code_cells(notebook)[1]:
        cell.outputs = []  # lest what was committed be taken for what was computed
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(folder))  # raises where a cell does
    install, others = code_cells(notebook)
    assert not install.outputs  # nothing was installed
    return others


def quickstart_rows(cells):
    """Returns per criterion (count removed, norm left, dense, pruned, fine-tuned loss)."""
    split = [line.split() for line in printed(cells).splitlines()]
    return {name: tuple(map(float, numbers)) for name, *numbers in split}


def check_quickstart(rows):
    assert tuple(rows) == ROWS
    for name, (count, left, dense, pruned, tuned) in rows.items():
        assert count == PRUNED, name
        assert left == 0.0, name
        assert dense < tuned < pruned, name
    assert max(rows["swe"][-1], rows["magnitude"][-1]) < rows["random"][-1]


def llm_rows(cells):
    """Returns the dense perplexity, and per method (sparsity, perplexity)."""
    first, *rows, last = (line.split(maxsplit=3) for line in printed(cells).splitlines())
    assert first[0] == "dense"
    assert last == ["True"]  # what was exported and read again is worth the same
    return float(first[1]), {name: (float(share), float(found)) for name, share, found, _ in rows}


def test_the_quickstart_runs_and_what_it_says_of_itself_is_true(tmp_path):
    check_quickstart(quickstart_rows(executed(read("quickstart"), tmp_path)))


@pytest.mark.slow
def test_a_language_model_is_pruned_and_goes_out_with_its_zeros(tmp_path):
    place = pretrained_tiny.make(tmp_path)
    notebook = read("prune_llm")
    (chosen,) = (cell for cell in notebook.cells if cell.source.startswith("MODEL ="))
    chosen.source = (  # what a user would change, too: another model, other texts
        f"MODEL = {str(place.model)!r}\n"
        f"CALIBRATION, HELD_OUT = {str(place.train)!r}, {str(place.held_out)!r}"
    )
    dense, rows = llm_rows(executed(notebook, tmp_path))
    assert tuple(rows) == ("magnitude", "wanda", "sparsegpt")
    for share, found in rows.values():
        assert share == 0.5
        assert found > dense
    kernels = [
        leaf
        for name, leaf in tree.named_leaves(interop.load(tmp_path / "pruned").params)
        if name.startswith("block_") and leaf.ndim == 2
    ]
    assert len(kernels) == 14
    for kernel in kernels:
        assert np.mean(np.asarray(kernel) == 0) == 0.5


def smaller_rows(cells):
    """Returns the perplexity of each model, and the other lines by their first word."""
    split = [line.split() for line in printed(cells).splitlines()]
    rows = {name: tuple(map(float, numbers)) for name, *numbers in split}
    others = {name: rows.pop(name) for name in ("parameters", "prefill", "decode")}
    return {name: found for name, (found,) in rows.items()}, others


def check_smaller(rows, others):
    assert tuple(rows) == ("dense", "cut", "restored", "recovered", "scratch")
    assert rows["cut"] > max(rows["dense"], rows["restored"])
    dense, cut = others["parameters"]
    assert cut < 0.65 * dense
    for part in ("prefill", "decode"):
        assert 0 < others[part][0] <= others[part][1] <= others[part][2]


@pytest.mark.slow
def test_a_small_model_is_cut_restored_recovered_and_timed(tmp_path):
    text = (NOTEBOOKS.parent / "LICENSE").read_text()
    for name, part in (("train", text[:8000]), ("held_out", text[8000:])):
        (tmp_path / name).write_text(part)
    notebook = read("smaller")
    (chosen,) = (cell for cell in notebook.cells if cell.source.startswith("TEXTS ="))
    chosen.source = (
        f"TEXTS = {str(tmp_path / 'train')!r}, {str(tmp_path / 'held_out')!r}\n"
        "STEPS, RECOVERY = 60, 5"
    )
    check_smaller(*smaller_rows(executed(notebook, tmp_path)))


def test_the_committed_outputs_come_from_a_run_of_all_cells_in_order():
    for name in NAMES:
        install, others = code_cells(read(name))
        counts = [cell.execution_count for cell in (install, *others)]
        assert counts == list(range(1, len(others) + 2)), name
    check_quickstart(quickstart_rows(code_cells(read("quickstart"))[1]))
    check_smaller(*smaller_rows(code_cells(read("smaller"))[1]))
    dense, rows = llm_rows(code_cells(read("prune_llm"))[1])
    values = [dense, *(rows[name][1] for name in ("sparsegpt", "wanda", "magnitude"))]
    assert values == sorted(values)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    cells = code_cells(read(name))[1]
    lines = [line.strip() for cell in cells for line in cell.source.splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) <= MOST_LINES[name]
    assert not any(";" in line for line in code)


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_calls_and_no_logic(name):
    for cell in code_cells(read(name))[1]:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.If | ast.While | ast.Try | ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 6, node.name


@pytest.mark.parametrize("name", NAMES)
def test_it_installs_only_where_the_package_is_missing(name):
    install, others = code_cells(read(name))
    guard, *pips = [line for line in install.source.splitlines() if line.strip()][1:]
    assert guard == 'if importlib.util.find_spec("swe_prune") is None:'
    assert all(pip.startswith("    %pip install") for pip in pips)
    assert pips
    assert "%" not in "".join(cell.source for cell in others)
