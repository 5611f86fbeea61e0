"""The notebooks of the docs run from top to bottom, and their outputs are those of their cells."""

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def notebooks(monkeypatch):
    """The program that executes them."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("notebooks")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell has put out: texts and pictures, by their types."""
    return [each.get("name") or sorted(each.get("data", {})) for each in cell.outputs]


def test_stored_outputs_are_those_of_the_cells_above_them(path, notebooks):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata["executed"] == notebooks.source_hash(notebook)
    assert not notebooks.faults(notebook)
    assert path.stat().st_size < 300_000


def test_each_picture_has_a_description(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [each for cell in code_cells(notebook) for each in cell.outputs]
    pictures = [each for each in outputs if "image/png" in each.get("data", {})]
    assert len(pictures) > 2
    assert all(len(each.metadata["image/png"]["alt"]) > 20 for each in pictures)


def test_names_of_files_that_notebooks_link_to_exist(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#]+)", cell.source):
                assert (path.parent / link).is_file(), link


@pytest.mark.thorough
def test_a_notebook_runs_from_top_to_bottom(path, notebooks, tmp_path):
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    notebooks.execute(notebook, tmp_path)  # raises at the first error, as of its last cell's checks
    assert not notebooks.faults(notebook)
    assert list(map(kinds, code_cells(notebook))) == list(map(kinds, code_cells(stored)))
    texts = [each.get("text", "") for cell in code_cells(notebook) for each in cell.outputs]
    assert texts[-1] == "All of these hold.\n"
    assert not any("Skipped" in text for text in texts)  # the circuit, without hls4ml or g++
