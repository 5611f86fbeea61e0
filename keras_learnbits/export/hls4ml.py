"""`export_hls4ml`: a C++ project for FPGAs that computes exactly the model's predictions."""

import contextlib
import io
import os
import shutil

import numpy as np

from keras_learnbits._keras import symbolic_inputs
from keras_learnbits.export._extra import import_extra
from keras_learnbits.export._files import directory_written_as_a_whole
from keras_learnbits.export._function import predictions_of
from keras_learnbits.export._hls4ml_handlers import register_handlers
from keras_learnbits.export._weights import check_finite
from keras_learnbits.export.fixed_point import FixedPoint, to_fixed_point
from keras_learnbits.layers.traversal import layers_inside

# The file by which hls4ml finds a project again (`hls4ml.converters.link_existing_project`).
PROJECT_FILE = "hls4ml_config.yml"
# Number of random examples on which the compiled project is compared with the model.
EXAMPLES = 64


def export_hls4ml(
    model, output_dir, *, backend="Vitis", check=True, project_name="learned_bits", **settings
):
    """Writes a model as an hls4ml project, whose C++ computes exactly the model's predictions.

    The model must compute with integers times powers of two throughout: convert it with
    `to_learned_bits(..., activations=True, power_of_two=True)`, or `quantize` with the same
    arguments. All sums must fit into 24 bits, where float32 is exact.

    hls4ml (https://fastmachinelearning.org/hls4ml) derives all types from the values: products,
    sums and activations have only the bits that they need. The circuit computes the predictions of
    the model in float32, even if the model has a mixed precision.

    Args:
        model: A built Sequential or functional model of dense layers, convolutions along one or two
            axes, also depthwise and separable ones, ReLU, pooling, padding, merging and reshaping
            layers. Sizes of all inputs are fixed.
        output_dir: Path of the project's directory. An empty directory is replaced, and so is an
            earlier project of hls4ml, with everything in it; other directories are refused.
        backend: Name of a backend of hls4ml, such as `"Vitis"`, `"Vivado"` or `"oneAPI"`.
        check: Whether to compile the C++ with g++ and to compare its predictions for random inputs
            with the model's. If they differ, nothing is written.
        project_name: Name of the project and of its top function.
        **settings: Further arguments of `hls4ml.converters.convert_from_keras_model`, such as
            `part="xcu250-figd2104-2L-e"`, `clock_period=5` and `hls_config={"Model":
            {"Precision": "fixed<16,6>", "ReuseFactor": 1, "Strategy": "Latency"}}`, of which the
            precision is not used.

    Returns:
        `hls4ml.model.ModelGraph`, compiled if `check`: `predict` runs the C++ on a list
        of arrays in the order of `model.inputs`, `build` the synthesis of the backend's tools.

    Raises:
        ImportError: hls4ml is missing: `pip install keras_learnbits[hardware]`.
        ValueError: A layer cannot be computed exactly or is not supported by hls4ml (the message
            names it and the way out); an input has open dimensions; or the predictions differ.
        RuntimeError: `check` is True and g++ is missing.
        FileExistsError: `output_dir` is a file, or a directory with other files than a project's.

    Examples:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
        >>> x = np.random.default_rng(0).normal(size=(64, 8))
        >>> small = keras_learnbits.quantize(
        ...     model, x, target_bits=3, activations=True, power_of_two=True, steps=0, verbose=0)
        >>> graph = export_hls4ml(small, "project")  # doctest: +SKIP
        >>> np.array_equal(graph.predict(x), small.predict(x))  # doctest: +SKIP
        True
    """
    hls4ml = import_extra("hls4ml", extra="hardware")
    register_handlers()
    if check and shutil.which("g++") is None:
        raise RuntimeError(
            "`export_hls4ml` compares the C++ with the model, which needs the compiler g++: "
            "install it, or write the project unchecked with `check=False`"
        )
    plain = to_fixed_point(model)
    check_finite(model)
    config = settings.pop("hls_config", None) or hls4ml.utils.config_from_keras_model(
        plain, granularity="model", backend=backend
    )
    output_dir = os.path.abspath(os.fspath(output_dir))
    _check_free(output_dir)
    with directory_written_as_a_whole(output_dir, _check_free) as new:
        with contextlib.redirect_stdout(io.StringIO()):
            graph = hls4ml.converters.convert_from_keras_model(
                plain, output_dir=new, project_name=project_name, backend=backend,
                hls_config=config, bit_exact=True, allow_da_fallback=False,
                allow_v2_fallback=False, **settings,
            )  # fmt: skip
            graph.compile() if check else graph.write()
        if check:
            _compare(model, plain, graph)
        _rename_in(os.path.join(new, PROJECT_FILE), new, output_dir)
    graph.config.config["OutputDir"] = output_dir
    return graph


def _check_free(path):
    """Raises a FileExistsError if there is something other than a project of hls4ml."""
    if not os.path.lexists(path):
        return
    found = sorted(os.listdir(path)) if os.path.isdir(path) else [os.path.basename(path)]
    if found and PROJECT_FILE not in found:
        raise FileExistsError(
            "`output_dir` must be a new or an empty directory, or an earlier project of hls4ml, "
            f"which is replaced. Received: output_dir={path!r} with {', '.join(found[:3])}"
        )


def _rename_in(path, old, new):
    """Replaces the path of a directory in a text file."""
    with open(path) as file:
        content = file.read()
    with open(path, "w") as file:
        file.write(content.replace(old, new))


def _compare(model, plain, graph):
    """Raises a ValueError unless the C++ predicts what the model predicts, to the last bit."""
    inputs = _examples(plain)
    in_float32 = all(layer.compute_dtype == "float32" for layer in layers_inside(model))
    model = model if in_float32 else plain
    expected = predictions_of(model, symbolic_inputs(model), inputs)
    found = graph.predict(inputs[0] if len(inputs) == 1 else inputs)
    found = found if isinstance(found, list) else [found]
    for name, wanted, got in zip(plain.output_names, expected, found, strict=True):
        off = np.abs(np.reshape(got, wanted.shape) - wanted.astype("float32"))
        if off.max() > 0:
            raise ValueError(
                "The C++ of a circuit must predict exactly what its model predicts, or no project "
                f"is written. Received: model={model.name!r}, whose output {name!r} is off by up "
                f"to {off.max():.2g} in {np.count_nonzero(off)} of {off.size} numbers"
            )


def _examples(plain):
    """Random inputs over the range of their quantizers and a little beyond, list of arrays."""
    rng = np.random.default_rng(0)
    quantizers = [layer for layer in plain.layers if isinstance(layer, FixedPoint)]
    found = []
    for each in plain.inputs:
        # The quantizer of the input, or of a later tensor if there are layers between.
        direct = [layer for layer in quantizers if layer.input is each] or quantizers
        low, high = direct[0].lowest - 2.0, direct[0].highest + 2.0
        values = rng.uniform(low, high, (EXAMPLES, *each.shape[1:])) * direct[0].step
        found.append(values.astype("float32"))
    return found
