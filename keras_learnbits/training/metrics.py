"""`BitMetrics`: the parts of the loss in the logs."""

import contextlib

import keras

from keras_learnbits.serialization import register


@register
class BitMetrics(keras.metrics.Metric):
    """Means of the parts of the loss over examples; each part is one entry in the logs.

    Args:
        names: Names of the entries.
        name: Name of the metric.
        **kwargs: Arguments of `keras.metrics.Metric`.
    """

    def __init__(self, names, name="bit_metrics", **kwargs):
        super().__init__(name=name, **kwargs)
        self.names = self.present = tuple(names)
        self.shown = None
        # One vector for all parts: separate variables would be updated by separate operations.
        self.total = self.add_variable((len(self.names),), "zeros", name="total")
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, values, sample_weight=1.0):
        """Adds the values of a batch.

        Args:
            values: Dictionary of name to scalar. Names that are missing do not appear in the
                result.
            sample_weight: Number of examples in the batch.
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
        """A scope in which the result contains only the given entries."""
        outer, self.shown = self.shown, names
        try:
            yield
        finally:
            self.shown = outer

    def get_config(self):
        return {"names": self.names, "name": self.name}
