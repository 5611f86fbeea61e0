"""`BitMetrics`: the parts of the loss in the logs."""

import contextlib

import keras

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
