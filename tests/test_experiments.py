import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
RESULT_KEYS = {
    "command", "versions", "seed", "epochs", "test_accuracy", "test_loss", "float_test_accuracy",
    "mean_bits", "bits", "packed_bytes", "float_bytes", "seconds_per_epoch",
}  # fmt: skip


def run(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_the_digits_program_leaves_its_files(tmp_path):
    process = run("digits.py", "--epochs=3", f"--output_dir={tmp_path}")
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.keys() >= RESULT_KEYS
    assert result["epochs"] == 3
    assert set(result["bits"]) == {"conv1", "conv2", "dense1", "dense2"}
    assert 1 <= result["mean_bits"] <= 8
    assert result["packed_bytes"] < result["float_bytes"] / 4
    assert 0.5 < result["float_test_accuracy"] <= 1
    assert f"{result['packed_bytes']:,} bytes packed" in process.stdout
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert type(model).__name__ == "LearnedBitFunctional"
    assert list((tmp_path / "logs").rglob("events*"))
    arrays = klb.load_packed(tmp_path / "model.safetensors", into=model)
    assert len(arrays) == len(result["bits"]) + 4 == 8  # with the biases


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [(["--fixed_bits=2", "--nobaseline"], {"dense": 2}), (["--float"], {})],
    ids=str,
)
def test_baselines_come_from_the_same_program(arguments, bits, tmp_path):
    arguments = [*arguments, "--model=logistic", "--epochs=1", f"--output_dir={tmp_path}"]
    process = run("digits.py", *arguments)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bits"] == bits
    assert result["command"].startswith("python experiments/digits.py ")


def test_a_float_net_goes_on_from_a_float_net(tmp_path):
    for name, more in (
        ("first", ()),
        ("second", (f"--init_from={tmp_path / 'first/model.keras'}",)),
    ):
        arguments = ["--float", "--model=logistic", "--epochs=1", f"--output_dir={tmp_path / name}"]
        process = run("digits.py", *arguments, *more)
        assert process.returncode == 0, process.stderr
    first, second = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")
    )
    assert second["test_loss"] < first["test_loss"]
    assert second["bits"] == {}


@pytest.mark.parametrize("program", ["mnist.py", "cifar10.py"])
def test_without_data_a_program_says_in_one_line_what_to_do(program, tmp_path):
    process = run(program, f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'run'}")
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    for part in ("--data_dir", "TFDS_DATA_DIR", "digits.py"):
        assert part in last
    assert "Traceback" not in process.stderr


def test_an_unknown_net_is_refused(tmp_path):
    process = run("digits.py", "--model=typo", f"--output_dir={tmp_path}")
    assert process.returncode == 1
    assert "--model must be one of cnn, logistic. Received: typo" in process.stderr


def test_two_workers_learn_the_bits_of_one_process_with_the_global_batch():
    """On the loopback address, by the loop that stands in for `fit`."""
    ends = []
    for workers in (1, 2):
        process = run("multi_worker.py", "--model=logistic", "--epochs=3", f"--workers={workers}")
        assert process.returncode == 0, process.stderr
        lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == workers
        ends += [json.loads(line) for line in lines]
    one, *two = ends
    assert {end["worker"] for end in two} == {0, 1}
    assert one["bits"]["dense"] < 8
    for end in two:
        assert end["bits"] == one["bits"]
        assert end["losses"] == pytest.approx(one["losses"], rel=1e-4)
