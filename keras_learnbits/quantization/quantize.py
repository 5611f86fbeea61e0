"""`quantize`: quantizes a Keras model to a given size, from unlabelled data."""

import dataclasses
import time
import warnings

import keras
import numpy as np

from keras_learnbits.allocation.bit_operations import BitOperationsTarget
from keras_learnbits.allocation.size_targets import SIZE_TARGETS
from keras_learnbits.allocation.targets import BitsTarget
from keras_learnbits.arguments import check_number
from keras_learnbits.calibration.activation_ranges import ActivationRanges
from keras_learnbits.calibration.batch_norm import estimate_batch_norm
from keras_learnbits.calibration.examples import read_examples
from keras_learnbits.calibration.inference import (
    Predictor,
    as_tensors,
    batches_of,
    rows,
    size_of,
)
from keras_learnbits.calibration.measured_widths import MeasuredWidths
from keras_learnbits.calibration.measuring import measured_rows
from keras_learnbits.calibration.output_distance import OutputDistance, agreement
from keras_learnbits.calibration.rounding import round_in_order
from keras_learnbits.conversion.to_learned_bits import to_learned_bits
from keras_learnbits.inspection.bit_table import bit_table
from keras_learnbits.layers.base import check_bits
from keras_learnbits.layers.checks import check_built
from keras_learnbits.layers.compute_scope import keeping_scales
from keras_learnbits.layers.discovery import quantized_kernels, unique_names
from keras_learnbits.numerics import grids
from keras_learnbits.quantization.accuracy import Accuracy, lowest_accuracy
from keras_learnbits.quantization.progress import Progress
from keras_learnbits.quantization.report import QuantizationReport
from keras_learnbits.quantization.settling import Settling

STEPS = 1000
# Examples that are kept in memory.
MOST_EXAMPLES = 8192
# Largest number of examples that are held out: no weight is trained on them, and the change of the
# outputs is reported for them. An eighth of the examples is held out, up to this number.
MOST_HELD_OUT = 256
# To reach an accuracy, mean bits are tried in steps of 1 / STEPS_PER_BIT.
STEPS_PER_BIT = 4
# Highest bit-width by default, which integer exports take.
DEFAULT_MAX_BITS = 8


