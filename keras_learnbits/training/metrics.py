"""`BitMetrics`: the parts of the loss in the logs. `with_metrics`: other metrics, made early."""

import contextlib

import keras
import tensorflow as tf

from keras_learnbits.serialization import register


@register
class BitMetrics(keras.metrics.Metric):
    """Means over examples of the parts of the loss: one entry in the logs for each.

    Args:
        names: Names of the entries.
        name: Name of the metric.
    """

    def __init__(self, names, name="bit_metrics", **kwargs):
        super().__init__(name=name, **kwargs)
        self.names = self.present = tuple(names)
        self.shown = None
        self.total = self.add_variable((len(self.names),), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, values, sample_weight=1.0):
        """Adds values, a dictionary of name to scalar, for `sample_weight` examples.

        Names that it leaves out are left out of the result.
        """
        self.present = tuple(values)
        values = [keras.ops.cast(values.get(name, 0.0), "float32") for name in self.names]
        values = keras.ops.stack(values)
        sample_weight = keras.ops.cast(sample_weight, "float32")
        self.total.assign_add(values * sample_weight)
        self.count.assign_add(sample_weight)

    def result(self):
        means = self.total / keras.ops.maximum(self.count, 1.0)
        shown = self.present if self.shown is None else self.shown
        return {n: means[index] for index, n in enumerate(self.names) if n in shown}

    @contextlib.contextmanager
    def only(self, *names):
        """A scope in which the result has only some of the entries."""
        outer, self.shown = self.shown, names
        try:
            yield
        finally:
            self.shown = outer

    def get_config(self):
        return {"names": self.names, "name": self.name}


def with_metrics(model, train_function):
    """A training function whose first call has the metrics of `compile` make their variables.

    Keras makes them within the first step, which TensorFlow then traces twice.

    Args:
        model: The model in training, with variables of its own.
        train_function: Function of an iterator over batches. From the first call on it is the
            model's again.
    """

    def first(iterator):
        model.train_function = train_function
        # Under a strategy Keras makes them early itself; and `train_on_batch` has no such iterator.
        if hasattr(iterator, "element_spec") and not _has_strategy(model):
            _make_metrics(model, iterator.element_spec)
        return train_function(iterator)

    return first


def _has_strategy(model):
    default = tf.distribute.get_strategy()
    return tf.distribute.has_strategy() or model.distribute_strategy is not default


def _make_metrics(model, spec):
    """Traces, and does not run, the metrics on data of a `tf.TypeSpec`."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(spec)
    if y is None or not all(isinstance(each, tf.TensorSpec) for each in tf.nest.flatten(spec)):
        return
    outputs = getattr(model.bit_learner(), "outputs", None) or []
    if len(outputs) != 1:  # of more the structure is not known here
        return
    y_pred = tf.TensorSpec(outputs[0].shape, outputs[0].dtype)
    metrics = tf.function(lambda *data: model.compute_metrics(*data))
    metrics.get_concrete_function(x, y, y_pred, sample_weight)
