import json
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_learnbits as klb

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPORT = (ROOT / "docs" / "results.md").read_text()
TUTORIAL = (ROOT / "docs" / "training.md").read_text()
RESULTS = ROOT / "experiments" / "results"
SPEED = (ROOT / "docs" / "speed.md").read_text()


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


@pytest.mark.parametrize(
    ("page", "folder"),
    [(README, ROOT), (REPORT, ROOT / "docs"), (TUTORIAL, ROOT / "docs")],
)
def test_the_pictures_are_there(page, folder):
    for path in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (folder / path).exists(), path


PROGRAMS = ("digits", "mnist-bits2", "mnist-bits1.25", "mnist-logistic", "mnist-paper")


def mean_and_spread(accuracies):
    """In per cent, the spread in points, where there is one."""
    if len(accuracies) == 1:
        return f"{accuracies[0]:.2%}"
    return f"{np.mean(accuracies):.2%} ± {100 * np.std(accuracies, ddof=1):.2f}"


def test_each_folder_of_results_of_programs_has_a_row():
    studies = {"studies", "cifar10", "cifar10-long", "cifar10-quarter", "cifar10-resnet20"}
    studies |= {"cifar10-inference-looks"}
    assert {path.name for path in RESULTS.iterdir()} - studies == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_row_of_the_programs_is_that_of_its_files(name):
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]
    (row,) = [line for line in REPORT.splitlines() if f"(../experiments/results/{name})" in line]
    found = [cell.strip() for cell in row.split("|")[2:-1]]
    accuracies = [run["test_accuracy"] for run in runs]
    of_float = [run["float_test_accuracy"] for run in runs]
    bits = [run["mean_bits"] or 32 for run in runs]
    expected = [mean_and_spread(accuracies), "", f"{np.mean(bits):.2f}"]
    if None in of_float:
        expected[1] = "not trained"
    elif of_float != accuracies:
        expected[1] = f"{100 * (np.mean(accuracies) - np.mean(of_float)):+.2f}"
    if len(runs) > 1:
        expected[2] += f" ({min(bits):.2f} to {max(bits):.2f})"
    packed = [run["packed_bytes"] for run in runs if run["packed_bytes"]]
    expected.append(f"{np.mean(packed):,.0f}" if packed else "")
    (float_bytes,) = {run["float_bytes"] for run in runs}
    (epochs,) = {run["epochs"] for run in runs}
    expected += [f"{float_bytes:,}", str(len(runs)), str(epochs)]
    assert found[:-1] == expected
    assert found[-1].startswith(f"`{runs[0]['command']}`")
    assert [run["seed"] for run in runs] == list(range(len(runs)))


PARETO, PARETO_OF_DEFAULT, PARETO_OF_LONGER, PARETO_OF_RESNET = (
    json.loads((RESULTS / name / "pareto.json").read_text())
    for name in ("cifar10-quarter", "cifar10", "cifar10-long", "cifar10-resnet20")
)
ALL_PARETO = (PARETO, PARETO_OF_DEFAULT, PARETO_OF_LONGER, PARETO_OF_RESNET)
WAYS = {
    "learned": "learned bits",
    "uniform": "same bits in every layer",
    "float": "float",
    "paper": "published method",
}


def in_points(difference):
    return "" if difference is None else f"{100 * difference:+.2f}"


def rows_of(study, page):
    """Parameters for each point of a study: it, the study, and the page that has its row."""
    return [
        pytest.param(point, study, page, id=f"{point['kind']}-{point['size']}-{len(study['runs'])}")
        for point in study["points"]
    ]


