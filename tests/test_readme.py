import json
import pathlib
import re
import sys

import keras
import numpy as np
import pytest

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def test_the_example_runs_as_written_and_bits_fall(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    table = klb.bit_table(names["model"])
    assert str(table) in capsys.readouterr().out
    assert table.mean_bits < 4
    assert names["model"].evaluate(names["images"], names["labels"], verbose=0)[1] > 0.95
    loaded = keras.models.load_model("model.keras")
    np.testing.assert_array_equal(
        loaded.predict(names["images"][:8], verbose=0),
        names["model"].predict(names["images"][:8], verbose=0),
    )
    assert list((tmp_path / "logs").rglob("events*"))


def test_the_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_figure_of_the_results_table_is_that_of_its_file(path):
    result = json.loads(path.read_text())
    (row,) = [line for line in README.splitlines() if f"(experiments/results/{path.name})" in line]
    assert f"`{result['command']}`" in row
    assert f"{result['test_accuracy']:.2%}" in row
    if result["mean_bits"] is not None:
        assert f"| {result['mean_bits']:.2f} |" in row
        assert f"{result['packed_bytes']:,}" in row
    if result["float_test_accuracy"] is not None:
        assert f"{result['float_test_accuracy']:.2%}" in row
