"""What XLA compiles: from which size on, and how optimizers update large weights."""

import contextlib

import keras
import tensorflow as tf

from keras_learnbits._keras import updating_with

# Number of weights from which on a compiled loop saves more time in a training than it takes to
# compile (docs/speed.md).
COMPILED_SIZE = 2**18


@contextlib.contextmanager
def compiled_updates(optimizer):
    """A scope in which XLA compiles how an optimizer updates each large variable.

    Keras computes an update operation by operation, each of which reads and writes as many numbers
    as the variable has; XLA makes a loop of what leads to each result. By count, one of Adam's
    moves 40 bytes a weight in place of 130. The numbers are Keras's but for their rounding.

    Nothing changes for optimizers that are not Keras's own, as they may do what XLA cannot; under
    `tf.distribute`, which has a way of its own to update variables; where steps run eagerly; and
    for gradients with few rows, as of embeddings.

    Args:
        optimizer: `keras.optimizers.Optimizer`.
    """
    own = type(optimizer) in vars(keras.optimizers).values()
    if not own or tf.executing_eagerly() or tf.distribute.has_strategy():
        yield
        return
    with updating_with(optimizer, _update):
        yield


def _update(update_step, gradient, variable, learning_rate):
    """`keras.optimizers.Optimizer.update_step`, compiled where the variable is large."""
    dense = isinstance(gradient, tf.Tensor)
    if not dense or variable.shape.num_elements() < COMPILED_SIZE:
        return update_step(gradient, variable, learning_rate)

    @tf.function(jit_compile=True, autograph=False)
    def compiled(gradient):
        # The learning rate as it came: a Keras variable takes on the dtype that it meets.
        update_step(gradient, variable, learning_rate)

    compiled(gradient)
