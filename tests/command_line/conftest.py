"""A small classifier in a file, and the folder of one run of the command."""

import types

import keras
import numpy as np
import pytest

from keras_learnbits.command_line.main import main


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Paths of a model of 8 inputs and 4 classes, of 64 examples and of their labels."""
    folder = tmp_path_factory.mktemp("saved")
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(48, "relu", name="hidden"),
            keras.layers.Dense(4, name="head"),
        ],
        name="classifier",
    )
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    paths = types.SimpleNamespace(
        folder=folder,
        model=str(folder / "classifier.keras"),
        data=str(folder / "x.npy"),
        labels=str(folder / "y.npy"),
    )
    model.save(paths.model)
    np.save(paths.data, x)
    np.save(paths.labels, model.predict(x, verbose=0).argmax(axis=-1))
    return paths


@pytest.fixture(scope="session")
def written(saved):
    """Folder that `quantize` wrote at 3 mean bits."""
    folder = saved.folder / "small"
    main(
        [
            "quantize",
            saved.model,
            f"--data={saved.data}",
            f"--labels={saved.labels}",
            "--target_bits=3",
            "--steps=5",
            f"--output_dir={folder}",
            "--quiet",
        ]
    )
    return folder


@pytest.fixture
def refusal(capsys):
    """A function that runs the command, and returns the one line that it exits with."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line

    return run
