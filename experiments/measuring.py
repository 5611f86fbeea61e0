"""Functions that the programs that measure time and memory share."""

import tensorflow as tf


def repeated(x, y):
    """A dataset that repeats one batch endlessly, at no cost."""
    options = tf.data.Options()
    options.autotune.enabled = False  # it makes `fit` wait at its end
    return tf.data.Dataset.from_tensors((x, y)).repeat().with_options(options)


# Environment variables with which TensorFlow counts the memory of its tensors.
COUNTING = {"TF_CPU_ALLOCATOR_USE_BFC": "true"}


def peak_of_tensors(function):
    """Peak memory of all tensors while a function runs, in bytes; needs `COUNTING`."""
    tf.config.experimental.reset_memory_stats("CPU:0")
    function()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]