@pytest.mark.parametrize(
    ("point", "study", "page"),
    rows_of(PARETO, REPORT)
    + rows_of(PARETO_OF_DEFAULT, REPORT)
    + rows_of(PARETO_OF_LONGER, REPORT)
    + rows_of(PARETO_OF_RESNET, REPORT),
)
def test_a_row_of_accuracy_against_size_is_that_of_its_runs(point, study, page):
    runs = [run for run in study["runs"] if (run["kind"], run["size"]) == point_key(point)]
    accuracies = [run["test_accuracy"] for run in runs]
    bits = np.mean([run["mean_bits"] or 32 for run in runs])
    size = np.mean([run["packed_bytes"] or run["float_bytes"] for run in runs])
    of_float = np.mean([r["test_accuracy"] for r in study["runs"] if r["kind"] == "float"])
    if point["kind"] == "hgq2":
        per, price = point["size"].split(":")
        name = f"HGQ2, a width per {per}, price {price}"
    elif point["kind"] == "ends":
        name = f"8 bits in the first and last layer, {point['size']} between"
    else:
        name = WAYS[point["kind"]]
    accuracy = mean_and_spread(accuracies)
    to_float = "" if point["kind"] == "float" else in_points(np.mean(accuracies) - of_float)
    row = [name, f"{bits:.2f}", f"{size:,.0f}", accuracy, to_float]
    row += [in_points(point["above_uniform"]), str(len(runs))]
    assert f"| {' | '.join(row)} |" in page
    assert sorted(run["seed"] for run in runs) == list(range(len(runs)))


def point_key(point):
    return point["kind"], point["size"]


def test_gains_over_uniform_bits_are_over_the_line_between_uniform_nets():
    def mean(runs, key):
        return np.mean([run[key] for run in runs])

    groups = {}
    for run in PARETO["runs"]:
        groups.setdefault((run["kind"], run["size"]), []).append(run)
    line = [groups["uniform", bits] for bits in "123"]
    sizes = [mean(runs, "packed_bytes") for runs in line]
    accuracies = [mean(runs, "test_accuracy") for runs in line]
    for point in PARETO["points"]:
        if point["above_uniform"] is not None:
            runs = groups[point_key(point)]
            beside = np.interp(mean(runs, "packed_bytes"), sizes, accuracies)
            expected = mean(runs, "test_accuracy") - beside
            assert point["above_uniform"] == pytest.approx(expected, abs=1e-6)


def test_the_gains_on_the_narrow_net_are_those_of_its_study():
    above = {p["size"]: p["above_uniform"] for p in PARETO["points"] if p["kind"] == "learned"}
    gains = [100 * above[bits] for bits in ("1.25", "1.5", "2", "3")]
    text = "accuracy {:+.2f}, {:+.2f}, {:+.2f} and {:+.2f} points at 1.25, 1.5, 2 and 3 mean bits"
    assert text.format(*gains) in METHOD


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w1.5-b4-r03", "at 0.03 {} at {} bits"),
        ("w1.5-b4-r003", "at 0.003 {} at {}"),
        ("w1.5-b4-r01", "at 0.01 {} at {}"),
        ("w1.5-b4-r1", "at 0.1 {} at {}"),
        ("w1.5-b2-r01", "from 2 bits {} at {}"),
        ("w2-b6-r03", "from 6 {} at {}"),
        ("c0.3-b4-r03", "a width per channel {} at {}"),
    ],
)
def test_the_trials_of_hgq2_are_those_of_their_files(name, text):
    folder = RESULTS / "cifar10-quarter" / "hgq2-tuning"
    run = json.loads((folder / f"{name}.json").read_text())
    assert run["evaluated_on"] == "held-out training examples"
    figures = f"{run['test_accuracy']:.1%}", f"{run['mean_bits']:.2f}"
    assert text.format(*figures) in " ".join(REPORT.split())


def test_the_picture_of_layers_has_the_bits_of_these_runs():
    study = json.loads((RESULTS / "cifar10-quarter" / "layers.json").read_text())
    for budget, bits in study["bits"].items():
        runs = [r for r in PARETO["runs"] if (r["kind"], r["size"]) == ("learned", budget)]
        assert bits == {name: np.mean([run["bits"][name] for run in runs]) for name in bits}


