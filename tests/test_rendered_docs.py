"""Tables and figures of the documentation, and the result files that they are rendered from."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


def load(path):
    return json.loads((RESULTS / path).read_text())


def render(root, *arguments):
    command = [sys.executable, root / "experiments" / "render_docs.py", *arguments]
    # The scripts of a copy are not to be found in the checkout that tests run in.
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages, of their result files and of the program that renders them."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for folder in ("docs", "experiments"):
        ignored = shutil.ignore_patterns("images", "__pycache__", "*.ipynb")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    return tmp_path


def test_tables_and_figures_of_all_pages_are_those_of_their_files():
    process = render(ROOT, "--check")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("file", "old", "new", "page"),
    [
        ("studies/latency.json", '"bytes": 4', '"bytes": 5', "docs/exports.md"),
        ("cifar10/pareto.json", '"packed_bytes": 190', '"packed_bytes": 180', "docs/results.md"),
        ("studies/fuzz_packed.json", '"refused": 84551', '"refused": 84550', "docs/exports.md"),
    ],
)
def test_a_page_that_differs_from_a_changed_result_file_is_named_and_can_be_rendered(
    copy, file, old, new, page
):
    path = copy / "experiments" / "results" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    process = render(copy, "--check")
    assert process.returncode != 0
    assert page in process.stderr
    assert render(copy).returncode == 0
    assert render(copy, "--check").returncode == 0


def test_a_page_may_say_anything_around_its_figures(copy):
    page = copy / "docs" / "results.md"
    page.write_text(page.read_text().replace("The", "A", 1))
    assert render(copy, "--check").returncode == 0


def test_an_unknown_figure_is_refused_with_the_names_there_are(copy):
    page = copy / "docs" / "results.md"
    page.write_text(page.read_text() + "\nIt is <!-- = no such figure -->1<!-- / -->.\n")
    process = render(copy, "--check")
    assert process.returncode != 0
    assert "download float" in process.stderr
    assert "Received: 'no such figure'" in process.stderr


def test_a_line_that_markdown_would_take_for_html_is_refused(copy):
    page = copy / "docs" / "results.md"
    page.write_text(page.read_text() + "\n<!-- = mnist error -->1<!-- / --> of them\n")
    process = render(copy, "--check")
    assert process.returncode != 0
    assert "No line may begin with the mark of a figure" in process.stderr


PARETO = [load(path.relative_to(RESULTS)) for path in RESULTS.glob("*/pareto.json")]


def test_no_quantized_model_of_a_study_is_above_its_budget():
    learned = [run for study in PARETO for run in study["runs"] if run["kind"] == "learned"]
    assert learned
    assert all(run["mean_bits"] <= float(run["size"]) for run in learned)


def test_runs_of_a_point_have_seeds_from_zero_on():
    for study in PARETO:
        for point in study["points"]:
            kind = point["kind"], point["size"]
            seeds = [run["seed"] for run in study["runs"] if (run["kind"], run["size"]) == kind]
            assert sorted(seeds) == list(range(point["seeds"]))


def test_gains_over_uniform_widths_are_over_the_line_between_uniform_nets():
    study = load("cifar10-quarter/pareto.json")
    groups = {}
    for run in study["runs"]:
        groups.setdefault((run["kind"], run["size"]), []).append(run)

    def mean(runs, key):
        return np.mean([run[key] for run in runs])

    line = [groups["uniform", bits] for bits in "123"]
    sizes = [mean(runs, "packed_bytes") for runs in line]
    accuracies = [mean(runs, "test_accuracy") for runs in line]
    for point in study["points"]:
        if point["above_uniform"] is not None:
            runs = groups[point["kind"], point["size"]]
            uniform = np.interp(mean(runs, "packed_bytes"), sizes, accuracies)
            expected = mean(runs, "test_accuracy") - uniform
            assert point["above_uniform"] == pytest.approx(expected, abs=1e-6)


def test_the_picture_of_layers_has_the_bits_of_the_narrow_net():
    runs = load("cifar10-quarter/pareto.json")["runs"]
    for budget, bits in load("cifar10-quarter/layers.json")["bits"].items():
        chosen = [run for run in runs if (run["kind"], run["size"]) == ("learned", budget)]
        assert bits == {name: np.mean([run["bits"][name] for run in chosen]) for name in bits}


@pytest.mark.parametrize("program", ["mnist", "cifar10"])
def test_exported_files_predict_what_the_model_does_in_the_size_that_was_promised(program):
    study = load(f"studies/exports-{program}.json")
    for name, accuracy in study["test_accuracy"].items():
        tolerance = 0.00101 if "int8" in name else 0.0002
        assert abs(accuracy - study["test_accuracy"]["model"]) <= tolerance
    assert study["bytes"]["packed"] <= 1.02 * study["bytes_of_bit_table"]
    assert study["mean_bits_in_qonnx"] == pytest.approx(study["mean_bits"])


def test_no_damaged_file_was_read_unnoticed():
    study = load("studies/fuzz_packed.json")
    assert (study["crashes"], study["hangs"], study["read_otherwise_unnoticed"]) == (0, 0, 0)


@pytest.mark.parametrize("name", ["interval", "sensitivity"])
def test_settings_were_chosen_on_held_out_training_examples(name):
    assert load(f"studies/{name}.json")["evaluated_on"] == "held-out training examples"