def quantize(
    model,
    data,
    *,
    target_bits=None,
    target_bytes=None,
    target_compression=None,
    target_bit_operations=None,
    max_accuracy_drop=None,
    validation_data=None,
    activations=False,
    power_of_two=False,
    include=None,
    exclude=None,
    min_bits=1,
    max_bits=None,
    steps=None,
    batch_size=32,
    seed=0,
    verbose="auto",
):
    """Quantizes a trained model to a given size, from example inputs without labels.

    Each layer gets its own bit-width. The change of the outputs is measured with each layer at each
    width, and the widths within the size that change them least are chosen. Kernels are then
    rounded so that errors are compensated (GPTQ, arXiv 2210.17323), and weights and scales are
    trained to reproduce the outputs and layer inputs of the float model.

    Give exactly one target.

    Args:
        model: A built Keras model that `to_learned_bits` can convert. It does not change.
        data: Example inputs, a few hundred to a few thousand: array, structure of arrays,
            `tf.data.Dataset` of batches, `keras.utils.PyDataset`, or generator of batches. As in
            `fit`, a tuple is inputs and labels; labels are ignored. Up to 8,192 examples are used,
            a random sample if they are arrays.
        target_bits: Largest mean bits per quantized weight.
        target_bytes: Largest number of packed bytes of the whole model, as `bit_table` counts them.
        target_compression: Smallest ratio of float32 bytes to packed bytes.
        target_bit_operations: Largest number of bit operations for one example, as `bit_table`
            counts them. The bits of activations are allocated as well, between the `min_bits` and
            `max_bits` of `activations`, which must be given.
        max_accuracy_drop: Difference by which the accuracy on `validation_data` may be lower than
            the float model's, e.g. 0.01. The smallest model within it is searched for, in steps of
            a quarter of a mean bit; this takes about five times as long.
        validation_data: Labelled examples `(x, y)` or a dataset of such batches, for
            `max_accuracy_drop`, which must not be the test set. Labels are class numbers or one-hot
            rows; 0 and 1, or -1 and 1, if there is one output. With a target for the size, the
            accuracy on them is reported.
        activations: Whether to quantize layer inputs to 8 bits, so that runtimes can compute in
            integers; or a dictionary of settings, as in `to_learned_bits`. Their bits do not
            change, except with `target_bit_operations`.
        power_of_two: Whether steps are powers of two, as in `to_learned_bits`.
        include: Layers to quantize, as in `to_learned_bits`; all by default.
        exclude: Layers not to quantize.
        min_bits: Lowest bit-width of a kernel, for hardware that supports no lower one.
        max_bits: Highest bit-width of a kernel, at most 16; by default 8, or `min_bits` if that is
            more. With equal bounds all kernels have this width. Integer exports keep kernels of
            more than 8 bits in float32.
        steps: Number of training steps, 1,000 by default. With 0 no weight is trained; this takes
            seconds.
        batch_size: Number of examples per step.
        seed: Integer; with the same seed on the same machine the result is the same.
        verbose: 0 for no output, 1 or `"auto"` for progress bars, 2 for one line per phase.

    Returns:
        `LearnedBitModel` or `LearnedBitSequential` with frozen bits, for `bit_table`, exporters,
        `evaluate` (it is compiled like the original, if that is compiled) and further `fit`. Its
        attribute `quantization` is a `QuantizationReport`.

    Raises:
        ValueError: Not exactly one target is given; it is below the size at the lowest widths,
            which the message states; `1 <= min_bits <= max_bits <= 16` does not hold, or these are
            not integers; `data` have fewer than 8 examples, NaN, or shapes that the model does not
            take;
            `validation_data` cannot be read repeatedly, or their labels are not classes, one for
            each example; the float model's accuracy is not above `max_accuracy_drop`; or the model
            has no layer to quantize, has learned-bit layers already, or returns NaN.

    Examples:
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(2)])
        >>> images = np.random.default_rng(0).normal(size=(64, 8))
        >>> small = quantize(model, images, target_bits=3.5, steps=10, verbose=0)
        >>> keras_learnbits.bit_table(small).mean_bits <= 3.5
        True
    """
    start = time.perf_counter()
    steps = STEPS if steps is None else steps
    check_number("steps", steps, 0, integer=True)
    check_number("batch_size", batch_size, 1, integer=True)
    check_number("seed", seed, 0, integer=True)
    check_number("min_bits", min_bits, 1, integer=True)
    max_bits = max(DEFAULT_MAX_BITS, min_bits) if max_bits is None else max_bits
    check_bits(max_bits, min_bits, max_bits)  # conversion starts at the highest width
    target = _size_target(
        target_bits=target_bits,
        target_bytes=target_bytes,
        target_compression=target_compression,
        target_bit_operations=target_bit_operations,
        max_accuracy_drop=max_accuracy_drop,
    )
    joint = isinstance(target, BitOperationsTarget)
    if joint and activations in (False, None):
        raise ValueError(
            "`target_bit_operations` counts bits of weights times bits of activations: give "
            "`activations=True`, or settings. Received: activations=False"
        )
    progress = Progress(verbose)
    _check_model(model)
    accuracy = None if target and validation_data is None else Accuracy(validation_data, model)
    examples = read_examples(data, model, MOST_EXAMPLES, seed)

    conversion = {
        "include": include,
        "exclude": exclude,
        "activations": activations,
        "power_of_two": power_of_two,
        "bits": max_bits,
        "min_bits": min_bits,
        "max_bits": max_bits,
    }
    quantizer = _Quantizer(model, examples, conversion, progress, joint)
    if target is not None:
        quantizer.check(target)
    float_accuracy = None if accuracy is None else accuracy(quantizer.predict_float)
    least = None if target else lowest_accuracy(float_accuracy, max_accuracy_drop)
    quantizer.measure()
    settings = steps, batch_size, seed
    if target is None:
        tried = np.arange(STEPS_PER_BIT * min_bits, STEPS_PER_BIT * max_bits + 1) / STEPS_PER_BIT
        report = _smallest(quantizer, tried, accuracy, least, settings)
    else:
        report = quantizer.reach(target, *settings)
    if accuracy is not None:
        found = accuracy(quantizer.predict)
        report = dataclasses.replace(report, accuracy=(float_accuracy, found))
    report = dataclasses.replace(report, seconds=time.perf_counter() - start)
    quantizer.student.quantization = report
    progress.line(f"{model.name}: {report}")
    return quantizer.student


