"""Executes the notebooks of the docs, and stores them with their outputs.

python experiments/notebooks.py [--names=training]

Paths of this machine in an output, and messages on stderr, are errors.
"""

import hashlib
import pathlib
import re
import tempfile
import time

import nbformat
from absl import app, flags
from nbclient import NotebookClient

NAMES = flags.DEFINE_list("names", ["quantize", "training", "deploy"], "Notebooks to execute.")

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "notebooks"
# C++ writes such lines to stderr, TensorFlow when it is imported, whatever the level of its logs.
NOTES = re.compile(r"(INFO: |I\d{4} |WARNING: All log messages before absl::InitializeLog).*")
PATHS = re.compile(r"/(home|root|tmp|usr|content|work|var|Users)/|site-packages")


def source_hash(notebook):
    """Hash of the code cells, stored at execution: a notebook that was edited later is stale."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def execute(notebook, folder):
    """Runs all cells of a notebook in a folder; its outputs and its metadata are replaced."""
    NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if not _is_noted(each)]
    notebook.metadata = {
        "executed": source_hash(notebook),
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _is_noted(output):
    """Whether an output has lines of no concern only."""
    return output.get("name") == "stderr" and all(map(NOTES.match, output.text.splitlines()))


def faults(notebook):
    """List of the outputs that are not for others to see."""
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    texts = [each.get("text") or each.get("data", {}).get("text/plain", "") for each in outputs]
    stderr = [each.text for each in outputs if each.get("name") == "stderr"]
    return stderr + [text for text in texts if PATHS.search(text)]


def main(_):
    for name in NAMES.value:
        path, begin = FOLDER / f"{name}.ipynb", time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder)
        found = faults(notebook)
        if found:
            raise ValueError(f"Outputs must have no paths and no warnings. Received: {found}")
        nbformat.write(notebook, path)
        print(f"{name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    app.run(main)
