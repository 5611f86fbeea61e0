"""Single figures within sentences of README and docs, by name."""

from rendering.agreement import in_short
from rendering.formats import load, mean, mean_and_spread, points, study
from rendering.training import pareto_point


def _post(key):
    return study("post-training")[key]


def _download(key):
    """Size of a compressed LiteRT file of ResNet-20."""
    return f"{_post(f'resnet20-{key}-test')['litert']['gzip_bytes'] / 1e3:,.0f} kB"


def _file_lost(key):
    """Points that a LiteRT file of ResNet-20 loses."""
    of_float, file = (_post(f"resnet20-{each}-test")["litert"] for each in ("float", key))
    return f"{100 * (of_float['accuracy'] - file['accuracy']):.1f} points"


def _trained_loss():
    of_float = pareto_point("cifar10", "float", None)
    return 100 * (of_float["accuracy"] - pareto_point("cifar10", "learned", "1.25")["accuracy"])


def _gains_on_the_narrow_net():
    sizes = ("1.25", "1.5", "2", "3")
    gains = [pareto_point("cifar10-quarter", "learned", size)["above_uniform"] for size in sizes]
    *first, last = map(points, gains)
    return f"{', '.join(first)} and {last} points at 1.25, 1.5, 2 and 3 mean bits"


def _mnist_error():
    runs = [load(f"mnist-bits1.25/seed{seed}.json") for seed in range(3)]
    error = 1 - mean(run["test_accuracy"] for run in runs)
    return f"{error:.2%} error at {mean(run['mean_bits'] for run in runs):.2f} mean bits"


def _float_after_45_epochs():
    (start,) = (run for run in load("cifar10-long/pareto.json")["runs"] if run["kind"] == "start")
    return f"{start['test_accuracy']:.2%}"


def _resnet_float():
    return f"{load('cifar10-resnet20/start/result.json')['test_accuracy']:.2%}"


def _resnet_lost(bits):
    """Points that the ResNet-20 of 100 epochs loses without labels, mean of its samples.

    Raises:
        ValueError: The results are those of another float model.
    """
    start = load("cifar10-resnet20/start/result.json")["test_accuracy"]
    if abs(_post("resnet20-float-test")["accuracy"] - start) > 5e-4:  # bfloat16 there
        raise ValueError("Results of post-training quantization must be of the model in start/.")
    found = [
        each["accuracy"]
        for key, each in study("post-training").items()
        if key.startswith(f"resnet20-quantize-{bits}-") and key.endswith("-1024-test")
    ]
    return f"{100 * (_post('resnet20-float-test')['accuracy'] - mean(found)):.2f}"


def _resnet_trained(kind, bits=None):
    """Points from the float model that a training began with, at widths of `quantize` or float."""
    start = load("cifar10-resnet20/start/result.json")["test_accuracy"]
    return points(pareto_point("cifar10-resnet20-100", kind, bits)["accuracy"] - start)


def _with_onednn():
    """Seconds of a training step with oneDNN over those without it, with learned bits."""
    off, on = (
        study("onednn")[each]["nets"]["ResNet-20"]["kinds"]["measured"]["seconds_per_step"]
        for each in ("off", "on")
    )
    return f"{on / off:.2f}"


def _finetuned(optimizer):
    of_float, learned = (
        load(f"cifar10-quarter/finetuning/{optimizer}-{kind}.json")
        for kind in ("float", "learned2")
    )
    return f"{of_float['test_accuracy']:.1%} in float and {learned['test_accuracy']:.1%} at 2 bits"


def _distilled(name):
    runs = load(f"cifar10-quarter/distillation/{name}.json")["runs"]
    return mean_and_spread([run["test_accuracy"] for run in runs if run["kind"] == "learned"])


def _probes_in_inference_mode(bits):
    def accuracy(kind):
        return mean(
            load(f"cifar10-inference-looks/{kind}{bits}-seed{seed}.json")["test_accuracy"]
            for seed in range(3)
        )

    return f"{points(accuracy('learned') - accuracy('uniform'))} points"


def _interval(interval):
    runs = [run for run in study("interval")["runs"] if run["interval"] == interval]
    bits = mean(run["mean_bits"] for run in runs)
    return f"{mean_and_spread([run['accuracy'] for run in runs])} at {bits:.2f} bits"


def _directions(directions):
    runs = [run for run in study("directions")["runs"] if run["directions"] == directions]
    at = [
        mean_and_spread([run["accuracy"] for run in runs if run["target_bits"] == bits])
        for bits in (2, 3)
    ]
    return "{} at 2 bits and {} at 3".format(*at)


def _sensitivities(commit, key, form):
    runs = [run for run in study("sensitivity")["runs"] if run["commit"] == commit]
    runs.sort(key=lambda run: round(run["mean_bits"]))
    two, two_again, three = (form.format(run[key]) for run in runs)
    return f"{two} and {two_again} at 2 bits and {three} at 3"


def _fuzzing(key):
    return f"{study('fuzz_packed')[key]:,}"


FIGURES = {
    "download float": lambda: _download("float"),
    "download 3 bits": lambda: _download("quantize-3-0-1024"),
    "download 8 bits": lambda: _download("litert-8-0-1024"),
    "download lost": lambda: _file_lost("quantize-3-0-1024"),
    "cnn trained lost": lambda: f"{_trained_loss():.1f} points",
    "cnn float 45 epochs": _float_after_45_epochs,
    "resnet float": _resnet_float,
    **{f"resnet {bits} bits lost": lambda bits=bits: _resnet_lost(bits) for bits in "432"},
    "resnet trained": lambda: _resnet_trained("learned", "2"),
    "resnet float trained": lambda: _resnet_trained("float"),
    "narrow gains": _gains_on_the_narrow_net,
    "narrow finetuned sgd": lambda: _finetuned("sgd"),
    "narrow finetuned adamw": lambda: _finetuned("adamw"),
    "narrow labels": lambda: _distilled("labels"),
    "narrow distilled": lambda: _distilled("distilled"),
    "narrow directions both": lambda: _directions("both"),
    "narrow directions in turns": lambda: _directions("one in turns"),
    "narrow own loss": lambda: _sensitivities("9492cf5", "loss", "{:.3f}"),
    "narrow own accuracy": lambda: _sensitivities("9492cf5", "accuracy", "{:.1%}"),
    "narrow shrunk loss": lambda: _sensitivities("472bdc2", "loss", "{:.3f}"),
    "narrow shrunk accuracy": lambda: _sensitivities("472bdc2", "accuracy", "{:.1%}"),
    "inference probes 2 bits": lambda: _probes_in_inference_mode(2),
    "inference probes 3 bits": lambda: _probes_in_inference_mode(3),
    "digits interval 10": lambda: _interval(10),
    "digits interval 20": lambda: _interval(20),
    "mnist error": _mnist_error,
    "with oneDNN": _with_onednn,
    "fuzzed files": lambda: _fuzzing("files"),
    "fuzzed refused": lambda: _fuzzing("refused"),
    "fuzzed read": lambda: _fuzzing("read"),
    **{
        f"agreement {problem} {estimator}": lambda p=problem, e=estimator: in_short(p, e)
        for problem in ("mnist", "cifar10", "mnist-paper")
        for estimator in ("measured", "straight_through", "difference", "paper", "in training")
    },
}
