import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
ROWS = ("swe", "magnitude", "random")
PRUNED = 3789  # 80 % of the 10 x 64 + 64 x 64 weights of the two hidden kernels, 3788.8, rounded


def code_cells(notebook):
    """Returns (the install cell, the others)."""
    first, *others = (cell for cell in notebook.cells if cell.cell_type == "code")
    return first, others


def printed(cells):
    return "".join(output.text for cell in cells for output in cell.outputs)


def rows_of(cells):
    """Returns per criterion (count removed, norm left, dense, pruned, fine-tuned loss)."""
    split = [line.split() for line in printed(cells).splitlines()]
    return {name: tuple(map(float, numbers)) for name, *numbers in split}


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook)[1]:
        cell.outputs = []  # lest what was committed be taken for what was computed
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path_factory.mktemp("notebook")))  # raises where a cell does
    return notebook


def check_rows(rows):
    assert tuple(rows) == ROWS
    for name, (count, left, dense, pruned, tuned) in rows.items():
        assert count == PRUNED, name
        assert left == 0.0, name
        assert dense < tuned < pruned, name
    assert max(rows["swe"][-1], rows["magnitude"][-1]) < rows["random"][-1]


def test_it_runs_and_what_it_says_of_itself_is_true(executed):
    install, others = code_cells(executed)
    assert not install.outputs  # nothing was installed
    check_rows(rows_of(others))


def test_the_committed_outputs_come_from_a_run_of_all_cells_in_order(committed):
    install, others = code_cells(committed)
    assert [cell.execution_count for cell in (install, *others)] == list(range(1, len(others) + 2))
    check_rows(rows_of(others))


def test_the_whole_workflow_takes_at_most_25_lines(committed):
    lines = [line.strip() for cell in code_cells(committed)[1] for line in cell.source.splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) <= 25
    assert not any(";" in line for line in code)


def test_it_holds_calls_and_no_logic(committed):
    for cell in code_cells(committed)[1]:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.If | ast.While | ast.Try | ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 6, node.name


def test_it_installs_only_where_the_package_is_missing(committed):
    install, others = code_cells(committed)
    guard, pip = [line for line in install.source.splitlines() if line.strip()][1:]
    assert guard == 'if importlib.util.find_spec("swe_prune") is None:'
    assert pip.startswith("    %pip install")
    assert "%" not in "".join(cell.source for cell in others)
