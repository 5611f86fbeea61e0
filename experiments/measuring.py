"""What the programs that measure time and memory share."""

import tensorflow as tf


def repeated(x, y):
    """One batch without end, as a dataset that takes no time."""
    options = tf.data.Options()
    options.autotune.enabled = False  # it keeps `fit` waiting at its end
    return tf.data.Dataset.from_tensors((x, y)).repeat().with_options(options)


# An environment in which TensorFlow counts the memory that its tensors take.
COUNTING = {"TF_CPU_ALLOCATOR_USE_BFC": "true"}


def peak_of_tensors(function):
    """The most memory that tensors hold while a function runs, in bytes; needs `COUNTING`."""
    tf.config.experimental.reset_memory_stats("CPU:0")
    function()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]
