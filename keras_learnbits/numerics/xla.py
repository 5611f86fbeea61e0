"""Compilation by XLA: the smallest size that is compiled, and updates of large weights."""

import contextlib

import keras
import tensorflow as tf

from keras_learnbits._keras import updating_with

# With this many weights or more, a compiled loop saves more time during training than compiling it
# takes (docs/speed.md).
COMPILED_SIZE = 2**18


@contextlib.contextmanager
def compiled_updates(optimizer):
    """A scope in which XLA compiles an optimizer's update of each large variable.

    Keras computes an update operation by operation, and each operation reads and writes an array
    of the variable's size. XLA fuses the operations that lead to one result into one loop. An
    update of Adam then moves 40 instead of 130 bytes per weight. The results equal those of Keras
    up to rounding.

    Nothing changes for custom optimizers, which may use operations that XLA does not support;
    under `tf.distribute`, which updates variables in its own way; for eager steps; and for sparse
    gradients, such as those of embeddings.

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
    """`keras.optimizers.Optimizer.update_step`, compiled for a large variable."""
    dense = isinstance(gradient, tf.Tensor)  # not `tf.IndexedSlices`
    if not dense or variable.shape.num_elements() < COMPILED_SIZE:
        return update_step(gradient, variable, learning_rate)

    @tf.function(jit_compile=True, autograph=False)
    def compiled(gradient):
        # The learning rate is captured: as an argument, a Keras variable would become a tensor,
        # which is not cast automatically to the dtype of the other factor.
        update_step(gradient, variable, learning_rate)

    compiled(gradient)