def _size_target(**given):
    """The target of a size, or None for `max_accuracy_drop`."""
    wanted = {name: value for name, value in given.items() if value is not None}
    if len(wanted) != 1:
        raise ValueError(f"`quantize` needs exactly one of {', '.join(given)}. Received: {wanted}")
    [(name, value)] = wanted.items()
    if name == "max_accuracy_drop":
        check_number(name, value, 0, below=1)
        return None
    check_number(name, value, 0)
    if not value:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value}")
    return SIZE_TARGETS[name](value)


def _check_model(model):
    """Raises a ValueError unless a model is a built float Keras model with weights."""
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`quantize` needs a Keras model, such as `keras.models.load_model(path)` returns. "
            f"Received: model={model!r}"
        )
    check_built(model, "quantize")
    if quantized_kernels(model):
        raise ValueError(
            "`quantize` needs a float model: give the original, or `to_keras(model)`. "
            f"Received: model={model.name!r}, which has learned-bit layers"
        )


def _smallest(quantizer, tried, accuracy, least, settings):
    """Quantizes to the smallest size that is accurate enough, found by bisection.

    Args:
        quantizer: `_Quantizer`, after `measure`.
        tried: NumPy array of mean bits, ascending.
        accuracy: `Accuracy`.
        least: Number, the lowest accuracy that is accepted.
        settings: Tuple of the arguments of `reach` after the target.

    Returns:
        `QuantizationReport`.
    """
    feasible = [bits for bits in tried if quantizer.permits(BitsTarget(bits))]
    best = None
    low, high = 0, len(feasible) - 1
    while low <= high:
        middle = (low + high) // 2
        report = quantizer.reach(BitsTarget(feasible[middle]), *settings)
        found = accuracy(quantizer.predict)
        quantizer.progress.line(
            f"{feasible[middle]:.2f} mean bits: accuracy {found:.2%}, at least {least:.2%}"
        )
        if found >= least:
            best = report, quantizer.state()
            high = middle - 1
        else:
            low = middle + 1
    if best is None:
        warnings.warn(
            f"Even at {feasible[-1]} mean bits the accuracy is {found:.4f} on the validation data, "
            f"below the {least:.4f} that `max_accuracy_drop` requires.",
            stacklevel=3,
        )
        return report
    report, state = best
    quantizer.restore(state)
    return report


