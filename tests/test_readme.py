import pathlib
import re
import sys

import keras
import numpy as np

import keras_learnbits as klb

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


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
        assert (pathlib.Path(__file__).parent.parent / path).exists(), path