def test_no_learned_net_is_above_its_budget():
    learned = [r for study in ALL_PARETO for r in study["runs"] if r["kind"] == "learned"]
    assert learned
    assert all(run["mean_bits"] <= float(run["size"]) for run in learned)


def runs_of(kind, bits):
    """Results of the three seeds of a kind of bits on CIFAR-10, with looks in inference mode."""
    paths = sorted((RESULTS / "cifar10-inference-looks").glob(f"{kind}{bits}-seed?.json"))
    assert len(paths) == 3
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("bits", [2, 3])
def test_what_looks_in_inference_mode_brought_is_that_of_its_files(bits):
    uniform, learned = (
        100 * np.mean([run["test_accuracy"] for run in runs_of(kind, bits)])
        for kind in ("uniform", "learned")
    )
    assert f"{learned - uniform:+.2f} points at {bits} bits" in METHOD


def test_the_float_net_trained_longer_is_that_of_its_file():
    (start,) = (run for run in PARETO_OF_LONGER["runs"] if run["kind"] == "start")
    assert start["epochs"] == 45
    assert f"reaches {start['test_accuracy']:.2%} after its 45 epochs" in REPORT


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [("sgd", "{} in float and {} at 2 bits"), ("adamw", "where AdamW at 3e-3 has {} and {}")],
)
def test_what_optimizers_of_the_last_epochs_brought_is_that_of_their_files(optimizer, text):
    folder = RESULTS / "cifar10-quarter" / "finetuning"
    of_float, learned = (
        json.loads((folder / f"{optimizer}-{kind}.json").read_text())
        for kind in ("float", "learned2")
    )
    assert of_float["evaluated_on"] == learned["evaluated_on"] == "held-out training examples"
    shares = (f"{run['test_accuracy']:.1%}" for run in (of_float, learned))
    assert text.format(*shares) in " ".join(REPORT.split())


@pytest.mark.parametrize(
    ("name", "text"), [("labels", "{} from the labels alone"), ("distilled", "{} with the net")]
)
def test_what_distillation_brought_is_that_of_its_files(name, text):
    path = RESULTS / "cifar10-quarter" / "distillation" / f"{name}.json"
    runs = json.loads(path.read_text())["runs"]
    learned = [run["test_accuracy"] for run in runs if run["kind"] == "learned"]
    assert len(learned) == 2
    assert text.format(mean_and_spread(learned)) in " ".join(METHOD.split())


EXPORTS = (ROOT / "docs" / "exports.md").read_text()


@pytest.mark.parametrize("program", ["mnist", "cifar10"])
def test_sizes_and_accuracies_of_exports_are_those_of_their_file(program):
    study = json.loads((RESULTS / "studies" / f"exports-{program}.json").read_text())
    for name, accuracy in study["test_accuracy"].items():
        tolerance = 0.00101 if "int8" in name else 0.0002
        assert abs(accuracy - study["test_accuracy"]["model"]) <= tolerance
    assert study["bytes"]["packed"] <= 1.02 * study["bytes_of_bit_table"]
    assert study["mean_bits_in_qonnx"] == pytest.approx(study["mean_bits"])


