"""`quantize`: written files and refused arguments."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_learnbits as klb
from keras_learnbits.command_line import files, quantizing
from keras_learnbits.command_line.main import main
from keras_learnbits.command_line.options import make_parser
from keras_learnbits.export.packed.reader import read_packed


def arguments(saved, folder, *more):
    return [
        "quantize",
        saved.model,
        f"--data={saved.data}",
        f"--output_dir={folder}",
        "--steps=0",
        "--quiet",
        *more,
    ]


def only_packed(monkeypatch):
    """Leaves out the converters, which take seconds."""

    def refuse(*args, **settings):
        raise ValueError("not tested here")

    for name in ("export_litert", "export_onnx", "draw_bits"):
        monkeypatch.setattr(files, name, refuse)


def test_every_file_is_there_with_the_size_that_the_report_says(written):
    report = json.loads((written / "report.json").read_text())
    sizes = {path.name: path.stat().st_size for path in written.iterdir()}
    assert sizes.keys() == {*report["files"], "report.json", "report.html"}
    assert {name: sizes[name] for name in report["files"]} == report["files"]
    assert {"model.keras", "model.safetensors"} <= sizes.keys()
    made = sizes.keys() | report["skipped"].keys()
    assert made == files.NAMES - {"circuit.keras"}


def test_the_packed_file_holds_the_widths_of_the_report_within_the_target(written):
    report = json.loads((written / "report.json").read_text())
    kernels = [
        each for each in read_packed(written / "model.safetensors").weights if "kernel" in each.name
    ]
    assert {each.name.partition("/")[0]: each.bits for each in kernels} == report["bits"]
    mean = sum(each.bits * each.size for each in kernels) / sum(each.size for each in kernels)
    assert mean == pytest.approx(report["mean_bits"])
    assert mean <= 3


def test_the_model_file_predicts_with_the_accuracy_of_the_report_to_within_half_the_data(
    written, saved
):
    accuracy = json.loads((written / "report.json").read_text())["accuracy"]
    assert accuracy["float"] == 1  # the labels are the float model's own classes
    model = keras.models.load_model(written / "model.keras")
    classes = model.predict(np.load(saved.data), verbose=0).argmax(axis=-1)
    wrong = np.sum(classes != np.load(saved.labels))
    # 32 of the 64 examples measure accuracy.
    assert (1 - accuracy["quantized"]) * 32 <= wrong


def test_labels_split_the_data_in_two_halves(written):
    assert json.loads((written / "report.json").read_text())["examples"] == 32


def test_an_accuracy_drop_is_kept_on_validation_data(saved, tmp_path, monkeypatch):
    only_packed(monkeypatch)
    main(
        arguments(
            saved,
            tmp_path / "small",
            "--max_accuracy_drop=0.1",
            f"--labels={saved.labels}",
            f"--validation_data={saved.data}",
        )
    )
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["examples"] == 64
    model = keras.models.load_model(tmp_path / "small" / "model.keras")
    classes = model.predict(np.load(saved.data), verbose=0).argmax(axis=-1)
    found = np.mean(classes == np.load(saved.labels))
    assert found == pytest.approx(report["accuracy"]["quantized"])
    assert found >= 0.9


def test_a_missing_package_skips_its_file_and_the_report_says_why(saved, tmp_path, monkeypatch):
    for name in ("ai_edge_litert.interpreter", "tf2onnx", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    main(arguments(saved, tmp_path / "small", "--target_bytes=600"))
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["skipped"].keys() == {"model.tflite", "model.onnx", "bits.png"}
    assert "pip install keras_learnbits[export]" in report["skipped"]["model.onnx"]
    assert "matplotlib" in report["skipped"]["bits.png"]
    page = (tmp_path / "small" / "report.html").read_text()
    assert "pip install keras_learnbits[export]" in page
    assert not (tmp_path / "small" / "model.onnx").exists()
    assert report["packed_bytes"] <= 600


def test_a_circuit_is_written_within_its_operations(saved, tmp_path, monkeypatch):
    only_packed(monkeypatch)
    more = "--target_bit_operations=9000", "--power_of_two"
    main(arguments(saved, tmp_path / "small", *more))
    circuit = keras.models.load_model(tmp_path / "small" / "circuit.keras")
    model = keras.models.load_model(tmp_path / "small" / "model.keras")
    x = np.load(saved.data)
    np.testing.assert_array_equal(circuit.predict(x, verbose=0), model.predict(x, verbose=0))
    assert klb.bit_table(model).bit_operations <= 9000
    assert "circuit.keras" in (tmp_path / "small" / "report.html").read_text()


def test_operations_need_quantized_inputs(saved, tmp_path, refusal):
    line = refusal(*arguments(saved, tmp_path / "small", "--target_bit_operations=9000"))
    assert "give --activations or --power_of_two" in line


def test_an_unexpected_error_of_a_converter_keeps_the_other_files(saved, tmp_path, monkeypatch):
    only_packed(monkeypatch)

    def fail(model, path, **settings):
        pathlib.Path(path).write_bytes(b"half")
        raise RuntimeError("converter broke")

    monkeypatch.setattr(files, "export_onnx", fail)
    main(arguments(saved, tmp_path / "small", "--target_compression=5"))
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["skipped"]["model.onnx"] == "RuntimeError: converter broke"
    assert not (tmp_path / "small" / "model.onnx").exists()
    assert report["float_bytes"] / report["packed_bytes"] >= 5


def test_layers_are_selected_by_patterns_and_activations_quantized(saved, tmp_path, monkeypatch):
    only_packed(monkeypatch)
    calls = []
    monkeypatch.setattr(files, "export_onnx", lambda *_, **settings: calls.append(settings))
    monkeypatch.setattr(files.os.path, "getsize", lambda path: 0)
    more = ("--target_bits=4", "--activations", "--include=hid*,none*", "--exclude=head")
    with pytest.raises(SystemExit):  # `none*` matches no layer
        main(arguments(saved, tmp_path / "small", *more))
    more = ("--target_bits=4", "--activations", "--include=hid*,head", "--exclude=head")
    main(arguments(saved, tmp_path / "small", *more))
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["bits"].keys() == {"hidden"}
    assert set(report["activation_bits"].values()) == {8}
    assert calls == [{"arithmetic": "int8"}]


def test_an_interruption_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    only_packed(monkeypatch)
    monkeypatch.setattr(quantizing, "_write_text", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(arguments(saved, tmp_path / "small", "--target_bits=4"))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "keras_learnbits: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named_in_one_line(saved, tmp_path, refusal):
    line = refusal(
        "quantize", "no.keras", f"--data={saved.data}", "--target_bits=2", "--output_dir=o"
    )
    assert "no.keras" in line
    line = refusal("quantize", saved.model, "--data=no.npy", "--target_bits=2", "--output_dir=o")
    assert "--data" in line
    assert "no.npy" in line


def test_a_file_that_is_no_keras_model_is_named_in_one_line(saved, tmp_path, refusal):
    path = tmp_path / "text.keras"
    path.write_text("no model")
    line = refusal(
        "quantize",
        path,
        f"--data={saved.data}",
        "--target_bits=2",
        f"--output_dir={tmp_path / 'o'}",
    )
    assert str(path) in line
    assert "file that Keras saved" in line


def test_data_of_another_shape_are_refused_with_the_shapes(saved, tmp_path, refusal):
    np.save(tmp_path / "x.npy", np.zeros((16, 9), "float32"))
    line = refusal(
        "quantize",
        saved.model,
        f"--data={tmp_path / 'x.npy'}",
        "--target_bits=2",
        f"--output_dir={tmp_path / 'o'}",
        "--quiet",
    )
    assert "float32[16, 9]" in line
    assert "(None, 8)" in line
    assert not (tmp_path / "o").exists()


def test_bounds_of_the_widths_are_kept(saved, tmp_path, monkeypatch):
    only_packed(monkeypatch)
    for bounds, bits in ((["--min_bits=3"], 3), (["--max_bits=2"], 2)):
        folder = tmp_path / str(bits)
        main(arguments(saved, folder, "--target_bits=3", *bounds))
        report = json.loads((folder / "report.json").read_text())
        assert {*report["bits"].values()} == {bits}


def test_bounds_that_exclude_each_other_are_refused(saved, refusal):
    start = ["quantize", saved.model, f"--data={saved.data}", "--output_dir=o", "--target_bits=5"]
    assert "min_bits=5, max_bits=3" in refusal(*start, "--min_bits=5", "--max_bits=3")


def test_exactly_one_target_is_needed(saved, refusal):
    start = ["quantize", saved.model, f"--data={saved.data}", "--output_dir=o"]
    assert "--target_bits" in refusal(*start)
    line = refusal(*start, "--target_bits=2", "--target_bytes=100")
    assert "--target_bytes" in line
    assert "--target_bits" in line


def test_integers_may_be_written_with_an_exponent():
    start = ["quantize", "m.keras", "--data=x.npy", "--output_dir=o"]
    options = make_parser().parse_args([*start, "--target_bytes=1e5", "--steps=1e3", "--seed=7"])
    assert (options.target_bytes, options.steps, options.seed) == (100_000, 1000, 7)
    assert type(options.target_bytes) is int


@pytest.mark.parametrize("value", ["1.5", "ten", "inf", "nan"])
def test_numbers_that_are_no_integers_are_refused(value, refusal):
    line = refusal("quantize", "m.keras", "--data=x.npy", "--output_dir=o", f"--steps={value}")
    assert f"argument --steps: invalid integer value: '{value}'" in line


def test_an_accuracy_needs_labels(saved, refusal):
    start = ["quantize", saved.model, f"--data={saved.data}", "--output_dir=o"]
    assert "--labels" in refusal(*start, "--max_accuracy_drop=0.01")
    more = ("--target_bits=2", f"--validation_data={saved.data}")
    assert "--labels" in refusal(*start, *more)


def test_labels_of_another_number_are_refused(saved, tmp_path, refusal):
    np.save(tmp_path / "y.npy", np.zeros(63, int))
    line = refusal(
        *arguments(saved, tmp_path / "o", "--target_bits=2", f"--labels={tmp_path / 'y.npy'}")
    )
    assert "63 labels" in line
    assert "64 examples" in line


def test_inputs_of_integers_are_not_scaled(saved, tmp_path, refusal):
    images = keras.Input((8,), dtype="uint8")
    outputs = keras.layers.Dense(2)(keras.layers.Rescaling(1 / 255)(images))
    keras.Model(images, outputs).save(tmp_path / "bytes.keras")
    bytes_model = [*arguments(saved, tmp_path / "o", "--target_bits=4", "--scale=0.5")]
    bytes_model[1] = tmp_path / "bytes.keras"
    line = refusal(*bytes_model)
    assert "--scale needs a model whose inputs are floats" in line
    assert "Received: --scale=0.5 for inputs of types uint8" in line


def test_a_target_below_the_lowest_widths_is_refused_in_one_line(saved, tmp_path, refusal):
    assert "0.5" in refusal(*arguments(saved, tmp_path / "o", "--target_bits=0.5"))


def test_a_folder_with_files_is_refused_before_the_work(saved, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(klb.quantization.quantize, "quantize", None)  # a call would fail otherwise
    (tmp_path / "thesis.tex").write_text("years of work")
    line = refusal(*arguments(saved, tmp_path, "--target_bits=2"))
    assert "thesis.tex" in line
    assert "--overwrite" in line
    line = refusal(*arguments(saved, tmp_path, "--target_bits=2", "--overwrite"))
    assert "thesis.tex" in line
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