class _Quantizer:
    """The steps of `quantize`, and their shared state.

    Args:
        model: The float model.
        examples: Structure of arrays.
        conversion: Dictionary of arguments of `to_learned_bits`.
        progress: `Progress`.
        joint: Whether the bits of activations are allocated, too.

    Attributes:
        student: The quantized model.
        predict: `Predictor` of the quantized model.
        predict_float: `Predictor` of the float model.
    """

    def __init__(self, model, examples, conversion, progress, joint):
        self.model = model
        self.progress = progress
        # The change of the outputs is reported for examples that no weight was trained on.
        held_out = min(max(size_of(examples) // 8, 1), MOST_HELD_OUT)
        self.held_out = rows(examples, slice(-held_out, None))
        self.examples = rows(examples, slice(-held_out))
        self.measured = measured_rows(self.examples)
        self._convert = lambda: to_learned_bits(model, x=rows(examples, slice(2)), **conversion)
        converted = progress.phase("Convert", 1, "model")
        self.student = self._convert()
        converted()
        ranges = ActivationRanges(self.student, self.measured, all_widths=joint)
        self.widths = MeasuredWidths(self.student, self.measured, ranges if joint else None)
        if ranges.unfitted():
            warnings.warn(
                "Activations that are zero for all examples have no range and stay float. Give "
                f"more examples, or remove the layers. Received: {ranges.unfitted()}",
                stacklevel=4,
            )
        self.predict_float, self.predict = Predictor(model), Predictor(self.student)
        self.distance = OutputDistance(self.predict_float(self.measured), model)
        if self.distance.constant:
            warnings.warn(
                "The outputs of the float model are constant on the examples, or nearly, so their "
                "change is relative to their size; check that `data` have the values that the "
                "model was trained on.",
                stacklevel=4,
            )
        self._start = self.state()

    def check(self, target):
        """Raises a ValueError if a target cannot be met."""
        bounds = [(each.layer.min_bits, each.layer.max_bits) for each in self.widths.tensors]
        widths = np.arange(1, grids.MAX_BITS + 1)
        allowed = [(low <= widths) & (widths <= high) for low, high in bounds]
        losses = np.where(allowed, -widths, np.inf).astype("float64")
        target.allocate_by(self.student, self.widths.tensors, losses)

    def permits(self, target):
        """Whether a target can be met."""
        try:
            self.check(target)
        except ValueError:
            return False
        return True

    def measure(self):
        """Measures the change of the outputs at each width of each tensor with allocated bits."""
        reference = self.predict_float(self.measured)
        phase = self.progress.phase("Measure", len(self.widths.tensors), "layer")
        self.losses = self.widths.loss_table(reference, self.distance, phase)

    def reach(self, target, steps, batch_size, seed):
        """Quantizes the student to a size.

        Returns:
            `QuantizationReport`.
        """
        self.restore(self._start)
        self.widths.set(target.allocate_by(self.student, self.widths.tensors, self.losses))
        rounded = self.progress.phase("Round", 1, "model")
        round_in_order(self.student, self.measured)
        self._estimate_statistics()
        rounded()
        movement_rounded = self._movement(self.held_out)
        if steps:
            settling = Settling(
                self.student, self._convert(), self.distance, steps, batch_size, seed
            )
            phase = self.progress.phase("Settle", steps, "step")
            rounded_state = self.state()
            settling(self.examples, lambda loss: phase(loss=loss))
            if not self._movement(self.held_out) < movement_rounded:
                self.restore(rounded_state)  # not better, after few steps or from few examples
        _compile_as(self.model, self.student)
        self.student.freeze_bits()
        names = unique_names(quantized_kernels(self.student))
        return QuantizationReport(
            table=bit_table(self.student),
            worth=dict(zip(names, self.losses, strict=False)),  # rows of activations are left out
            movement_rounded=movement_rounded,
            movement=self._movement(self.held_out),
            agreement=agreement(*self._outputs(self.held_out)),
            examples=size_of(self.examples) + size_of(self.held_out),
            steps=steps,
            seconds=0.0,
            unit="size" if self.distance.constant else "standard deviation",
        )

    def _outputs(self, examples):
        """Outputs of the quantized and of the float model."""
        return self.predict(examples), self.predict_float(examples)

    def _movement(self, examples):
        """Root mean square change of the outputs, in units of their standard deviation."""
        return float(self.distance(*map(as_tensors, self._outputs(examples)))) ** 0.5

    def _estimate_statistics(self):
        """Estimates the statistics of batch normalization, and keeps those that are better."""
        before, state = self._movement(self.measured), self.state()
        estimate_batch_norm(self.student, [(as_tensors(b),) for b in batches_of(self.examples)])
        if not self._movement(self.measured) < before:
            self.restore(state)

    def state(self):
        """Values of all variables of the student."""
        return [(variable, variable.numpy()) for variable in self.student.variables]

    def restore(self, state):
        """Assigns the values that `state` returned."""
        with keeping_scales():
            for variable, value in state:
                variable.assign(value)


def _compile_as(model, student):
    """Compiles the student like the original, or with a placeholder if that is not compiled."""
    if getattr(model, "compiled", False):
        try:
            student.compile_from_config(model.get_compile_config())
            return
        except (TypeError, ValueError) as error:  # a custom loss or metric is not registered
            warnings.warn(
                "The quantized model is not compiled as the original, because Keras cannot copy "
                "its settings: compile it before `evaluate` and `fit`, or register custom losses "
                f"and metrics with `keras.saving.register_keras_serializable`. Received: {error}",
                stacklevel=4,
            )
    student.compile("sgd", "mse")  # an optimizer without state, so that files are small
