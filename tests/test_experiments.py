"""The programs of `experiments/`, each in a separate process where that matters."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import app
from absl.testing import flagsaver

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
RESULT_KEYS = {
    "command", "versions", "seed", "epochs", "test_accuracy", "test_loss", "float_test_accuracy",
    "mean_bits", "bits", "packed_bytes", "float_bytes", "seconds_per_epoch",
}  # fmt: skip


def in_a_process(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "experiments" / program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Lets programs import their neighbours, as if they had been started in their folder."""
    monkeypatch.syspath_prepend(ROOT / "experiments")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a program in this process, which saves the start of a new process.

    It returns what the process would exit with, None, a number or a message for stderr, and
    what was printed.
    """

    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        common, module = map(importlib.import_module, ("common", program))
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            common.run(module.PROBLEM) if hasattr(module, "PROBLEM") else app.run(module.main)
        return end.value.code, capsys.readouterr()

    return run


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.thorough
def test_training_holds_at_most_five_more_bytes_per_weight_than_plain_keras():
    def peak(kind):
        process = in_a_process(
            "scaling.py",
            f"--peak_of={kind}",
            "--weights=4e6",
            "--steps=3",
            TF_CPU_ALLOCATOR_USE_BFC="true",
        )
        assert process.returncode == 0, process.stderr
        return int(process.stdout.split()[-1])

    plain = peak("plain Keras")
    assert plain > 8 * 4e6  # weights and gradients are counted
    assert peak("learned bits") < plain + 5 * 4e6


def test_the_digits_program_writes_its_files(run, tmp_path):
    code, printed = run("digits", "--epochs=3", f"--output_dir={tmp_path}")
    assert code is None
    result = result_of(tmp_path)
    assert result.keys() >= RESULT_KEYS
    assert result["epochs"] == 3
    assert set(result["bits"]) == {"conv1", "conv2", "dense1", "dense2"}
    assert 1 <= result["mean_bits"] <= 8
    assert result["packed_bytes"] < result["float_bytes"] / 4
    assert 0.5 < result["float_test_accuracy"] <= 1
    assert f"{result['packed_bytes']:,} bytes packed" in printed.out
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert type(model).__name__ == "LearnedBitFunctional"
    assert list((tmp_path / "logs").rglob("events*"))
    arrays = klb.load_packed(tmp_path / "model.safetensors", into=model)
    assert len(arrays) == len(result["bits"]) + 4 == 8  # with the biases


@pytest.mark.thorough
def test_bits_may_be_fixed_and_those_of_first_and_last_layer_apart(run, tmp_path):
    arguments = ["--fixed_bits=1", "--end_bits=8", "--nobaseline", "--epochs=1"]
    code, _ = run("digits", *arguments, "--train_examples=64", f"--output_dir={tmp_path}")
    assert code is None
    result = result_of(tmp_path)
    assert result["bits"] == {"conv1": 8, "conv2": 1, "dense1": 1, "dense2": 8}
    assert result["command"].startswith("python experiments/digits.py --fixed_bits=1 ")


@pytest.mark.parametrize("flag", ["--fixed_bits=2", "--end_bits=8", "--target_bits=2"])
def test_a_float_net_has_no_bits_to_set(flag, run, tmp_path):
    code, printed = run("digits", "--float", flag, f"--output_dir={tmp_path}")
    assert code
    assert flag.split("=")[0] in printed.err + printed.out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--target_bits=2 --fixed_bits=2", "--fixed_bits"),
        ("--start_quantized --target_bits=2", "--init_from"),
        ("--start_quantized --init_from=m.keras --fixed_bits=2 --end_bits=8", "--end_bits"),
        ("--probed_bits=2 --bit_gradient=difference", "--bit_gradient=measured"),
        ("--interval=5 --bit_gradient=straight_through", "--bit_gradient=measured"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_once(flags, named, run, tmp_path):
    code, printed = run("digits", *flags.split(), f"--output_dir={tmp_path}")
    assert code == 1
    assert named in printed.err + printed.out
    assert not any(tmp_path.iterdir())


def test_a_reversal_counts_at_the_step_of_its_second_move():
    import curves

    falls, rises = np.linspace(8, 5, 31), np.linspace(5, 6, 11)
    turning = np.concatenate([falls, np.full(50, 5.0), rises, rises[::-1]])[:101]
    falling = np.linspace(8, 1, 101)
    logger = types.SimpleNamespace(
        steps=np.arange(101), bits=np.stack([turning, falling], axis=1), names=["a", "b"]
    )
    assert curves.direction_changes(logger, freeze_step=90) == {"a": 1, "b": 0}
    assert curves.direction_changes(logger, freeze_step=80) == {"a": 0, "b": 0}
    logger.steps = logger.steps + 200
    assert curves.direction_changes(logger, freeze_step=260) is None


@pytest.mark.thorough
def test_a_float_net_goes_on_from_a_float_net(run, tmp_path):
    arguments = ["--float", "--model=logistic", "--epochs=1"]
    for name, more in (
        ("first", ()),
        ("second", (f"--init_from={tmp_path / 'first/model.keras'}",)),
    ):
        code, _ = run("digits", *arguments, f"--output_dir={tmp_path / name}", *more)
        assert code is None
    first, second = (result_of(tmp_path / name) for name in ("first", "second"))
    assert second["test_loss"] < first["test_loss"]
    assert first["bits"] == second["bits"] == {}
    assert first["command"].startswith("python experiments/digits.py --float ")


def test_a_float_model_need_not_be_compiled_for_a_start():
    common = importlib.import_module("common")
    model = keras.Sequential([keras.Input((10,)), keras.layers.Softmax()])
    assert common._accuracy(model, (np.eye(10, dtype="float32"), np.arange(10))) == 1.0


@pytest.mark.thorough
def test_inputs_of_layers_are_quantized_and_outputs_learned_from_the_float_model(run, tmp_path):
    code, _ = run("digits", "--float", "--epochs=3", f"--output_dir={tmp_path / 'float'}")
    assert code is None
    arguments = [f"--init_from={tmp_path / 'float/model.keras'}", "--target_bits=3"]
    arguments += ["--start_measured", "--distill=squared_error", "--activation_bits=4"]
    code, _ = run("digits", "--epochs=2", *arguments, f"--output_dir={tmp_path}")
    assert code is None
    result = result_of(tmp_path)
    assert (result["activation_bits"], result["distill"]) == (4, "squared_error")
    assert result["mean_bits"] <= 3
    table = klb.bit_table(keras.models.load_model(tmp_path / "model.keras"))
    widths = {row.layer: row.bits for row in table.activations}
    inputs = ("conv2_input", "dense1_input", "dense2_input")
    assert widths == {"conv1_input": 8, **dict.fromkeys(inputs, 4)}


@pytest.mark.thorough
def test_a_training_goes_on_from_what_quantize_finds_and_keeps_its_widths(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr("keras_learnbits.quantization.quantize.STEPS", 20)
    code, _ = run("digits", "--float", "--epochs=3", f"--output_dir={tmp_path / 'float'}")
    assert code is None
    start = tmp_path / "float/model.keras"
    arguments = [f"--init_from={start}", "--target_bits=2", "--start_quantized"]
    arguments += ["--distill=squared_error", "--activation_bits=4", "--learning_rate=0"]
    code, _ = run("digits", "--epochs=1", *arguments, f"--output_dir={tmp_path}")
    assert code is None
    trained = keras.models.load_model(tmp_path / "model.keras")
    images = importlib.import_module("common")._examples(
        importlib.import_module("digits").load("")[0][0]
    )
    quantized = klb.quantize(keras.models.load_model(start), images, target_bits=2, verbose=0)
    for layer in quantized.layers:
        if hasattr(layer, "kernel"):
            np.testing.assert_allclose(trained.get_layer(layer.name).kernel, layer.kernel)
    assert result_of(tmp_path)["mean_bits"] == klb.bit_table(quantized).mean_bits

    others = [each for each in arguments if each != "--target_bits=2"]
    code, _ = run("digits", "--epochs=1", "--fixed_bits=3", *others, f"--output_dir={tmp_path}")
    assert code is None
    assert {*result_of(tmp_path)["bits"].values()} == {3}
    trained = keras.models.load_model(tmp_path / "model.keras")
    quantized = klb.quantize(
        keras.models.load_model(start), images, target_bits=3, min_bits=3, max_bits=3, verbose=0
    )
    np.testing.assert_allclose(
        trained.get_layer("conv2").kernel, quantized.get_layer("conv2").kernel
    )


@pytest.mark.thorough
def test_an_interrupted_run_goes_on_where_it_was(run, tmp_path):
    arguments = ["--model=logistic", "--float", "--resume", "--epochs=100"]
    arguments += [f"--output_dir={tmp_path}"]
    command = [sys.executable, "-u", ROOT / "experiments" / "digits.py", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith("Epoch 3/"):
                process.kill()
    assert not (tmp_path / "result.json").exists()
    code, printed = run("digits", *arguments)
    assert code is None
    epochs = [line for line in printed.out.splitlines() if line.startswith("Epoch ")]
    assert epochs[0] != "Epoch 1/100"
    assert epochs[-1] == "Epoch 100/100"
    assert result_of(tmp_path)["test_accuracy"] > 0.9


@pytest.mark.thorough
def test_the_pareto_study_does_what_is_missing_and_no_more(run, tmp_path):
    arguments = ["--program=digits", "--model=logistic", "--float_epochs=3", "--finetune_epochs=2"]
    arguments += [
        "--budgets=2",
        "--uniform=2",
        "--seeds=0",
        "--ways=float,uniform,learned",
        "--start_seed=3",
        f"--output_dir={tmp_path}",
    ]
    code, printed = run("pareto", *arguments)
    assert code is None
    assert (
        printed.out.count("digits.py") == 4
    )  # the float model, its further training, two of 2 bits
    study = json.loads((tmp_path / "pareto.json").read_text())
    assert [point["kind"] for point in study["points"]] == ["learned", "uniform", "float"]
    learned, uniform, _ = study["points"]
    assert learned["bytes"] <= uniform["bytes"]
    assert (tmp_path / "start-seed3" / "model.keras").exists()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    os.remove(tmp_path / "uniform2-seed0" / "result.json")
    code, printed = run("pareto", *arguments)
    assert code is None
    assert printed.out.count("digits.py") == 1
    assert json.loads((tmp_path / "pareto.json").read_text())["points"] == study["points"]
    start = f"--start_from={tmp_path / 'start-seed3'}"
    elsewhere = tmp_path / "elsewhere"
    repeated = elsewhere / "learned2-seed0" / "result.json"
    repeated.parent.mkdir(parents=True)
    repeated.write_text(json.dumps(result_of(tmp_path / "learned2-seed0") | {"test_accuracy": 0.5}))
    arguments[-1] = f"--output_dir={elsewhere}"
    code, printed = run("pareto", *arguments, start, f"--recorded={tmp_path / 'pareto.json'}")
    assert code is None
    assert "digits.py" not in printed.out
    learned, *others = json.loads((elsewhere / "pareto.json").read_text())["points"]
    assert learned["accuracy"] == 0.5
    assert [each["accuracy"] for each in others] == [
        each["accuracy"] for each in study["points"][1:]
    ]
    other = tmp_path / "other"
    arguments[-1] = f"--output_dir={other}"
    more = start, "--quantized=activation_bits=4"
    code, printed = run("pareto", *arguments, *more)
    assert code is None
    assert printed.out.count("digits.py") == printed.out.count(str(other / "start-seed3")) == 3
    assert result_of(other / "learned2-seed0")["activation_bits"] == 4
    assert result_of(other / "float-seed0")["activation_bits"] is None


def test_a_way_is_compared_with_uniform_nets_on_the_line_between_them():
    import pareto

    def run_of(kind, size, kilobytes, accuracy):
        sizes = {"mean_bits": kilobytes / 10, "packed_bytes": 1000 * kilobytes}
        scores = {"test_accuracy": accuracy, "test_loss": 1.0}
        return {"kind": kind, "size": size, "seed": 0} | sizes | scores

    runs = [
        run_of("uniform", "1", 10, 0.70),
        run_of("uniform", "2", 20, 0.80),
        run_of("learned", "1.5", 15, 0.78),
        run_of("learned", "1.5", 15, 0.80),
        run_of("learned", "4", 40, 0.85),
    ]
    above = {
        (point["kind"], point["size"]): point["above_uniform"] for point in pareto.summarize(runs)
    }
    assert above[("learned", "1.5")] == pytest.approx(0.79 - 0.75)
    assert above[("learned", "4")] is None
    assert above[("uniform", "2")] is None


@pytest.mark.thorough
def test_the_parts_that_the_post_training_study_leaves_out_are_those_that_quantize_calls():
    code = (
        "import inspect, pkgutil, post_training as study\n"
        "for part, names in study.PARTS.items():\n"
        "    for name in names:\n"
        "        pkgutil.resolve_name(name)\n"
        "        module, _, attribute = name.rpartition('.')\n"
        "        source = inspect.getsource(pkgutil.resolve_name(module))\n"
        "        assert source.count(attribute) > 1, name\n"
        "with study.without('reach'):\n"
        "    print(pkgutil.resolve_name('keras_learnbits.quantization.settling').REACH)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'experiments'}:{ROOT}"},
    )
    assert process.stdout.strip() == "1000000.0", process.stderr


def test_sensitivity_is_the_loss_that_one_layer_adds_when_it_alone_is_rounded():
    from sensitivity import sensitivities

    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="signs"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1, name="last"),
        ]
    )
    signs = np.sign(model.get_layer("signs").kernel)
    model.get_layer("signs").kernel.assign(0.5 * signs)
    data = [(x[i : i + 32], np.asarray(model(x[i : i + 32], training=True))) for i in (0, 32)]
    before = model.get_weights()
    added = sensitivities(model, data, keras.losses.MeanSquaredError(), (1, 2, 4))
    assert added["signs"][0] == pytest.approx(0, abs=1e-3)  # one bit is enough for signs
    losses = added["last"]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.01
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_augmented_images_are_shifts_of_the_image_with_reflected_edges():
    from loading import shifted

    images = np.random.default_rng(0).integers(0, 256, (64, 8, 6, 3), "uint8")
    flips = 0
    found = shifted(tf.constant(images), tf.constant([3, 4], tf.int64), by=2, flip=True).numpy()
    for image, augmented in zip(images, found, strict=True):
        wide = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        views = [wide[i : i + 8, j : j + 6] for i in range(5) for j in range(5)]
        as_is = sum((view == augmented).all() for view in views)
        flipped = sum((view[:, ::-1] == augmented).all() for view in views)
        assert as_is + flipped == 1
        flips += flipped
    assert 16 < flips < 48


def test_each_image_loses_one_square_and_nothing_else():
    from loading import cut_out

    images = np.random.default_rng(0).integers(1, 256, (64, 12, 10, 3), "uint8")
    found = cut_out(tf.constant(images), tf.constant([3, 4], tf.int64), size=4).numpy()
    corners = set()
    for image, augmented in zip(images, found, strict=True):
        cut = (augmented != image).any(axis=-1)
        rows, columns = np.flatnonzero(cut.any(axis=1)), np.flatnonzero(cut.any(axis=0))
        assert 2 <= len(rows) <= 4  # centred within the image
        assert 2 <= len(columns) <= 4
        square = np.zeros_like(cut)
        square[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(augmented, image * ~square[..., None])
        corners.add((rows[0], columns[0]))
    assert len(corners) > 20


@pytest.mark.parametrize("program", ["mnist", "cifar10"])
def test_without_data_a_program_says_in_one_line_what_to_do(program, run, tmp_path):
    message, _ = run(program, f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'run'}")
    for part in ("--data_dir", "TFDS_DATA_DIR", "digits.py"):
        assert part in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("features", "policy"),
    [("fma avx2", "float32"), ("avx2 amx_bf16 fma", "mixed_bfloat16"), (None, "float32")],
)
def test_bfloat16_is_the_default_only_where_the_processor_has_it(features, policy, tmp_path):
    from recipes import fast_policy

    if features is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {features}\n")
    assert fast_policy(tmp_path / "cpuinfo") == policy


def test_an_unknown_net_is_refused(run, tmp_path):
    code, printed = run("digits", "--model=typo", f"--output_dir={tmp_path}")
    assert code == 1
    assert "--model must be one of cnn, logistic. Received: typo" in printed.err + printed.out


@pytest.mark.thorough
def test_two_workers_learn_the_bits_of_one_process_with_the_global_batch():
    """On the loopback address, with the training loop that replaces `fit`."""
    ends = []
    for workers in (1, 2):
        process = in_a_process(
            "multi_worker.py", "--model=logistic", "--epochs=3", f"--workers={workers}"
        )
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
