import pathlib
import re
import sys

import keras
import numpy as np
import pytest

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "training.md").read_text()


def run_example(page, monkeypatch, directory):
    """Runs the one program of a page; its names."""
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", ["example"])
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(example, "page.md", "exec"), names)
    return names


def test_the_example_of_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    names = run_example(README, monkeypatch, tmp_path)
    table = klb.bit_table(names["small"])
    assert str(table) in capsys.readouterr().out
    assert 2 < table.mean_bits <= 2.5
    assert len({row.bits for row in table.rows}) > 1
    x, y = names["images"][1437:], names["labels"][1437:]
    accuracies = [
        names[name].evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
        for name in ("model", "small")
    ]
    assert accuracies[1] > accuracies[0] - 0.03 > 0.82
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * table.packed_bytes
    assert (tmp_path / "model.tflite").exists()


def test_the_example_of_the_tutorial_runs_as_written_and_bits_fall(tmp_path, monkeypatch, capsys):
    names = run_example(TUTORIAL, monkeypatch, tmp_path)
    table = klb.bit_table(names["model"])
    assert str(table) in capsys.readouterr().out
    assert 1.9 < table.mean_bits <= 2
    x, y = names["x_val"], names["y_val"]
    accuracies = [
        names[name].evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
        for name in ("keras_model", "model")
    ]
    assert accuracies[1] > accuracies[0] - 0.02 > 0.92
    loaded = keras.models.load_model("model.keras")
    predicted = names["model"].predict(x[:8], verbose=0)
    np.testing.assert_array_equal(loaded.predict(x[:8], verbose=0), predicted)
    np.testing.assert_allclose(
        names["plain"].predict(x[:8], verbose=0), predicted, rtol=1e-4, atol=1e-4
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.1 * table.packed_bytes
    assert list((tmp_path / "logs").rglob("events*"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pictures_of_a_page_are_there(page):
    for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
        assert (page.parent / path).exists(), path