def test_the_tables_of_exports_are_those_of_their_files():
    command = [sys.executable, "experiments/tables.py", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_figures_of_the_fuzzing_are_those_of_its_file():
    study = json.loads((RESULTS / "studies" / "fuzz_packed.json").read_text())
    assert (study["crashes"], study["hangs"], study["read_otherwise_unnoticed"]) == (0, 0, 0)
    for figure in (study["files"], study["refused"], study["read"]):
        assert f"{figure:,}" in EXPORTS


METHOD = (ROOT / "docs" / "method.md").read_text()


@pytest.mark.parametrize("problem", ["mnist", "cifar10"])
def test_the_agreement_tables_are_those_of_their_files(problem):
    path = RESULTS / "studies" / f"agreement-{problem}.json"
    study = json.loads(path.read_text())
    section = METHOD[METHOD.rindex(f"`{study['command']}`") :]
    for loss in ("fit", "evaluate"):
        summary = study[loss]
        section = section[section.index(f"Loss of `{loss}`") :]
        assert f"{summary['above_standard_error']} of {summary['changes']} changes" in section
        for name, found in summary["estimators"].items():
            row = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
            shares = found["agreement_of_signs"].values()
            cells = [f"{found['rank_correlation']:.2f}", f"{found['slope']:.2g}"]
            cells += [f"{share:.0%}" for share in shares]
            assert [cell.strip() for cell in row.split("|")[2:-1]] == cells


@pytest.mark.parametrize("problem", ["mnist", "cifar10"])
def test_the_agreement_of_single_looks_in_the_objections_is_that_of_its_file(problem):
    study = json.loads((RESULTS / "studies" / f"agreement-{problem}.json").read_text())
    found = study["fit"]["estimators"]["in training"]
    shares = found["agreement_of_signs"].values()
    signs = f"signs {min(shares):.0%} to {max(shares):.0%}"
    assert f"single probes in training {found['rank_correlation']:.2f}, {signs}" in METHOD


def row_of(study, name):
    """Cells of the row of that name in the part of docs/speed.md below a study's command."""
    section = SPEED[SPEED.index(f"`{study['command']}`") :]
    row = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def study_of(name):
    return json.loads((RESULTS / "studies" / f"{name}.json").read_text())


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_cost_of_a_step_is_that_of_its_file(policy):
    study = study_of(f"overhead-{policy}")
    assert len(study["nets"]) == 5
    for net, found in study["nets"].items():
        kinds = dict(found["kinds"])
        first_step = f"{kinds['measured']['first_step_ratio']:.1f}"
        plain = f"{1000 * kinds.pop('plain Keras')['seconds_per_step']:.0f}"
        ratios = [f"{each['ratio']:.2f}" for each in kinds.values()]
        row = [plain, *ratios, first_step]
        if policy == "float32":
            of_learned, of_plain = (
                f"{found['kinds'][kind]['peak_bytes'] / 1e6:.0f}"
                for kind in ("measured", "plain Keras")
            )
            row.append(f"{of_learned} ({of_plain})")
        assert row_of(study, net) == row


@pytest.mark.parametrize("name", ["first-step", "first-step-metrics"])
def test_the_seconds_to_the_first_step_are_those_of_their_file(name):
    study = study_of(name)
    assert len(study["nets"]) == 5
    for net, found in study["nets"].items():
        learned = found["kinds"]["measured"]
        plain = found["kinds"]["plain Keras"]["seconds_to_first_step"]
        seconds = [f"{each:.1f}" for each in (plain, learned["seconds_to_first_step"])]
        assert row_of(study, net) == [*seconds, f"{learned['first_step_ratio']:.2f}"]


def test_the_growth_of_the_cost_is_that_of_its_file():
    study = study_of("scaling")
    for name, slope in study["slopes"].items():
        assert row_of(study, name)[0] == f"{slope:.3g}"


@pytest.mark.parametrize(
    ("kind", "size", "name"),
    [("weights", size, f"one layer of {size} weights") for size in ("1e4", "1e6", "1e8")]
    + [("layers", size, f"{size} layers") for size in ("5", "50", "500")],
)
def test_the_ratios_of_dense_layers_are_those_of_their_file(kind, size, name):
    models = study_of("scaling")[kind][size]
    plain, learned = models["plain Keras"], models["learned bits"]
    ratios = [learned[key] / plain[key] for key in ("step", "first_step")]
    assert row_of(study_of("scaling"), name) == [f"{ratios[0]:.2f}", f"{ratios[1]:.1f}"]


@pytest.mark.parametrize("interval", [10, 20])
def test_the_accuracy_with_each_interval_is_that_of_its_file(interval):
    study = study_of("interval")
    assert study["evaluated_on"] == "held-out training examples"
    runs = [run for run in study["runs"] if run["interval"] == interval]
    accuracies = [100 * run["accuracy"] for run in runs]
    bits = np.mean([run["mean_bits"] for run in runs])
    spread = f"{np.mean(accuracies):.2f}% ± {np.std(accuracies, ddof=1):.2f}"
    assert f"{spread} at {bits:.2f} bits with {interval}" in METHOD


@pytest.mark.parametrize(
    ("directions", "text"),
    [("both", "{} at 2 bits and {} at 3"), ("one in turns", "in turns {} and {}")],
)
def test_what_looks_in_both_directions_brought_is_that_of_their_file(directions, text):
    runs = [run for run in study_of("directions")["runs"] if run["directions"] == directions]
    shares = [
        mean_and_spread([run["accuracy"] for run in runs if run["target_bits"] == bits])
        for bits in (2, 3)
    ]
    assert len(runs) == 6
    assert text.format(*shares) in " ".join(METHOD.split())


def test_the_losses_with_and_without_what_layers_share_are_those_of_their_file():
    study = study_of("sensitivity")
    assert study["evaluated_on"] == "held-out training examples"
    losses = {}
    for run in study["runs"]:
        of_bits = losses.setdefault(run["commit"], {}).setdefault(round(run["mean_bits"]), [])
        of_bits.append((f"{run['loss']:.3f}", f"{run['accuracy']:.1%}"))
    found = (losses[commit] for commit in ("9492cf5", "472bdc2"))
    (own, own_shares), (weighed, weighed_shares) = (
        zip(*of_bits[2], *of_bits[3], strict=True) for of_bits in found
    )
    text = " ".join(METHOD.split())
    assert "loss was {} and {} at 2 bits, two seeds, and {} at 3 bits".format(*own) in text
    assert "all layers have shown, {}, {} and {}.".format(*weighed) in text
    shares = "{}, {} and {}".format(*own_shares), "{}, {} and {}".format(*weighed_shares)
    assert f"Accuracies were {shares[0]}, and {shares[1]}." in text


def test_the_share_of_the_input_pipelines_is_that_of_its_file():
    study = study_of("pipelines")
    for name, found in study["programs"].items():
        share = found["model_seconds"] / found["epoch_seconds"]
        alone = [f"{found[key]:.2f}" for key in ("data_seconds", "data_cpu_seconds")]
        assert row_of(study, name) == [f"{found['epoch_seconds']:.1f}", f"{share:.1%}", *alone]


def test_the_pictures_of_the_method_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", METHOD + SPEED):
        assert (ROOT / "docs" / path).exists(), path


def test_the_error_on_mnist_in_the_objections_is_that_of_its_files():
    paths = sorted((RESULTS / "mnist-bits1.25").glob("*.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    error = 1 - np.mean([run["test_accuracy"] for run in runs])
    assert f"{error:.2%} error at {runs[0]['mean_bits']:.2f} mean bits" in METHOD
    assert {run["mean_bits"] for run in runs} == {runs[0]["mean_bits"]}


def test_the_headline_is_that_of_its_files():
    """The size and the accuracy at 3 bits, and the net that was trained to 1.25 bits."""
    results = study_of("post-training")
    of_float, small = results["cnn-float-test"], results["cnn-quantize-3-0-1024-test"]
    lost = 100 * (of_float["accuracy"] - small["accuracy"])
    text = " ".join(README.split())
    assert (
        f"from {of_float['bytes'] / 1e6:.2f} MB to {small['bytes'] / 1e3:.0f} kB "
        f"for {lost:.1f} points of accuracy"
    ) in text
    points = {(p["kind"], p["size"]): p for p in PARETO_OF_DEFAULT["points"]}
    learned, of_float = points["learned", "1.25"], points["float", None]
    lost = 100 * (of_float["accuracy"] - learned["accuracy"])
    assert f"within {lost:.1f} points of float at 1.25 bits per weight, " in text
    assert f"{learned['bytes'] / 1e3:.0f} kB" in text
