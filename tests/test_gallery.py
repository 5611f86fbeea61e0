"""The gallery of experiments/: its data and scores, and the program on a small scale."""

import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def tasks(monkeypatch):
    """The module `gallery_tasks`, with random images in place of those to download."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    module = importlib.import_module("gallery_tasks")

    def load(name, data_dir):
        rng = np.random.default_rng(0)
        shape = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
        return [
            (rng.integers(0, 256, (64, *shape), "uint8"), rng.integers(0, 10, 64))
            for _ in ("train", "test")
        ]

    monkeypatch.setattr(module, "load_tfds", load)
    return module


@pytest.fixture
def run(tasks, monkeypatch):
    """A function that runs the program with arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gallery.py", *map(str, arguments)])
        gallery = importlib.import_module("gallery")
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            app.run(gallery.main)
        assert not end.value.code

    return run


def test_masks_overlap_by_the_intersection_over_the_union_of_all_their_pixels(tasks):
    masks = np.array([[1, 1, 0, 0]])
    found = tasks.segmentation_score(np.array([[0.9, 0.1, 0.8, 0.2]]), masks)
    assert found == {"IoU": pytest.approx(1 / 3), "pixel accuracy": 0.5}


def test_the_words_without_their_program_say_how_to_get_it(tasks, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install espeak-ng"):
        tasks.spoken_words(10)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["segmentation", "transformer"])
def test_the_gallery_does_what_is_missing_and_no_more(name, run, tasks, tmp_path):
    arguments = [f"--tasks={name}", f"--output_dir={tmp_path}", "--targets=3", "--epochs=1"]
    arguments += ["--train_examples=64", "--sample=32", "--quantize_steps=2", "--calls=2"]

    def results():
        return json.loads((tmp_path / "gallery.json").read_text())["tasks"][name]

    run(*arguments)
    first = results()
    found = first["quantized"]["3"]["0"]
    assert found["mean_bits"] <= 3
    assert found["packed_bytes"] < first["float"]["bytes"] / 4
    assert found["scores"].keys() == first["float"]["scores"].keys()
    assert len(found["bits"]) == len(first["layers"]) == len(first["weights"])
    assert sum(first["weights"]) == first["conversion"]["learned_weights"]
    assert first["latency"]["ratio"]["float"] == 1
    run(*arguments)
    assert results() == first
    run(*arguments, "--latency_only", "--note=quiet")
    again = results()
    assert again.pop("latency")["note"] == "quiet"
    first.pop("latency")
    assert again == first


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="it needs the command espeak-ng")
def test_words_are_spoken_by_other_voices_in_training_and_test(tasks, monkeypatch):
    import speech

    voices, spoken = [], speech.spoken
    monkeypatch.setattr(speech, "TEST_EXAMPLES", 30)
    monkeypatch.setattr(
        speech,
        "spoken",
        lambda word, voice, *rest: voices.append(voice) or spoken(word, voice, *rest),
    )
    (x, y), (x_test, _) = speech.spoken_words(40)
    assert x.shape == (40, 40, 51, 1)
    assert x_test.shape == (30, 40, 51, 1)
    assert np.isfinite(x).all()
    assert set(np.bincount(y)) == {4}
    train, test = ({voice.split("+")[1] for voice in part} for part in (voices[:40], voices[40:]))
    assert not train & test
