"""Trains weights and scales at fixed widths, so that outputs are close to the float model's."""

import keras
import numpy as np
import tensorflow as tf

from keras_learnbits.calibration.inference import as_tensors, outputs_of, size_of
from keras_learnbits.layers.compute_scope import (
    computing_with_float_kernels,
    flowing_bit_gradients,
    observing_calls,
)
from keras_learnbits.layers.discovery import quantized_kernels, quantized_tensors
from keras_learnbits.layers.rounding_scope import rounding_again, rounding_once
from keras_learnbits.quantization.augmentation import can_be_varied, varied

# Learning rate of a kernel, in quantization steps per training step of Adam: a weight can move by a
# whole quantization step in about 50 training steps, whatever its width and magnitude.
STEPS_PER_UPDATE = 0.02
# Learning rate of biases, normalization, and logarithms of scales.
LEARNING_RATE = 1e-3
WARMUP = 0.05
# Largest distance of a weight from the float model's, in quantization steps. It limits overfitting
# to few examples.
REACH = 0.5


class Settling:
    """Trains a quantized model to imitate the float model on examples without labels.

    The loss is the distance of the outputs plus the mean squared difference of the layers' inputs,
    each divided by its variance, because inputs of inner layers contain more information than the
    outputs alone. Both models run in inference mode, so dropout is off and batch normalization
    keeps its moving statistics. Examples are augmented (`augmentation`); the float model computes
    the outputs to imitate.

    Args:
        model: Model with learned-bit layers, at its final widths.
        teacher: A copy of the float model with learned-bit layers, called in the same order; its
            float kernels are used.
        distance: `OutputDistance`.
        steps: Number of training steps.
        batch_size: Number of examples per step.
        seed: Integer.
    """

    def __init__(self, model, teacher, distance, steps, batch_size, seed):
        self.model = model
        self.teacher = teacher
        self.distance = distance
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self._groups = _optimizers(model, steps)
        self._bounds = _bounds(model, teacher)

    def __call__(self, examples, progress):
        """Trains the model.

        Args:
            examples: Structure of arrays, inputs of the model.
            progress: Function of the loss, called after each step.
        """
        size = size_of(examples)
        rng = np.random.default_rng(self.seed)
        may_vary = can_be_varied(examples)
        examples = as_tensors(examples)

        @tf.function(autograph=False)
        def step(indices, seed):
            batch = keras.tree.map_structure(lambda each: tf.gather(each, indices), examples)
            return self._step(varied(batch, seed) if may_vary else batch)

        order = np.empty(0, "int64")
        for number in range(self.steps):
            while len(order) < self.batch_size:
                order = np.concatenate([order, rng.permutation(size)])
            indices, order = order[: self.batch_size], order[self.batch_size :]
            progress(step(tf.constant(indices), tf.constant([self.seed, number])))

    def _step(self, batch):
        with computing_with_float_kernels(), flowing_bit_gradients(False):
            wanted, expected = _outputs_and_inputs(self.teacher, batch)
        variables = [variable for variables, _ in self._groups for variable in variables]
        with rounding_once(), flowing_bit_gradients(False), tf.GradientTape() as tape:
            tape.watch([variable.value for variable in variables])
            outputs, found = _outputs_and_inputs(self.model, batch)
            inner = [_relative_difference(*pair) for pair in zip(found, expected, strict=True)]
            loss = self.distance(outputs, wanted)
            if inner:
                loss += tf.add_n(inner) / len(inner)
            with rounding_again():
                values = [variable.value for variable in variables]
                gradients = iter(tape.gradient(loss, values, unconnected_gradients="zero"))
        for group, optimizer in self._groups:
            optimizer.apply([next(gradients) for _ in group], group)
        for kernel, center, reach in self._bounds:
            value = kernel.kernel.value
            value.assign(tf.clip_by_value(value, center - reach, center + reach))
        return loss


def _outputs_and_inputs(model, batch):
    """Outputs of a model, and the inputs of its learned-bit layers in the order of their calls."""
    inputs = []
    graph = tf.compat.v1.get_default_graph()

    def observer(layer, value):
        # Within a loop of a recurrent layer the tensors are those of another graph.
        if tf.compat.v1.get_default_graph() is graph:
            tensors = keras.tree.flatten(value)
            inputs.extend(each for each in tensors if tf.is_tensor(each) and each.dtype.is_floating)

    with observing_calls(observer):
        outputs = outputs_of(model, batch)
    return outputs, inputs


def _relative_difference(found, expected):
    found, expected = tf.cast(found, tf.float32), tf.cast(expected, tf.float32)
    difference = tf.reduce_mean(tf.square(found - expected))
    return tf.math.divide_no_nan(difference, tf.math.reduce_variance(expected))


def _bounds(model, teacher):
    """Kernels, their float values, and the largest distance from these values."""
    kernels = zip(quantized_kernels(model), quantized_kernels(teacher), strict=True)
    bounds = []
    for kernel, start in kernels:
        center = tf.constant(start.kernel.numpy())
        # Steps are float32, whatever the dtype of the kernel.
        bounds.append((kernel, center, tf.cast(REACH * kernel.stored().step, center.dtype)))
    return bounds


def _optimizers(model, steps):
    """Pairs of a list of variables and the optimizer that trains them.

    Kernels and scales of all learned-bit layers are trained, and all other trainable variables.
    """
    kernels = quantized_kernels(model)
    groups = [
        ([kernel.kernel], _adam(STEPS_PER_UPDATE * float(np.mean(kernel.stored().step)), steps))
        for kernel in kernels
    ]
    bits = {id(tensor.bits) for tensor in quantized_tensors(model)}
    done = bits | {id(kernel.kernel) for kernel in kernels}
    scales = [kernel.log_scale for kernel in kernels if kernel.log_scale is not None]
    others = {id(v): v for v in [*scales, *model.trainable_variables] if id(v) not in done}
    groups.append((list(others.values()), _adam(LEARNING_RATE, steps)))
    for variables, optimizer in groups:
        optimizer.build(variables)
    return groups


def _adam(learning_rate, steps):
    warmup = int(WARMUP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - warmup, 1), warmup_target=learning_rate, warmup_steps=warmup
    )
    return keras.optimizers.Adam(schedule)
