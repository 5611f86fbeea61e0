"""`show`: the bit-widths in a file."""

import pathlib
import subprocess
import sys

import keras
import pytest

import keras_learnbits as klb
from keras_learnbits.command_line.main import main

ROOT = pathlib.Path(__file__).parents[2]


def test_a_keras_file_shows_the_table_of_its_model(written, capsys):
    main(["show", str(written / "model.keras")])
    table = klb.bit_table(keras.models.load_model(written / "model.keras"))
    assert capsys.readouterr().out == f"{table}\n"


def test_a_packed_file_is_shown_without_tensorflow(written):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['keras_learnbits', 'show', {str(written / 'model.safetensors')!r}]\n"
        "runpy.run_module('keras_learnbits', run_name='__main__')\n"
        "print(sorted({'tensorflow', 'keras'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "hidden/kernel" in printed
    assert printed.splitlines()[-1] == "[]"


def test_the_module_runs_as_a_program(written):
    command = [sys.executable, "-m", "keras_learnbits", "show", written / "model.safetensors"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    size = (written / "model.safetensors").stat().st_size
    assert f"{size:,} bytes in the file" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["a.keras", "a.safetensors"])
def test_files_that_are_missing_or_something_else_are_named_in_one_line(tmp_path, refusal, name):
    assert name in refusal("show", tmp_path / name)
    (tmp_path / name).write_text("something else")
    assert name in refusal("show", tmp_path / name)


def test_a_float_model_has_nothing_to_show(saved, refusal):
    line = refusal("show", saved.model)
    assert "FILE must have a model with learned-bit layers" in line
    assert f"Received: {saved.model}, a float model" in line
    assert "bit_table" not in line
